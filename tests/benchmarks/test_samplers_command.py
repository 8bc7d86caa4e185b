"""`tools/benchmarks/samplers.py` on an untrained pair."""

from __future__ import annotations

import json
import runpy
import shutil
import sys

import pytest
import yaml
from commands import ROOT, run_tool
from refiner_run import write_refiner_run

from cmvae.models.refiner import Refiner


@pytest.fixture
def folder(tmp_path, quadrants_shards):
    """Where `refiner` and `cmvae` are."""
    write_refiner_run(tmp_path, quadrants_shards, num_generated=40)
    return tmp_path


@pytest.fixture
def call(capsys, monkeypatch):
    """`call(…)` is the tool's exit code, standard output and error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["benchmarks/samplers.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "tools/benchmarks/samplers.py"), run_name="__main__")
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return end.value.code, out, err

    return run


def rows(text):
    """Cells of every row of the table, by the first one."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    return {row[0]: row[1:] for row in cells}


def test_a_table_and_a_record(call, folder):
    out = folder / "out.json"
    code, printed, err = call(
        folder / "refiner", "num_steps=1", "name=ddim,num_steps=3", "num_steps=1,start=1.0", "--num", 40,
        "--out", out,
    )  # fmt: skip
    assert code == 0, err
    # The third is the first.
    titles = ["real train images", "CMVAE alone", "dpm_solver, 1 step", "ddim, 3 steps"]
    cells = rows(printed)
    assert [title for title in cells if title != "sampler" and set(title) != {"-"}] == titles
    assert len({len(line) for line in printed.splitlines() if line.startswith("|")}) == 1

    record = json.loads(out.read_text())
    assert (record["num_samples"], record["evaluation"]["num_generated"]) == (40, 40)
    assert [m["title"] for m in record["measurements"]] == titles
    metrics = record["measurements"][-1]["metrics"]
    assert cells["ddim, 3 steps"][:5] == [
        f"{metrics[key]:.4f}"
        for key in (
            "frechet/classifier/unconditional",
            "frechet/classifier/conditional",
            "frechet/classifier/conditional_cross",
            "coherence/conditional",
            "coherence/unconditional",
        )
    ]
    assert cells["real train images"][3:5] == ["–", "–"]


def test_an_interrupted_run_has_shown_what_it_measured(call, folder, monkeypatch):
    refine = Refiner.refine

    def interrupt(self, *arguments, **settings):
        if self.config.sampler.num_steps == 3:
            raise KeyboardInterrupt
        return refine(self, *arguments, **settings)

    monkeypatch.setattr(Refiner, "refine", interrupt)
    code, out, _ = call(
        folder / "refiner", "num_steps=1", "num_steps=3", "--out", folder / "out.json", "--num", 40
    )
    assert code == 130
    assert "\ndpm_solver, 1 step: distance: uncond. " in out
    assert "dpm_solver, 3 steps" not in out
    assert not (folder / "out.json").exists()


def test_shards_without_classifiers_are_refused_with_the_command(call, folder, quadrants_shards, tmp_path):
    shards = shutil.copytree(quadrants_shards, tmp_path / "shards")
    index = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps({**index, "classifiers": {}}))
    path = folder / "refiner/config.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), "data": {"shards": str(shards)}}))
    code, out, err = call(folder / "refiner", "num_steps=1")
    assert code == 2
    assert "error: " in err
    assert f"cmvae classifiers {shards}" in err
    assert out == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("cmvae", "num_steps=1"), "cmvae: is the run of a CMVAE, which has no sampler"),
        (("nothing", "num_steps=1"), "nothing is no run"),
        (("refiner", "num_step=1"), "refiner.sampler.num_step: no such key; did you mean 'num_steps'?"),
        (("refiner", "num_steps"), "write key=value"),
        (("refiner", "num_steps=few"), "refiner.sampler.num_steps: 'few' does not fit"),
        (("refiner", "name=euler"), "refiner.sampler.name: 'euler' does not fit"),
        (("refiner", "num_steps=5", "num_steps=21"), "only 20 time steps to take"),
        (("refiner", "start=0.1,num_steps=3"), "only 2 time steps to take"),
        (
            ("refiner", "num_steps=1", "--out", "none/out.json"),
            "--out none/out.json: there is no folder none",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(call, folder, monkeypatch, arguments, expected):
    monkeypatch.chdir(folder)
    code, out, err = call(*arguments)
    assert code == 2
    assert err.startswith("error: ")
    assert expected in err
    assert out == ""


def test_guidance_takes_a_refiner_that_has_learned_it(folder):
    path = folder / "refiner/config.yaml"
    path.write_text(path.read_text().replace("dropout: 0.1", "dropout: 0.0"))
    # As a user starts it, from another folder and without the library on the path.
    done = run_tool("benchmarks/samplers.py", "refiner", "guidance=2", folder=folder)
    assert done.returncode == 2
    assert "set conditioning.dropout" in done.stderr
    assert "Traceback" not in done.stderr
