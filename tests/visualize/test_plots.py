from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import make_blobs

from cmvae.clustering import clustering_metrics, merge_clusters
from cmvae.models.export import ClusterRecord, CurveRecord
from cmvae.visualize.plots import (
    cluster_tree,
    confusion_matrix,
    criterion_curves,
    latent_map,
    project_2d,
)


def test_criterion_curves_stand_side_by_side_and_say_which_decides() -> None:
    curve = CurveRecord(num_clusters=(5, 4, 3, 2), values=(0.1, 0.2, 0.6, 0.3), selected=3)
    record = ClusterRecord(
        criterion="silhouette", selected=3, told=None, curves={"entropy": curve, "silhouette": curve}
    )
    figure = criterion_curves(record)
    figure.canvas.draw()
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles == ["silhouette: 3, decides", "entropy: 3"]
    for ax in figure.axes:
        assert ax.lines[0].get_xydata().T.tolist() == [[5, 4, 3, 2], [0.1, 0.2, 0.6, 0.3]]


def test_the_tree_names_its_clusters() -> None:
    points = np.repeat(10.0 * np.eye(4), 5, axis=0) + np.random.default_rng(0).normal(size=(20, 4))
    figure = cluster_tree(merge_clusters(points.astype(np.float32), 6), 4)
    figure.canvas.draw()
    names = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len(set(names)) == 4
    assert all(name.isdigit() for name in names)


def test_confusion_matrix_shows_counts_and_names() -> None:
    counts = np.array([[5, 0, 1], [0, 4, 0], [0, 0, 0]])
    figure = confusion_matrix(counts, ["zero", "one", "two"], np.array([7, 2, 11]))
    figure.canvas.draw()
    (share,) = (image.get_array() for image in figure.axes[0].images)
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
