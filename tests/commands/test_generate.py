"""`cmvae generate` on an untrained export: which files there are and what is in them."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from commands import run_cmvae, run_without_torch
from PIL import Image

from cmvae.commands import generated_files
from cmvae.commands.generated_files import safe_name
from cmvae.config import SamplerConfig
from cmvae.data.batch import to_device
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.models.cmvae import CMVAE
from cmvae.models.dcmvae import DCMVAE
from cmvae.utils.seeds import derive_seed


def files(folder):
    return {
        path.name: sorted(picture.stem for picture in path.iterdir())
        for path in folder.iterdir()
        if path.is_dir()
    }


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image).transpose(2, 0, 1)


def noise(seed, *part):
    """The noise of a part of the samples."""
    return torch.Generator().manual_seed(derive_seed(seed, "generate", *part))


def as_bytes(images):
    return (images.detach().clamp(0, 1) * 255).round().byte().numpy()


def test_unconditional_generations_are_those_of_the_model(make_run, tmp_path):
    run = make_run()
    done = run_cmvae("generate", run, "--num", "5", "--seed", "3", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    out = run / "generated"
    assert str(out) in done.stdout
    assert files(out) == {name: [f"00000{i}" for i in range(5)] for name in ("m0", "m1", "m2")}
    expected = CMVAE.from_pretrained(run / "export").generate(5, generator=noise(3, 0))
    for name, images in expected.items():
        for i, image in enumerate(as_bytes(images)):
            np.testing.assert_array_equal(pixels(out / name / f"00000{i}.png"), image)
    record = json.loads((out / "generation.json").read_text())
    assert (record["num_samples"], record["seed"], record["cluster"], record["given"]) == (5, 3, None, None)
    with Image.open(out / "grid.png") as grid:
        assert min(grid.size) > 50


def test_given_modalities_make_the_others(make_run, call, tmp_path, digits_shards):
    run, out = make_run(), tmp_path / "out"
    code, _, err = call(
        "generate",
        run,
        "--given",
        "m0,m2",
        "--to",
        "m1",
        "--num",
        7,
        "--split",
        "validation",
        "--out",
        out,
    )
    assert code == 0, err
    loader = EvaluationLoader(digits_shards, split="validation", modalities=["m0", "m2"], batch_size=7)
    batch = to_device(next(iter(loader)), ShardIndex.load(digits_shards).modalities, torch.device("cpu"))
    names = [f"{i:06d}_{key}" for i, key in enumerate(batch["key"])]
    assert files(out) == {"m1": sorted(names)}
    expected = CMVAE.from_pretrained(run / "export").generate(
        given={name: batch[name] for name in ("m0", "m2")}, generator=noise(0, 0)
    )
    for name, image in zip(names, as_bytes(expected["m1"]), strict=True):
        np.testing.assert_array_equal(pixels(out / "m1" / f"{name}.png"), image)


def test_no_more_than_the_split_has(make_run, call, tmp_path, index):
    code, _, err = call(
        "generate", make_run("m0"), "--given", "m0", "--num", 100_000, "--out", tmp_path / "out"
    )
    assert code == 0, err
    names = files(tmp_path / "out")["m0"]
    assert [int(name.split("_")[0]) for name in names] == list(range(index.splits["test"].num_samples))


def test_every_cluster_that_was_kept_and_one(make_run, call, tmp_path):
    run = make_run()
    code, out, err = call("generate", run, "--cluster", "all", "--num", 2, "--out", tmp_path / "all")
    assert code == 0, err
    assert "6 samples" in out
    expected = [f"cluster-00{c}_00000{i}" for c in (1, 3, 5) for i in range(2)]
    assert files(tmp_path / "all")["m2"] == expected
    code, _, err = call("generate", run, "--cluster", 3, "--num", 2, "--out", tmp_path / "one")
    assert code == 0, err
    model = CMVAE.from_pretrained(run / "export")
    images = model.generate(2, cluster=3, generator=noise(0, 3, 0))
    written = [pixels(tmp_path / "one" / "m1" / f"cluster-003_00000{i}.png") for i in range(2)]
    np.testing.assert_array_equal(written, as_bytes(images["m1"]))


def test_what_is_there_is_only_replaced_when_asked_and_only_if_it_was_generated(make_run, call, tmp_path):
    run, out = make_run("m0"), tmp_path / "out"
    assert call("generate", run, "--num", 3, "--out", out)[0] == 0
    code, _, err = call("generate", run, "--num", 1, "--out", out)
    assert code == 2
    assert "--overwrite" in err
    assert len(files(out)["m0"]) == 3
    assert call("generate", run, "--num", 1, "--out", out, "--overwrite")[0] == 0
    assert files(out) == {"m0": ["000000"]}
    code, _, err = call("generate", run, "--num", 1, "--out", run, "--overwrite")
    assert code == 2
    assert "was not written by this command" in err
    assert (run / "export/model.safetensors").is_file()


def test_a_full_disk_leaves_earlier_generations_whole(make_run, call, tmp_path, monkeypatch):
    run, out = make_run("m0"), tmp_path / "out"
    assert call("generate", run, "--num", 3, "--out", out)[0] == 0
    before = {path: path.read_bytes() for path in out.rglob("*.png")}
    monkeypatch.setattr("cmvae.commands.generated_files._write_values", raise_no_space)
    code, _, err = call("generate", run, "--num", 3, "--seed", 1, "--out", out, "--overwrite")
    assert code == 2
    assert "No space left" in err
    assert {path: path.read_bytes() for path in out.rglob("*.png")} == before


def test_what_was_interrupted_continues_with_the_parts_that_are_there(make_run, call, tmp_path, monkeypatch):
    run, out = make_run("m0"), tmp_path / "out"
    monkeypatch.setattr(generated_files, "PART_SAMPLES", 4)
    whole = ("generate", run, "--num", 10, "--out")
    assert call(*whole, tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        # The disk is full when the third part begins.
        batches = iter([generated_files._write_values] * 2)
        patch.setattr(generated_files, "_write_values", lambda *a: next(batches, raise_no_space)(*a))
        assert call(*whole, out)[0] == 2
    assert not out.exists()
    (kept,) = tmp_path.glob(".out.*/m0/000001.png")
    kept.write_bytes(b"kept")
    code, said, err = call(*whole, out)
    assert code == 0, err
    assert "10 samples" in said
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole/m0").iterdir()}
    assert {path.name: path.read_bytes() for path in (out / "m0").iterdir()} == expected | {
        "000001.png": b"kept"
    }
    assert (out / "grid.png").read_bytes() == (tmp_path / "whole/grid.png").read_bytes()
    assert not list(tmp_path.glob(".out.*"))


def test_ranks_share_the_samples(make_run, call, tmp_path):
    run = make_run("m0")
    arguments = ("--cluster", "all", "--num", 3)
    assert call("generate", run, *arguments, "--out", tmp_path / "one")[0] == 0
    done = run_cmvae(
        "generate", run, *arguments, "--out", "two", "--launch", "ddp", "--num-processes", 2, folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "9 samples" in done.stdout
    for path in (tmp_path / "one").rglob("*.png"):
        assert (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes() == path.read_bytes()


def raise_no_space(*_):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--given", "m7"], "--given m7: the run has no such modality; it has m0, m1, m2"),
        (["--to", "m0,audio"], "--to audio: the run has no such modality"),
        (["--given", "m0", "--split", "dev"], "no split 'dev'; it has train, validation, test"),
        (["--split", "test"], "only samples for --given"),
        (["--cluster", "1", "--given", "m0"], "not allowed with"),
        (["--num", "0"], "not at least 1"),
    ],
)
def test_mistakes_are_told_before_anything_heavy_is_imported(make_run, tmp_path, arguments, expected):
    done = run_without_torch("generate", make_run(), *arguments, folder=tmp_path)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_what_only_the_export_knows_is_explained_too(make_run, call, tmp_path):
    code, _, err = call("generate", make_run(), "--cluster", 2)
    assert code == 2
    assert "--cluster 2: not one of the clusters that the selection kept: 1, 3, 5" in err
    code, _, err = call("generate", make_run(size=8), "--given", "m1")
    assert code == 2
    assert re.search(r"index\.json: modalities\.m1\.shape: \(3, 16, 16\), but .* \(3, 8, 8\)", err)
    (tmp_path / "nothing").mkdir()
    code, _, err = call("generate", tmp_path / "nothing")
    assert code == 2
    assert "config.yaml: missing" in err


def assert_nearly_equal(written, expected):
    """Equal but for rounding, which another number of threads may turn, to the next byte."""
    assert np.abs(written.astype(int) - expected.astype(int)).max() <= 1


def test_a_refiner_generates_with_its_cmvae_and_refines(make_refiner_run, call, tmp_path, digits_shards):
    run, cmvae = make_refiner_run()
    code, _, err = call("generate", run, "--num", 3, "--seed", 4, "refiner.sampler.num_steps=2")
    assert code == 0, err
    assert files(run / "generated") == {name: [f"00000{i}" for i in range(3)] for name in ("m0", "m1", "m2")}
    both = DCMVAE.from_pretrained(run / "export", cmvae / "export", sampler=SamplerConfig(num_steps=2))
    expected = both.generate(3, generator=noise(4, 0))
    blurred = both.cmvae.generate(3, generator=noise(4, 0))
    for name in ("m0", "m1", "m2"):
        written = np.stack([pixels(run / "generated" / name / f"00000{i}.png") for i in range(3)])
        assert_nearly_equal(written, as_bytes(expected[name]))
        assert np.abs(written - as_bytes(blurred[name]).astype(int)).max() > 20

    out = tmp_path / "given"
    code, _, err = call("generate", run, "--given", "m1", "--to", "m0", "--num", 4, "--out", out)
    assert code == 0, err
    batch = next(iter(EvaluationLoader(digits_shards, split="test", modalities=["m1"], batch_size=4)))
    given = {"m1": to_device(batch, ShardIndex.load(digits_shards).modalities, torch.device("cpu"))["m1"]}
    both = DCMVAE.from_pretrained(run / "export", cmvae / "export")
    expected = both.generate(given=given, generator=noise(0, 0))
    written = np.stack([pixels(path) for path in sorted((out / "m0").iterdir())])
    assert_nearly_equal(written, as_bytes(expected["m0"]))

    code, _, err = call("generate", run, "--cluster", "all", "--num", 1, "--out", tmp_path / "all")
    assert code == 0, err
    assert files(tmp_path / "all")["m2"] == [f"cluster-00{c}_000000" for c in (1, 3, 5)]


def test_a_refiner_without_its_cmvae_is_explained(make_refiner_run, make_run, call, tmp_path):
    run, cmvae = make_refiner_run()
    code, _, err = call("generate", run, "--given", "m9")
    assert code == 2
    assert "--given m9: the run has no such modality; it has m0, m1, m2" in err
    code, _, err = call("generate", run, "refiner.sampler.guidance=2")
    assert code == 2
    assert "set conditioning.dropout" in err
    code, _, err = call("generate", cmvae, f"cmvae={cmvae}")
    assert code == 2
    assert "cmvae: no such key" in err
    # Another CMVAE in the same place.
    model = CMVAE.from_pretrained(cmvae / "export")
    torch.nn.init.zeros_(model.cluster_prior.means)
    model.save_pretrained(cmvae / "export")
    code, _, err = call("generate", run, "--num", 2)
    assert code == 2
    assert "trained with the CMVAE whose weights" in err
    assert not (run / "generated").exists()
    cmvae.rename(tmp_path / "elsewhere")
    code, _, err = call("generate", run, "--num", 2)
    assert code == 2
    assert f"{cmvae}/config.yaml: missing" in err


def test_any_key_is_a_file_name():
    assert safe_name("train-000123") == "train-000123"
    for key in ("../../etc/passwd", "a b;rm *", "naïve\x00", "k" * 500, "C:\\x", "."):
        assert re.fullmatch(r"[A-Za-z0-9_-]{1,80}", safe_name(key))
