"""Fixtures that several modules share: a small packed data set and an experiment on it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from commands import ROOT, run_command
from handmade_shards import write_tar
from quadrants import Quadrants

from cmvae.config import CMVAEExperiment, RefinerExperiment, load_config, save_config
from cmvae.data.index import ShardIndex

# Networks this small gain nothing from a second thread, and where something else runs on its core they wait
# for it at every operation: forty times as long. Set before torch is imported, which reads it then.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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


@pytest.fixture
def damaged_shards(tmp_path: Path, digits_shards: Path) -> Path:
    """The digits, three images of the train split replaced by as many bytes that are no PNG."""
    folder = tmp_path / "damaged"
    shutil.copytree(digits_shards, folder)
    shard = folder / json.loads((folder / "index.json").read_text())["splits"]["train"]["shards"][0]["name"]
    with tarfile.open(shard) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar.getmembers()]
    spoilt = [n for n, (name, _) in enumerate(members) if name.endswith(".m1.png")][:3]
    for place in spoilt:
        name, content = members[place]
        members[place] = (name, b"x" * len(content))
    size = shard.stat().st_size
    shard.chmod(0o644)
    write_tar(shard, members)
    assert shard.stat().st_size == size
    return folder


@pytest.fixture(scope="session")
def quadrants_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four quadrants, packed, with classifiers."""
    # Slow to import, and few tests want it.
    import torch

    from cmvae.datasets.writer import write_shards
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
    # The published objective and selection; what is built on them is asked for where it is tested.
    del settings["model"]["assign_by"], settings["objective"]["alignment"], settings["clusters"]
    for modality in settings["model"]["modalities"].values():
        modality |= {"width": 2, "network": "resnet"}
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


@pytest.fixture
def make_cmvae_run(experiment: Callable[..., CMVAEExperiment], tmp_path: Path) -> Callable[..., Path]:
    """`make_cmvae_run("data.shards=…", seed=1)` is the folder of a CMVAE's run with an untrained export."""
    import torch

    from cmvae.models.cmvae import CMVAE

    def make(*overrides: str, seed: int = 0, folder: Path = tmp_path / "cmvae") -> Path:
        config = experiment(*overrides, f"output_dir={folder}")
        torch.manual_seed(seed)
        CMVAE(config.model, ShardIndex.load(config.data.shards).modalities).save_pretrained(folder / "export")
        save_config(config, folder / "config.yaml")
        return folder

    return make


@pytest.fixture
def refiner_file(tmp_path: Path, digits_shards: Path, make_cmvae_run: Callable[..., Path]) -> Path:
    """A YAML file of a refiner's training that takes seconds, of a CMVAE that has learned nothing."""
    settings = yaml.safe_load((ROOT / "configs/digits_refiner.yaml").read_text())
    settings["cmvae"] = str(make_cmvae_run())
    settings["data"] = {"shards": str(digits_shards), "num_workers": 0}
    settings["output_dir"] = str(tmp_path / "refiner")
    # With dropout: what draws for it out of turn shows.
    settings["refiner"]["network"] = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "dropout": 0.1}
    settings["refiner"]["diffusion"] |= {"num_timesteps": 20}
    settings["refiner"]["sampler"] = {"num_steps": 2}
    settings["optimizer"] = {"learning_rate": 0.002}
    settings["train"] = {"batch_size": 16, "max_steps": 6, "checkpoint_every": 3, "ema_decay": 0.9}
    settings["evaluation"] = {"batch_size": 32, "map_samples": 50}
    settings["tracking"] = {"enabled": False}
    path = tmp_path / "refiner.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def refiner_experiment(refiner_file: Path) -> Callable[..., RefinerExperiment]:
    """`refiner_experiment("train.max_steps=3")` is the experiment of `refiner_file` with overrides."""
    return lambda *overrides: load_config(refiner_file, overrides)
