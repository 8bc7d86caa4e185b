from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cmvae.evaluation.report import format_table, write_report

METRICS = {"clustering/num_clusters": 11.0, "clustering/acc": np.float32(0.5), "clustering/ari": 1.0}


def test_a_report_can_be_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "evaluation"
    write_report(folder, METRICS, {"selection": Figure(figsize=(2, 1), dpi=50)})
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics == {"clustering/acc": 0.5, "clustering/ari": 1.0, "clustering/num_clusters": 11.0}
    assert list(metrics) == sorted(metrics)
    assert Image.open(folder / "figures" / "selection.png").size == (100, 50)
    assert sorted(path.name for path in folder.iterdir()) == ["figures", "metrics.json"]


def test_a_second_evaluation_replaces_the_first(tmp_path: Path) -> None:
    write_report(tmp_path, METRICS, {"map": Figure(figsize=(2, 1), dpi=50)})
    write_report(tmp_path, {"clustering/acc": 0.75}, {"map": Figure(figsize=(1, 1), dpi=50)})
    assert json.loads((tmp_path / "metrics.json").read_text()) == {"clustering/acc": 0.75}
    assert Image.open(tmp_path / "figures" / "map.png").size == (50, 50)


def test_a_metric_that_is_not_finite_is_named_and_spoils_nothing(tmp_path: Path) -> None:
    write_report(tmp_path, METRICS, {})
    with pytest.raises(ValueError, match="clustering/nmi"):
        write_report(tmp_path, {"clustering/nmi": float("nan"), "clustering/acc": 0.1}, {})
    assert json.loads((tmp_path / "metrics.json").read_text())["clustering/acc"] == 0.5


def test_the_table_is_sorted_and_aligned() -> None:
    assert format_table(METRICS).splitlines() == [
        "clustering/acc               0.5000",
        "clustering/ari               1.0000",
        "clustering/num_clusters          11",
    ]
    assert format_table({}) == ""
