from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from cmvae.evaluation.report import GroupResult, format_report, format_table, write_report
from cmvae.utils.errors import UserError

METRICS = {"clustering/num_clusters": 11.0, "clustering/acc": np.float32(0.5), "clustering/ari": 1.0}


def draw(width: float) -> Figure:
    return Figure(figsize=(width, 1), dpi=50)


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


def test_a_report_can_be_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "evaluation"
    left_out = {"fid": "no weights"}
    write_report(folder, GroupResult(METRICS, {"selection": draw(2)}, {"seed": 3}, left_out))
    metrics = read(folder, "metrics.json")
    assert metrics == {"clustering/acc": 0.5, "clustering/ari": 1.0, "clustering/num_clusters": 11.0}
    assert list(metrics) == sorted(metrics)
    assert read(folder, "protocol.json") == {"seed": 3, "left_out": left_out}
    assert Image.open(folder / "figures" / "selection.png").size == (100, 50)
    assert sorted(path.name for path in folder.iterdir()) == ["figures", "metrics.json", "protocol.json"]


def test_texts_are_files_of_their_own(tmp_path: Path) -> None:
    write_report(tmp_path / "evaluation", GroupResult(METRICS, texts={"captions": "ein Vögelchen\n"}))
    path = tmp_path / "evaluation" / "texts" / "captions.txt"
    assert path.read_text(encoding="utf-8") == "ein Vögelchen\n"


def test_a_second_evaluation_takes_the_place_of_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    write_report(folder, GroupResult(METRICS, {"map": draw(2), "old": draw(2)}))
    write_report(folder, GroupResult({"clustering/acc": 0.75}, {"map": draw(1)}))
    assert read(folder, "metrics.json") == {"clustering/acc": 0.75}
    assert [path.name for path in (folder / "figures").iterdir()] == ["map.png"]
    assert Image.open(folder / "figures" / "map.png").size == (50, 50)


def test_a_metric_that_is_not_finite_is_named_and_spoils_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "evaluation"
    write_report(folder, GroupResult(METRICS))
    with pytest.raises(ValueError, match="clustering/nmi"):
        write_report(folder, GroupResult({"clustering/nmi": float("nan"), "clustering/acc": 0.1}))
    assert read(folder, "metrics.json")["clustering/acc"] == 0.5


def test_a_disk_that_fills_up_while_drawing_leaves_what_was_there(tmp_path: Path) -> None:
    class NoRoom(Figure):
        def savefig(self, path: Path, **settings: object) -> None:
            Path(path).write_bytes(b"half a pict")
            raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "evaluation"
    write_report(folder, GroupResult(METRICS, {"map": draw(2)}))
    with pytest.raises(UserError, match=r"evaluation: cannot be written \(No space left on device\)"):
        write_report(folder, GroupResult({"clustering/acc": 0.1}, {"map": NoRoom()}))
    assert read(folder, "metrics.json")["clustering/acc"] == 0.5
    assert Image.open(folder / "figures" / "map.png").size == (100, 50)


def test_the_table_is_sorted_and_aligned() -> None:
    assert format_table(METRICS).splitlines() == [
        "clustering/acc               0.5000",
        "clustering/ari               1.0000",
        "clustering/num_clusters          11",
    ]
    assert format_table({}) == ""


def test_what_was_left_out_is_told_with_its_reason() -> None:
    report = format_report(GroupResult({"clustering/acc": 0.5}, left_out={"fid": "no weights"}))
    assert report.splitlines() == ["clustering/acc      0.5000", "left out: fid: no weights"]


def test_a_figure_that_cannot_be_drawn_is_left_out_with_a_warning(tmp_path, caplog):
    class Broken(Figure):
        def savefig(self, path, **settings):
            path.write_bytes(b"half of it")
            raise ValueError("$ is no formula")

    result = GroupResult({"clustering/acc": 0.5}, {"map": draw(1), "tree": Broken()})
    result.draw("curves", lambda: 1 / 0)
    write_report(tmp_path / "evaluation", result)
    assert [path.name for path in (tmp_path / "evaluation" / "figures").iterdir()] == ["map.png"]
    assert json.loads((tmp_path / "evaluation" / "metrics.json").read_text()) == {"clustering/acc": 0.5}
    left_out = json.loads((tmp_path / "evaluation" / "protocol.json").read_text())["left_out"]
    assert set(left_out) == {"figures/tree", "figures/curves"}
    assert [("tree" in r.message, "curves" in r.message) for r in caplog.records] == [
        (False, True),
        (True, False),
    ]
