"""tools/benchmarks/draw_curves.py on runs of which MLflow knows two points."""

import json
import runpy
import sys

import pytest
from commands import ROOT, run_tool
from mlflow import MlflowClient


@pytest.fixture
def make_run(tmp_path):
    """`make_run("a", [1.0, 2.0])` is a tracked run with these points of train/bound."""
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.create_experiment("test")

    def make(name, values):
        run_id = client.create_run(experiment).info.run_id
        for step, value in enumerate(values, start=1):
            client.log_metric(run_id, "train/bound", value, step=step)
        (tmp_path / name).mkdir()
        record = {"tracking_uri": client.tracking_uri, "run_id": run_id}
        (tmp_path / name / "mlflow.json").write_text(json.dumps(record))
        return tmp_path / name

    return make


def test_curves_are_drawn_and_compared_and_what_is_missing_is_named(make_run, tmp_path, monkeypatch, capsys):
    first, second, short = make_run("a", [-100, -50]), make_run("b", [-100, -49]), make_run("c", [-100])
    done = run_tool("benchmarks/draw_curves.py", first, second, "--out=both.png", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "b − a: at most 1.00e+00, 2.0e-02 of the value, at step 2" in done.stdout
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    for runs, message in (
        ([first, short], "c: has other steps than a"),
        ([first, tmp_path / "untracked"], "untracked/mlflow.json: missing"),
        ([first, second, "--metric=train/none"], "a: no metric 'train/none'"),
    ):
        # In this process: each new one would import MLflow again.
        arguments = ["draw_curves.py", *map(str, runs), f"--out={tmp_path / 'none.png'}"]
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools/benchmarks/draw_curves.py"), run_name="__main__")
        assert ended.value.code == 2
        assert message in capsys.readouterr().err
