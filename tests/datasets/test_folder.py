import argparse
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmvae.data.reader import EvaluationLoader
from cmvae.datasets import folder
from cmvae.datasets.writer import write_shards
from cmvae.utils.errors import UserError


def read(path: Path, *flags: str):
    """The source that a command line describes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("shards/mine"))
    parser.add_argument("--seed", type=int, default=0)
    folder.add_arguments(parser)
    return folder.from_arguments(parser.parse_args([str(path), *flags]))


@pytest.fixture
def root(tmp_path) -> Path:
    """Forty samples `s.NUMBER`; every fourth has no image, every fifth no text."""
    for name in ("Photos", "notes", "spectra", ".cache"):
        (tmp_path / name).mkdir()
    names = ["name,label"]
    for number in range(40):
        names.append(f"s.{number},{'even' if number % 2 == 0 else 'odd'}")
        if number % 4:
            suffix = "png" if number % 3 else "bmp"
            Image.new("RGB", (20, 30), (6 * number, 0, 0)).save(tmp_path / "Photos" / f"s.{number}.{suffix}")
        if number % 5:
            (tmp_path / "notes" / f"s.{number}.txt").write_text(
                f"Note {'even' if number % 2 == 0 else 'odd'}"
            )
        np.save(tmp_path / "spectra" / f"s.{number}.npy", np.full((2, 3), number, np.int16))
    (tmp_path / "labels.csv").write_text("\n".join(names))
    (tmp_path / ".cache" / "x.txt").write_text("hidden")
    return tmp_path


def test_files_of_the_same_name_are_one_sample(root, capsys):
    (root / "notes" / "README.md").write_text("no text of a sample")
    source = read(root, "--image-size", "8")
    reported = capsys.readouterr().err
    assert "ignored: 1 .md" in reported
    assert "photos is missing in 10 of 40" in reported
    index = write_shards(source, root / "out")
    assert {name: modality.kind for name, modality in index.modalities.items()} == {
        "photos": "image", "notes": "text", "spectra": "vector"
    }  # fmt: skip
    assert index.modalities["spectra"].shape == (6,)
    words = index.modalities["notes"].categories
    seen = []
    for split in index.splits:
        size = index.splits[split].num_samples
        (batch,) = EvaluationLoader(
            root / "out", split=split, modalities=list(index.modalities), batch_size=size
        )
        for place, key in enumerate(batch["key"]):
            number = int(key.removeprefix("s_"))
            seen.append(number)
            parity = "even" if number % 2 == 0 else "odd"
            assert index.class_names[batch["label"][place]] == parity
            assert batch["mask"][place].tolist() == [number % 4 > 0, number % 5 > 0, True]
            assert (batch["spectra"][place] == number).all()
            if number % 4:
                assert (batch["photos"][place, 0] == 6 * number).all()
            if number % 5:
                assert [words[token] for token in batch["notes"][place, :3].tolist()] == [
                    "note",
                    parity,
                    "<eos>",
                ]
    assert sorted(seen) == list(range(40))


def test_labels_are_optional(root):
    (root / "labels.csv").unlink()
    source = read(root)
    assert source.class_names is None
    assert source.sample("train", 0).label is None


def test_mistakes_are_named(root, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        read(root / "nothing")
    with pytest.raises(UserError, match="no subfolder contains images"):
        read(root / "Photos")
    (root / "notes" / "s.1.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"s\.1\.txt: s\.1\.png has the same name"):
        read(root)
    (root / "notes" / "s.1.txt").unlink()
    with pytest.raises(UserError, match=r"notes: contains (image and text|text and image), .*s\.1\.png"):
        read(root)
    (root / "notes" / "s.1.png").unlink()
    (root / "notes" / "extra.txt").write_text("x")
    with pytest.raises(UserError, match=r"labels\.csv: no row with the name 'extra'"):
        read(root)
    (root / "notes" / "extra.txt").unlink()
    np.save(root / "spectra" / "s.1.npy", np.zeros(5))
    with pytest.raises(UserError, match=r"s\.1\d?\.npy: has \d numbers, but .*s\.\d+\.npy has \d"):
        read(root)
    np.save(root / "spectra" / "s.1.npy", np.array([1, np.nan]))
    with pytest.raises(UserError, match=r"s\.1\.npy: is empty, or has numbers that are not finite"):
        read(root)
    np.save(root / "spectra" / "s.1.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"s\.1\.npy: cannot be read as an array"):
        read(root)


def test_names_that_become_one_key_are_told_apart(tmp_path):
    """Names in scripts that keys cannot hold, of any length."""
    (tmp_path / "notes").mkdir()
    names = ["\u732b1", "\u72ac1", "a.b", "a_b", "x" * 200, "x" * 201, *(f"n{n}" for n in range(20))]
    for name in names:
        (tmp_path / "notes" / f"{name}.txt").write_text(f"this is {name[:1]}")
    keys = list(read(tmp_path).keys)
    assert len(set(keys)) == len(names)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,80}", key) for key in keys)
    assert {f"n{n}" for n in range(20)} < set(keys)
    assert list(read(tmp_path).keys) == keys


def test_two_spellings_of_a_file_name_are_one_sample(tmp_path):
    """macOS writes \u00e9 as two characters."""
    for folder_name, letter in (("notes", "\u00e9"), ("spectra", "e\u0301")):
        (tmp_path / folder_name).mkdir()
        for number in range(20):
            path = tmp_path / folder_name / f"{letter}{number}"
            if folder_name == "notes":
                path.with_suffix(".txt").write_text("a text")
            else:
                np.save(path, [number % 7])
    source = read(tmp_path)
    assert len(source.keys) == 20
    assert not any(modality.optional for modality in source.modalities.values())


def test_damaged_files_are_left_out_and_listed(root, tmp_path):
    (root / "notes" / "s.1.txt").write_bytes(b"\xff\xfe\x00")
    (root / "spectra" / "s.2.npy").write_bytes(b"\x93NUMPY")
    (root / "Photos" / "s.3.bmp").write_bytes(b"BM nothing")
    with pytest.raises(UserError, match=r"s\.1\.txt: cannot be read as text"):
        read(root)
    index = write_shards(
        read(root, "--on-error", "skip", "--image-size", "8"), root / "out", on_error="skip", num_workers=2
    )
    assert sum(split.num_samples for split in index.splits.values()) == 37
    skipped = (root / "out" / "skipped.txt").read_text().splitlines()
    assert sorted(re.findall(r"s\.\d\.(?:txt|npy|bmp): ", "\n".join(skipped))) == [
        "s.1.txt: ", "s.2.npy: ", "s.3.bmp: "
    ]  # fmt: skip
    loaders = [
        EvaluationLoader(root / "out", split=split, modalities=["spectra"], batch_size=40)
        for split in index.splits
    ]
    keys = [key for loader in loaders for batch in loader for key in batch["key"]]
    assert {"s_1", "s_2", "s_3"}.isdisjoint(keys)
    # Packed again without damage, the list is gone.
    for name in ("notes/s.1.txt", "spectra/s.2.npy", "Photos/s.3.bmp"):
        (root / name).unlink()
    write_shards(read(root, "--image-size", "8"), root / "out", force=True)
    assert not (root / "out" / "skipped.txt").exists()


def test_half_of_the_labels_are_enough(root):
    lines = (root / "labels.csv").read_text().splitlines()
    (root / "labels.csv").write_text(
        "\n".join([lines[0], *(line if n % 2 else f"s.{n}," for n, line in enumerate(lines[1:]))])
    )
    source = read(root)
    assert source.class_names == ("odd",)
    assert (source.labels == -1).sum() == 20
