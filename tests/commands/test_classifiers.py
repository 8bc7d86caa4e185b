"""`cmvae classifiers`: exit codes, messages, what is written."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from commands import run_cmvae

from cmvae.data.index import ShardIndex
from cmvae.evaluation.classifiers import load_classifiers
from cmvae.utils.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_shards) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Far too short a training, so that what it is worth must be said."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copytree(digits_shards, folder / "digits")
    return folder, run_cmvae("classifiers", "digits", "--epochs", 2, "--width", 2, folder=folder)


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
    with pytest.raises(UserError, match="has an accuracy of"):
        load_classifiers(folder / "digits", index, ["m0"], torch.device("cpu"))


def test_inspection_shows_the_accuracy_and_still_verifies(trained):
    folder, _ = trained
    result = run_cmvae("inspect", "digits", folder=folder)
    assert result.returncode == 0, result.stderr
    accuracy = ShardIndex.load(folder / "digits").classifiers["m1"].accuracy
    assert f"classifier of m1: {accuracy:.1%} right on test" in result.stdout


def test_mistakes_are_explained_without_a_traceback(tmp_path, trained, digits_shards):
    result = run_cmvae("classifiers", "nothing", folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("error: nothing: no such shard folder")
    assert run_cmvae("classifiers", "nothing", "--epochs", 0, folder=tmp_path).returncode == 2
    unlabelled = shutil.copytree(digits_shards, tmp_path / "unlabelled")
    index = json.loads((unlabelled / "index.json").read_text()) | {"class_names": None}
    (unlabelled / "index.json").write_text(json.dumps(index))
    result = run_cmvae("classifiers", "unlabelled", folder=tmp_path)
    assert result.returncode == 2
    assert "error: unlabelled: has no labels" in result.stderr
    assert "Traceback" not in result.stderr
