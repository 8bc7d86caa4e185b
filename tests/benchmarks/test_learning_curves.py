"""tools/benchmarks/learning_curves.py on runs of which MLflow knows the validations."""

import json
import runpy
import sys

import pytest
from commands import ROOT
from mlflow import MlflowClient


def test_curves_are_drawn_against_hours_and_a_run_without_any_is_named(tmp_path, monkeypatch, capsys):
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    tool = runpy.run_path(str(ROOT / "tools/benchmarks/learning_curves.py"))
    experiment = client.create_experiment("test")
    for name in ("a", "b"):
        run = client.create_run(experiment, start_time=1_000_000)
        if name == "a":
            for metric in tool["METRICS"]:
                for step, value in ((1, 0.3), (2, 0.9)):
                    client.log_metric(run.info.run_id, metric, value, 1_000_000 + 1_800_000 * step, step)
        (tmp_path / name).mkdir()
        record = {"tracking_uri": client.tracking_uri, "run_id": run.info.run_id}
        (tmp_path / name / "mlflow.json").write_text(json.dumps(record))
    assert tool["read_hours"](tmp_path / "a", next(iter(tool["METRICS"]))) == [(0.5, 0.3), (1.0, 0.9)]
    for runs, code in ((["a"], 0), (["a", "b"], 2)):
        out = tmp_path / f"{code}.png"
        folders = [str(tmp_path / run) for run in runs]
        monkeypatch.setattr(sys, "argv", ["learning_curves.py", *folders, f"--out={out}"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools/benchmarks/learning_curves.py"), run_name="__main__")
        assert ended.value.code == code
        assert out.is_file() == (code == 0)
    assert "b: no metric 'validation/coherence/conditional'" in capsys.readouterr().err
