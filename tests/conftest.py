"""Fixtures that several modules share: a small packed data set and an experiment on it."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from commands import ROOT, run_command
from quadrants import Quadrants

from cmvae.config import CMVAEExperiment, load_config


def pytest_configure() -> None:
    # A shell starts background jobs with Ctrl-C ignored, and every process below them inherits that: here it
    # must have its usual effect, for the tests that send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def digits_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small part of the embedded digits, packed by the documented command."""
    folder = tmp_path_factory.mktemp("shards") / "digits"
    done = run_command(
        [
            sys.executable,
            ROOT / "tools/make_shards.py",
            "digits",
            f"--out={folder}",
            "--pairings=1",
            "--limit=160",
        ],
        ROOT,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def quadrants_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four quadrants, packed, with classifiers."""
    # Slow to import, and few tests want it.
    import torch

    from cmvae.data.writer import write_shards
    from cmvae.evaluation.classifiers import train_classifiers

    folder = tmp_path_factory.mktemp("shards") / "quadrants"
    write_shards(Quadrants(), folder)
    train_classifiers(folder, device=torch.device("cpu"), width=4, epochs=12)
    return folder


@pytest.fixture
def experiment_file(tmp_path: Path, digits_shards: Path) -> Path:
    """A YAML file of a training that takes seconds: tiny networks, three modalities, no tracking."""
    settings = yaml.safe_load((ROOT / "configs/digits.yaml").read_text())
    settings["data"] = {"shards": str(digits_shards), "num_workers": 0}
    settings["output_dir"] = str(tmp_path / "run")
    settings["model"] |= {"shared_dim": 4, "private_dim": 4, "num_clusters": 6}
    for modality in settings["model"]["modalities"].values():
        modality["width"] = 2
    # Constant, so that how long a run is to be does not change how it begins.
    settings["optimizer"] = {"learning_rate": 0.002}
    settings["train"] = {"batch_size": 16, "max_steps": 6, "log_every": 2, "checkpoint_every": 3}
    settings["evaluation"] = {"batch_size": 32, "map_samples": 50}
    settings["tracking"] = {"enabled": False}
    path = tmp_path / "experiment.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def experiment(experiment_file: Path) -> Callable[..., CMVAEExperiment]:
    """`experiment("train.max_steps=3")` is the experiment of `experiment_file` with overrides."""
    return lambda *overrides: load_config(experiment_file, overrides)
