"""Training classifiers and comparing folders as a user does: exit codes, messages, what is written."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import ROOT, run_tool
from PIL import Image

from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.evaluation.classifiers import load_classifiers
from cmvae.utils.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_shards) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Far too short a training, so that what it is worth must be said."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(digits_shards, folder / "digits")
    return folder, run_tool("train_classifiers.py", "digits", "--epochs", 2, "--width", 2, folder=folder)


def test_training_prints_and_saves_what_each_classifier_is_worth(trained, digits_shards):
    folder, result = trained
    assert result.returncode == 0, result.stderr
    index = ShardIndex.load(folder / "digits")
    assert index.model_copy(update={"classifiers": {}}) == ShardIndex.load(digits_shards)
    assert list(index.classifiers) == ["m0", "m1", "m2"]
    rows = {line.split()[0]: line for line in result.stdout.splitlines()}
    for name, entry in index.classifiers.items():
        assert (folder / "digits" / entry.file).is_file()
        assert entry.width == entry.epochs == 2
        assert f"{entry.accuracy:.1%}" in rows[name]
        assert "below 80%: evaluation will refuse it" in rows[name]
    with pytest.raises(UserError, match="reads only"):
        load_classifiers(folder / "digits", index, ["m0"], torch.device("cpu"))


def test_inspection_shows_the_accuracy_and_still_verifies(trained):
    folder, _ = trained
    result = run_tool("inspect_shards.py", "digits", folder=folder)
    assert result.returncode == 0, result.stderr
    accuracy = ShardIndex.load(folder / "digits").classifiers["m1"].accuracy
    assert f"classifier of m1: {accuracy:.1%} right on test" in result.stdout


def test_mistakes_are_explained_without_a_traceback(tmp_path, trained, digits_shards):
    result = run_tool("train_classifiers.py", "nothing", folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: nothing: no such shard folder")
    assert run_tool("train_classifiers.py", "nothing", "--epochs", 0, folder=tmp_path).returncode == 2
    unlabelled = shutil.copytree(digits_shards, tmp_path / "unlabelled")
    index = json.loads((unlabelled / "index.json").read_text()) | {"class_names": None}
    (unlabelled / "index.json").write_text(json.dumps(index))
    result = run_tool("train_classifiers.py", "unlabelled", folder=tmp_path)
    assert result.returncode == 2
    assert "error: unlabelled: has no labels" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def frechet(monkeypatch, capsys):
    """tools/frechet.py in this process, where torch is imported already: exit code, output, errors."""

    def call(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["frechet.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools" / "frechet.py"), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    return call


def test_folders_are_compared_in_the_features_of_a_classifier(quadrants_shards, tmp_path, frechet, caplog):
    (batch,) = EvaluationLoader(quadrants_shards, split="test", modalities=["m0"], batch_size=90)
    for name, images in (("same", batch["m0"]), ("dark", batch["m0"] // 4)):
        (tmp_path / name).mkdir()
        pixels = np.ascontiguousarray(images.numpy().transpose(0, 2, 3, 1))
        for key, image in zip(batch["key"], pixels, strict=True):
            Image.fromarray(image).save(tmp_path / name / f"{key}.png")
    same, dark = tmp_path / "same", tmp_path / "dark"
    flags = ["--classifier", quadrants_shards, "--modality", "m0"]

    distances = []
    for folder in (same, dark):
        code, output, _ = frechet(folder, quadrants_shards, *flags)
        assert code == 0
        text, _, number = output.strip().rpartition(": ")
        assert text == "Fréchet distance in classifier features"
        distances.append(float(number))
    assert distances[0] == pytest.approx(0, abs=1e-3)
    assert distances[1] > 1
    assert "90 samples for 32 features" in caplog.text

    Image.new("RGB", (9, 8)).save(dark / "zebra.png")
    for arguments, reason in (
        ([dark, same, *flags], "zebra.png: is 8×9"),
        ([same, same, "--classifier", quadrants_shards], "needs --modality"),
        ([tmp_path / "nothing", same, *flags], "nothing: no such folder"),
    ):
        code, _, errors = frechet(*arguments)
        assert code == 2
        assert errors.startswith("error: ")
        assert reason in errors


def test_pictures_of_another_size_than_the_classifier_reads_are_refused(quadrants_shards, tmp_path, frechet):
    Image.new("RGB", (8, 9)).save(tmp_path / "a.png")
    code, _, errors = frechet(tmp_path, tmp_path, "--classifier", quadrants_shards, "--modality", "m0")
    assert code == 2
    assert "pictures are 9×8, but the classifier of m0 reads 8×8" in errors
