"""A run with an untrained export, and the commands called in this process."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import run_cmvae
from new_rows import FLAGS, SETTINGS, make_rows
from packing import write_csv
from refining import make_refiner

from cmvae.commands.__main__ import main
from cmvae.config import ModalityConfig, ModelConfig, RefinerExperiment, save_config
from cmvae.data.index import ShardIndex
from cmvae.modalities import ImageModality
from cmvae.models.cmvae import CMVAE
from cmvae.models.export import weights_sha256


@pytest.fixture
def make_run(experiment, digits_shards, tmp_path) -> Callable[..., Path]:
    """`make_run("m0", "x0")` is the folder of a run with these modalities; of six clusters 1, 3, 5 are kept.

    Modalities that the digits do not have are as theirs; `size` is height and width of all of them.
    """

    def make(*modalities: str, size: int = 16) -> Path:
        torch.manual_seed(0)
        names = modalities or ("m0", "m1", "m2")
        settings = experiment("data.shards=" + str(digits_shards))
        model_config = ModelConfig(
            shared_dim=4,
            private_dim=4,
            num_clusters=6,
            modalities={n: ModalityConfig(width=2) for n in names},
        )
        modality = ImageModality(shape=(3, size, size))
        model = CMVAE(model_config, dict.fromkeys(names, modality))
        model.cluster_prior.active.copy_(torch.tensor([0, 1, 0, 1, 0, 1], dtype=torch.bool))
        run = tmp_path / "runs" / "-".join([*names, str(size)])
        model.save_pretrained(run / "export")
        save_config(settings.model_copy(update={"model": model_config}), run / "config.yaml")
        return run

    return make


@pytest.fixture
def make_refiner_run(make_run, experiment, tmp_path) -> Callable[..., tuple[Path, Path]]:
    """`make_refiner_run()` is the folder of an untrained refiner's run, and that of its CMVAE."""

    def make() -> tuple[Path, Path]:
        cmvae, run = make_run(), tmp_path / "runs" / "refiner"
        modalities = CMVAE.from_pretrained(cmvae / "export").modalities
        refiner = make_refiner(modalities, weights_sha256(cmvae / "export"), conditioning={"latent": True})
        settings = {key: getattr(experiment(), key) for key in ("data", "train", "evaluation", "tracking")}
        config = RefinerExperiment(
            name="refiner", output_dir=run, cmvae=cmvae, refiner=refiner.config, **settings
        )
        refiner.save_pretrained(run / "export")
        save_config(config, run / "config.yaml")
        return run, cmvae

    return make


@pytest.fixture
def call(capsys, monkeypatch) -> Callable[..., tuple[int, str, str]]:
    """`call("cluster", …)` is `cmvae cluster …` in this process: exit code, standard output and error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cmvae", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return int(end.value.code or 0), out, err

    return run


@pytest.fixture
def index(digits_shards) -> ShardIndex:
    return ShardIndex.load(digits_shards)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with base.csv, shards/base and a run of a few steps, runs/base."""
    folder = tmp_path_factory.mktemp("rows")
    write_csv(folder / "base.csv", make_rows(90, folder))
    done = run_cmvae(
        "pack", "table", "base.csv", "--out", "shards/base", "--config", "base.yaml", *FLAGS, folder=folder
    )
    assert done.returncode == 0, done.stderr
    done = run_cmvae("train", "base.yaml", *SETTINGS, folder=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(trained):
    return trained / "runs/base"


@pytest.fixture
def table(trained, tmp_path):
    """`table(rows)` is the path of a CSV file of these rows, beside the photos."""
    shutil.copytree(trained / "photos", tmp_path / "photos")
    return lambda rows, name="new.csv": write_csv(tmp_path / name, rows)
