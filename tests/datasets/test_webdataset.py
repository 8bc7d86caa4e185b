"""Tars that WebDataset's own writer made, packed and read back."""

from __future__ import annotations

import argparse
import io
import json
import re
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from commands import run_cmvae
from PIL import Image
from webdataset import TarWriter

from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.datasets import webdataset
from cmvae.utils.errors import UserError

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220)}
FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def picture(number):
    """Bytes of an image of one colour, of some size, as JPEG, PNG or WebP."""
    colour, extension = list(COLOURS)[number % 3], list(FORMATS)[number % 3]
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number % 5, 30), COLOURS[colour]).save(buffer, FORMATS[extension])
    return extension, buffer.getvalue()


@pytest.fixture
def tars(tmp_path):
    """Four tars of fifteen samples; every fifth has no caption, every seventh no sizes."""
    number = 0
    (tmp_path / "tars").mkdir()
    for tar in range(4):
        with TarWriter(str(tmp_path / f"tars/part-{tar:03d}.tar")) as writer:
            for _ in range(15):
                extension, content = picture(number)
                sample = {"__key__": f"folder/sample-{number}", extension: content}
                sample["cls"] = number % 3
                if number % 5:
                    sample["txt"] = f"a {list(COLOURS)[number % 3]} card"
                if number % 7:
                    buffer = io.BytesIO()
                    np.save(buffer, np.array([number % 3, number / 60]))
                    sample["size.npy"] = buffer.getvalue()
                sample["json"] = json.dumps({"not": "read"}).encode()
                writer.write(sample)
                number += 1
    return tmp_path / "tars"


FLAGS = ("--image", "photo=jpg,png,webp", "--text", "txt", "--vector", "size=size.npy", "--label", "cls",
         "--image-size", 8, "--min-count", 1)  # fmt: skip


def pack(tars, folder, *flags):
    return run_cmvae("pack", "webdataset", *tars, "--out", folder / "shards", *flags, folder=folder)


def read(folder):
    """All samples by the number in their keys."""
    index = ShardIndex.load(folder)
    samples = {}
    for split in index.splits:
        loader = EvaluationLoader(folder, split=split, modalities=list(index.modalities), batch_size=7)
        for batch in loader:
            for place in np.flatnonzero(batch["valid"].numpy()):
                number = int(re.search(r"sample-(\d+)", batch["key"][place]).group(1))
                assert number not in samples
                samples[number] = {
                    name: values[place] for name, values in batch.items() if name not in ("skipped", "group")
                }
    return index, samples


def check(folder):
    index, samples = read(folder)
    assert set(index.modalities) == {"photo", "text", "size"}
    assert sorted(samples) == list(range(60))
    text, size = index.modalities["text"], index.modalities["size"]
    for number, sample in samples.items():
        colour = list(COLOURS)[number % 3]
        np.testing.assert_allclose(sample["photo"].numpy().mean((1, 2)), COLOURS[colour], atol=4)
        present = dict(zip(index.modalities, sample["mask"].tolist(), strict=True))
        assert present == {"photo": True, "text": number % 5 != 0, "size": number % 7 != 0}
        if present["text"]:
            assert text.to_text(sample["text"].numpy()) == f"a {colour} card"
        if present["size"]:
            original = size.to_stored(size.to_data(sample["size"][None]))[0]
            np.testing.assert_allclose(original, [number % 3, number / 60], atol=1e-5)
        assert index.class_names[sample["label"]] == str(number % 3)


