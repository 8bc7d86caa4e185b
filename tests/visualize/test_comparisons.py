from __future__ import annotations

import numpy as np
import pytest

from cmvae.visualize.comparisons import metric_comparison, metrics_along


def test_a_comparison_shows_every_repeat_and_their_spread() -> None:
    groups = {
        "a": {"clustering/acc": [0.5, 0.7, 0.9], "probe/z/m0": [1.0]},
        "b": {"clustering/acc": [0.6], "likelihood/joint": [-3.0, -5.0]},
    }
    figure = metric_comparison(groups)
    figure.canvas.draw()
    panels = {ax.get_title(loc="left"): ax for ax in figure.axes if ax.get_visible()}
    assert list(panels) == ["clustering/acc", "likelihood/joint"]
    acc = panels["clustering/acc"]
    points = [line.get_xydata().tolist() for line in acc.lines if line.get_marker() == "o"]
    assert points == [[[0.5, 0], [0.7, 0], [0.9, 0]], [[0.6, 1]]]
    means = [container.lines[0].get_xydata().tolist() for container in acc.containers]
    np.testing.assert_allclose(means, [[[0.7, 0]], [[0.6, 1]]])
    (bar,) = acc.containers[0].lines[2][0].get_segments()
    assert bar[:, 0] == pytest.approx([0.5, 0.9])
    assert [label.get_text() for label in acc.get_yticklabels()] == ["a", "b"]
    (ax,) = metric_comparison(groups, ["likelihood/joint"]).axes
    assert ax.get_title(loc="left") == "likelihood/joint"
    # What is no main metric is only drawn when there is nothing else.
    (ax,) = metric_comparison({"a": {"probe/z/m0": [1.0]}}).axes
    assert ax.get_title(loc="left") == "probe/z/m0"


def test_metrics_along_a_setting_are_lines_through_the_means() -> None:
    groups = {
        0.5: {"clustering/acc": [0.6], "clustering/nmi": [0.5]},
        0.0: {"clustering/acc": [0.8, 0.9, 1.0]},
        0.2: {"clustering/acc": [0.7, 0.9]},
    }
    figure = metrics_along(groups, "missing", ["clustering/nmi", "clustering/acc"])
    figure.canvas.draw()
    nmi, acc = (ax for ax in figure.axes if ax.get_visible())
    assert [ax.get_title(loc="left") for ax in (nmi, acc)] == ["clustering/nmi", "clustering/acc"]
    assert acc.get_xlabel() == "missing"
    (line,) = acc.containers
    np.testing.assert_allclose(line.lines[0].get_xydata(), [[0, 0.9], [0.2, 0.8], [0.5, 0.6]])
    bars = [bar[:, 1].tolist() for bar in line.lines[2][0].get_segments()]
    np.testing.assert_allclose(bars, [[0.8, 1.0], [0.8 - 0.02**0.5, 0.8 + 0.02**0.5], [0.6, 0.6]])
    points = [dots.get_xydata().tolist() for dots in acc.lines if dots.get_marker() == "o"]
    assert points == [[[0, 0.8], [0, 0.9], [0, 1]], [[0.2, 0.7], [0.2, 0.9]], [[0.5, 0.6]]]
    (only,) = nmi.containers
    np.testing.assert_allclose(only.lines[0].get_xydata(), [[0.5, 0.5]])
