from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from sklearn.datasets import make_blobs

from cmvae.clustering import Selection, clustering_metrics
from cmvae.evaluation.figures import (
    confusion_matrix,
    cross_modal_grid,
    latent_map,
    metric_comparison,
    project_2d,
    sample_rows,
    selection_curve,
)


def pictures(figure: Figure) -> list[np.ndarray]:
    figure.canvas.draw()
    return [np.asarray(ax.images[0].get_array()) for ax in figure.axes]


@pytest.mark.parametrize(("num_modalities", "channels", "size"), [(3, 3, 16), (5, 3, 28), (2, 1, 28)])
def test_cross_modal_grid_puts_each_pair_in_its_place(num_modalities: int, channels: int, size: int) -> None:
    names = [f"m{m}" for m in range(num_modalities)]
    shape = (4, channels, size, size)
    inputs = {name: np.full(shape, 0.5 + 0.1 * m) for m, name in enumerate(names)}
    generated = {
        (source, target): np.full(shape, (i * num_modalities + j) / num_modalities**2)
        for i, source in enumerate(names)
        for j, target in enumerate(names)
    }
    rows = iter(pictures(cross_modal_grid(inputs, generated)))
    # Axes run row by row: first the inputs, then one row a source.
    for name in names:
        assert next(rows)[1, 1, 0] == pytest.approx(inputs[name].flat[0])
    for source in names:
        for target in names:
            picture = next(rows)
            assert picture.shape == (size + 2, 4 * (size + 1) + 1, 3)
            assert picture[size, size] == pytest.approx(generated[source, target].flat[0])


def test_images_are_clipped_and_keep_their_orientation() -> None:
    image = np.zeros((1, 3, 4, 6))
    image[0, 0, 0, :] = 7.0
    image[0, 2, :, 5] = -3.0
    image[0, 1, 3, 2] = 0.25
    picture, _ = pictures(cross_modal_grid({"m0": image}, {("m0", "m0"): image}))
    assert picture[1, 1:7, 0].tolist() == [1.0] * 6
    assert picture[4, 3].tolist() == [0.0, 0.25, 0.0]
    assert picture.min() == 0.0
    assert picture.max() == 1.0


def test_images_of_two_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="1 or 3 channels"):
        cross_modal_grid({"m0": np.zeros((1, 2, 4, 4))}, {("m0", "m0"): np.zeros((1, 2, 4, 4))})


def test_sample_rows_keep_samples_and_titles_in_their_rows() -> None:
    images = np.arange(6).reshape(3, 2, 1, 1, 1) / 10 * np.ones((3, 2, 3, 8, 8))
    figure = sample_rows({"m0": images, "m1": 1 - images}, ["cluster 4", "cluster 7", "cluster 9"])
    first, second = pictures(figure)
    assert first[1::9, 1::9, 0][:3, :2] == pytest.approx(np.array([[0.0, 0.1], [0.2, 0.3], [0.4, 0.5]]))
    assert second[1::9, 1::9, 0][:3, :2] == pytest.approx(1 - first[1::9, 1::9, 0][:3, :2])
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["cluster 4", "cluster 7", "cluster 9"]
    # Each title beside the middle of its row.
    assert [label.get_position()[1] for label in labels] == [4.5, 13.5, 22.5]


def test_selection_curve_marks_the_chosen_number() -> None:
    selection = Selection(
        active=np.array([True, True, True, False, False]),
        num_clusters=np.array([5, 4, 3, 2]),
        criterion=np.array([1.4, 1.2, 1.1, 1.9]),
        entropy_term=np.array([0.4, 0.2, 0.1, 0.1]),
        likelihood_term=np.array([1.0, 1.0, 1.0, 1.8]),
        dropped=np.array([4, 3, 2]),
    )
    figure = selection_curve(selection)
    figure.canvas.draw()
    assert "3 clusters" in figure.axes[0].get_title(loc="left")
    curves = [ax.lines[0].get_xydata().T.tolist() for ax in figure.axes]
    for curve, values in zip(
        curves, (selection.criterion, selection.entropy_term, selection.likelihood_term), strict=True
    ):
        assert curve == [selection.num_clusters.tolist(), values.tolist()]


def test_confusion_matrix_shows_counts_and_names() -> None:
    counts = np.array([[5, 0, 1], [0, 4, 0], [0, 0, 0]])
    figure = confusion_matrix(counts, ["zero", "one", "two"], np.array([7, 2, 11]))
    (share,) = pictures(figure)
    assert share.tolist() == [[5 / 6, 0, 1 / 6], [0, 1, 0], [0, 0, 0]]
    ax = figure.axes[0]
    assert {(text.get_position(), text.get_text()) for text in ax.texts} == {
        ((0, 0), "5"),
        ((2, 0), "1"),
        ((1, 1), "4"),
    }
    assert [label.get_text() for label in ax.get_xticklabels()] == ["7", "2", "11"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["zero", "one", "two"]


@pytest.mark.parametrize("num_categories", [3, 35])
def test_latent_map_draws_every_point_of_every_category(num_categories: int) -> None:
    points = np.random.default_rng(0).normal(size=(200, 2))
    assignments = np.arange(200) % num_categories
    figure = latent_map(points, assignments, labels=None)
    figure.canvas.draw()
    (ax,) = figure.axes
    assert sum(len(collection.get_offsets()) for collection in ax.collections) == 200
    colours = {tuple(collection.get_facecolor()[0]) for collection in ax.collections}
    assert len(colours) == num_categories
    assert len(latent_map(points, assignments, assignments // 2).axes) == 2


def test_projection_keeps_clusters_apart_and_is_reproducible() -> None:
    z, labels = make_blobs(n_samples=90, centers=3, n_features=16, cluster_std=0.5, random_state=0)
    points = project_2d(z, seed=4)
    assert points.shape == (90, 2)
    centres = np.stack([points[labels == label].mean(axis=0) for label in range(3)])
    nearest = np.linalg.norm(points[:, None] - centres, axis=2).argmin(axis=1)
    assert clustering_metrics(nearest, labels)["acc"] == 1
    np.testing.assert_array_equal(points, project_2d(z, seed=4))


def test_pyplot_is_not_touched() -> None:
    # pyplot keeps every figure alive and may look for a display.
    script = "import sys, cmvae.evaluation.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


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
    # What is no main metric is only drawn when there is nothing else.
    (ax,) = metric_comparison({"a": {"probe/z/m0": [1.0]}}).axes
    assert ax.get_title(loc="left") == "probe/z/m0"