def test_images_of_any_size_texts_vectors_and_labels_are_packed(tars, tmp_path):
    done = pack([f"{tars}/part-{{000..003}}.tar"], tmp_path, *FLAGS, "--config", tmp_path / "mine.yaml")
    assert done.returncode == 0, done.stderr
    check(tmp_path / "shards")
    trained = run_cmvae(
        "train", tmp_path / "mine.yaml", "train.max_steps=2", "train.batch_size=8", "tracking.enabled=false",
        folder=tmp_path,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr


def test_a_glob_gives_the_same_shards(tars, tmp_path):
    digests = []
    for patterns in ([f"{tars}/part-{{000..003}}.tar"], [f"{tars}/*.tar"]):
        done = pack(patterns, tmp_path, *FLAGS, "--force")
        assert done.returncode == 0, done.stderr
        digests.append(ShardIndex.load(tmp_path / "shards").digest)
    assert digests[0] == digests[1]


class Ranges(SimpleHTTPRequestHandler):
    """Answers requests for a range of bytes, as S3 and the Hugging Face Hub do."""

    def log_message(self, *arguments):
        pass

    def send_head(self):
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return super().send_head()
        with open(self.translate_path(self.path), "rb") as file:
            content = file.read()
        first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.end_headers()
        return io.BytesIO(content[first : last + 1])

    def end_headers(self):
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()


def test_tars_at_a_url_are_read_without_a_copy(tars, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Ranges, directory=str(tars))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/part-{{000..003}}.tar"
        done = pack([url], tmp_path, *FLAGS)
        missing = pack([url.replace("part", "none")], tmp_path, *FLAGS, "--force")
        server.shutdown()
    assert done.returncode == 0, done.stderr
    check(tmp_path / "shards")
    assert missing.returncode == 2
    assert "none-000.tar: cannot be read as a tar" in missing.stderr
    assert "Traceback" not in missing.stderr


def test_damaged_members_are_refused_or_left_out(tars, tmp_path):
    with TarWriter(str(tars / "part-004.tar")) as writer:
        for number, content in ((60, b"GIF8"), (61, picture(61)[1])):
            writer.write({"__key__": f"folder/sample-{number}", "png": content, "cls": 0})
    refused = pack([f"{tars}/*.tar"], tmp_path, *FLAGS)
    assert refused.returncode == 2
    assert "part-004.tar: folder/sample-60: cannot be read as an image" in refused.stderr
    done = pack([f"{tars}/*.tar"], tmp_path, *FLAGS, "--on-error", "skip", "--force")
    assert done.returncode == 0, done.stderr
    assert "folder/sample-60" in (tmp_path / "shards/skipped.txt").read_text()
    assert sorted(read(tmp_path / "shards")[1]) == [*range(60), 61]


def test_what_is_lost_is_reported_as_for_tables(tmp_path, capsys):
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(40):
            buffer = io.BytesIO()
            np.save(buffer, np.array([number % 7, 1.0]))
            writer.write({"__key__": f"s{number}", "txt": "long " * 20, "npy": buffer.getvalue()})
    flags = ["--text", "txt", "--vector", "npy", "--text-length", "8"]
    webdataset.from_arguments(parse([str(tmp_path / "a.tar"), *flags]))
    reported = capsys.readouterr().err
    assert "note: text: 40 texts are cut after 7 words" in reported
    assert "warning: vector: 1 never vary in the train split" in reported


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "bmp"], r"no member has the extension bmp\. `tar --list` shows"),
        (["--text", "Label=txt"], r"--text Label=txt: 'Label' is not a valid name of a modality"),
        (["--image", "jpg", "--image", "png"], r"--image png: there is a modality 'image' already\. Write"),
        ([], r"no modality\. Name some with --image, --text and --vector"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(tars, flags, message):
    with pytest.raises(UserError, match=message):
        webdataset.from_arguments(parse([str(tars / "part-000.tar"), *flags]))


@pytest.mark.parametrize("pattern", ["pipe:cat part-000.tar", "nowhere-{0..3}.tar", "*.zip"])
def test_what_is_no_file_is_refused_and_no_command_is_run(tars, pattern, monkeypatch):
    monkeypatch.chdir(tars)
    with pytest.raises(UserError, match=r"no such file|commands are not run"):
        webdataset.from_arguments(parse([pattern, "--image", "jpg"]))


def test_a_tar_that_is_none_is_named(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(UserError, match=r"a\.tar: cannot be read as a tar"):
        webdataset.from_arguments(parse([str(tmp_path / "a.tar"), "--image", "jpg"]))
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        for _ in range(2):
            entry = tarfile.TarInfo("x.txt")
            tar.addfile(entry)
    with pytest.raises(UserError, match=r"b\.tar: x\.txt occurs twice"):
        webdataset.from_arguments(parse([str(tmp_path / "b.tar"), "--text", "txt"]))


def parse(flags):
    parser = argparse.ArgumentParser()
    webdataset.add_arguments(parser)
    arguments = parser.parse_args(flags)
    arguments.seed, arguments.out = 0, Path("shards")
    return arguments
