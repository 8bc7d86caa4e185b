"""The wheel, installed into an empty environment and used outside of the checkout."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT, run_command

Run = Callable[..., subprocess.CompletedProcess[str]]
# Neither an index nor a build environment: what is installed here is used.
OFFLINE = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-build-isolation"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy, which keeps build/ out of the checkout."""
    copy = tmp_path_factory.mktemp("wheel") / "checkout"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("cmvae", "configs", "tools", "launch", "tests"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", *OFFLINE, "--wheel-dir", copy.parent, copy]
    done = run_command(command, copy.parent)
    assert done.returncode == 0, done.stderr
    (path,) = copy.parent.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> tuple[Run, Path]:
    """`run("cmvae", …)` runs a program of the new environment in an empty folder; and that folder."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=False)
    python = environment / "bin/python"
    command = [sys.executable, "-m", "pip", "--python", python, "install", *OFFLINE, "--no-compile", wheel]
    done = run_command(command, environment)
    assert done.returncode == 0, done.stderr
    # The dependencies are those of this environment. Its own .pth files, with the checkout, are not read.
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (own,) = (environment / "lib").glob("python*/site-packages")
    (own / "dependencies.pth").write_text("\n".join(packages))
    folder = tmp_path_factory.mktemp("elsewhere")

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        done = run_command([environment / "bin" / program, *arguments], folder)
        assert done.returncode == 0, done.stderr
        return done

    where = run("python", "-c", "import cmvae; print(cmvae.__file__)").stdout.strip()
    assert Path(where).is_relative_to(own)
    return run, folder


def test_the_wheel_holds_the_package_and_its_data_alone(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {
        "cmvae",
        f"cmvae-{wheel.name.split('-')[1]}.dist-info",
    }
    assert "cmvae/py.typed" in names
    shipped = {name.removeprefix("cmvae/") for name in names if name.startswith("cmvae/configs/")}
    assert shipped == {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.*")}


def test_packing_training_evaluating_and_clustering_outside_of_the_checkout(installed):
    run, folder = installed
    packed = run("cmvae", "pack", "digits", "--out", "shards/digits", "--pairings=1", "--limit=60")
    assert "cmvae train digits data.shards=shards/digits" in packed.stdout
    widths = [f"model.modalities.{name}.width=2" for name in ("m0", "m1", "m2")]
    run(
        "cmvae",
        "train",
        "digits",
        *widths,
        "train.max_steps=4",
        "train.batch_size=16",
        "tracking.enabled=false",
    )
    run("cmvae", "evaluate", "runs/digits", "metrics=[clustering]")
    metrics = json.loads((folder / "runs/digits/evaluation/metrics.json").read_text())
    assert 0 < metrics["clustering/acc"] <= 1
    run("cmvae", "cluster", "runs/digits", "shards/digits", "--out", "clusters.csv")
    with (folder / "clusters.csv").open(newline="") as file:
        assert len({row["key"] for row in csv.DictReader(file)}) == 120
    loaded = run(
        "python", "-c", "from cmvae import CMVAE; print(CMVAE.from_pretrained('runs/digits/export'))"
    )
    assert loaded.stdout.startswith("CMVAE(")


def test_the_readmes_estimator_fits_outside_of_the_checkout(installed):
    run, folder = installed
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = [block for block in blocks if "MultimodalClusterer" in block]
    short = "settings={'train.max_steps': 3, 'train.batch_size': 8}, verbose=False"
    program = f"""
import numpy as np
import pandas as pd
rng = np.random.default_rng(0)
images = rng.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8)
sentences = ["a red bird", None, "a small blue bird"] * 10
frame = pd.DataFrame({{"w": rng.normal(size=30), "h": [np.nan, *range(29)]}})
new_data = {{"photo": images[:4], "size": frame[["w", "h"]][:4]}}
{block.replace("seed=0", f"seed=0, {short}")}
assert labels.shape == (4,)
loaded = MultimodalClusterer.from_pretrained("birds")
assert (loaded.predict(new_data) == labels).all()
"""
    assert short in program
    run("python", "-c", program)
    assert (folder / "birds" / "model.safetensors").is_file()
