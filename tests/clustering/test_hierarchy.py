"""Hierarchies and the criteria for the number of clusters, against known mixtures and libraries."""

import itertools

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, is_valid_linkage
from scipy.optimize import minimize
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, silhouette_score

from cmvae.clustering import (
    agreement_curve,
    find_cluster_means,
    jaccard_stability,
    joint_location,
    mean_by_group,
    merge_clusters,
    prune_clusters,
    silhouette_curve,
    stability_curve,
)


def mixture(num_clusters, num_samples=600, dim=8, spread=4.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(num_clusters, size=num_samples)
    means = rng.normal(size=(num_clusters, dim)) * spread
    return (means[labels] + rng.normal(size=(num_samples, dim))).astype(np.float32), labels


@pytest.mark.parametrize("num_clusters", [3, 7, 10])
def test_stability_finds_the_number_where_the_silhouette_merges_neighbours(num_clusters):
    points, labels = mixture(num_clusters)
    assert stability_curve(points, 16).selected == num_clusters
    hierarchy = merge_clusters(points, 16)
    assert num_clusters - 1 <= silhouette_curve(hierarchy, points).selected <= num_clusters
    assert adjusted_rand_score(labels, hierarchy.assign(num_clusters, points)) > 0.98


@pytest.mark.parametrize("num_clusters", [3, 7])
def test_every_criterion_finds_equally_spaced_clusters(num_clusters):
    labels = np.arange(600) % num_clusters
    points = (6 * np.eye(8)[labels] + np.random.default_rng(0).normal(size=(600, 8))).astype(np.float32)
    hierarchy = merge_clusters(points, 16)
    rng = np.random.default_rng(1)
    views = (points[:, None] + 0.3 * rng.normal(size=(len(points), 3, 8))).astype(np.float32)
    present = np.ones(views.shape[:2], dtype=bool)
    silhouette, stability = silhouette_curve(hierarchy, points), stability_curve(points, 16)
    assert silhouette.selected == stability.selected == num_clusters
    agreement = agreement_curve(hierarchy, views, present)
    assert agreement is not None
    at_truth = agreement.values[agreement.num_clusters.tolist().index(num_clusters)]
    assert at_truth == pytest.approx(agreement.values.max(), abs=0.02)
    assert adjusted_rand_score(labels, hierarchy.assign(num_clusters, points)) > 0.98


def test_merging_is_as_good_as_many_random_starts():
    points, _ = mixture(9, spread=1.5)
    hierarchy = merge_clusters(points, 20)
    for size in (4, 9, 15):
        kept = hierarchy.means[hierarchy.step(size), hierarchy.active(size)]
        distances = np.square(points[:, None] - kept).sum(-1).min(1).sum()
        assert distances <= 1.02 * KMeans(size, n_init=10, random_state=0).fit(points).inertia_


def test_a_hierarchy_keeps_cluster_ids_and_merges_one_pair_at_a_time():
    points, _ = mixture(5)
    hierarchy = merge_clusters(points, 8, noise=0.25)
    assert hierarchy.num_clusters.tolist() == [8, 7, 6, 5, 4, 3, 2]
    np.testing.assert_allclose(hierarchy.shares.sum(1), 1, rtol=1e-6)
    for size in range(8, 2, -1):
        step = hierarchy.step(size)
        gone, into = hierarchy.merged[step]
        before, after = hierarchy.active(size), hierarchy.active(size - 1)
        assert before.sum() == size
        assert before[[gone, into]].all()
        assert np.flatnonzero(before != after).tolist() == [gone]
        assert hierarchy.shares[step + 1, gone] == 0
        assigned = hierarchy.assign(size, points)
        residual = np.square(points - hierarchy.means[step, assigned]).mean()
        assert hierarchy.variance[step] == pytest.approx(residual + 0.25, rel=1e-4)
    with pytest.raises(ValueError, match="9 clusters: this model has sets of 2 to 8"):
        hierarchy.step(9)


def test_linkage_is_valid_and_joins_neighbours_first():
    means = np.array([[0, 0], [0.5, 0], [10, 0], [10.5, 0], [0, 40]], dtype=np.float32)
    rng = np.random.default_rng(0)
    points = (np.repeat(means, 40, axis=0) + 0.01 * rng.normal(size=(200, 2))).astype(np.float32)
    hierarchy = merge_clusters(points, 5)
    joins, leaves = hierarchy.linkage(5)
    assert is_valid_linkage(joins)
    assert sorted(leaves.tolist()) == [0, 1, 2, 3, 4]
    # Cut into three: each near pair is together and the distant one is alone.
    of_leaf = dict(zip(leaves.tolist(), fcluster(joins, 3, criterion="maxclust"), strict=True))
    place = hierarchy.assign(5, means)
    groups = [of_leaf[cluster] for cluster in place.tolist()]
    assert groups[0] == groups[1] != groups[2] == groups[3]
    assert groups[4] not in groups[:4]


def test_pruning_keeps_the_means_and_renormalises_the_weights():
    means = np.arange(8.0).reshape(4, 2)
    hierarchy = prune_clusters(means, np.log([0.4, 0.3, 0.2, 0.1]), [3, 1], variance=0.5)
    assert hierarchy.is_pruned
    assert hierarchy.active(3).tolist() == [True, True, True, False]
    assert hierarchy.active(2).tolist() == [True, False, True, False]
    np.testing.assert_allclose(hierarchy.shares[-1], [2 / 3, 0, 1 / 3, 0], rtol=1e-6)
    assert (hierarchy.means == means.astype(np.float32)).all()


@pytest.mark.parametrize("points", [np.zeros((6, 3)), np.repeat(np.eye(3), 4, axis=0)])
def test_equal_encodings_still_give_clusters(points):
    hierarchy = merge_clusters(points.astype(np.float32), 10)
    assert np.isfinite(hierarchy.means).all()
    assert hierarchy.active(2).sum() == 2
    for curve in (silhouette_curve(hierarchy, points), stability_curve(points, 10)):
        assert np.isfinite(curve.values).all()


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5])
def test_few_samples_still_give_curves(num_samples):
    points = np.random.default_rng(0).normal(size=(num_samples, 3)).astype(np.float32)
    for curve in (silhouette_curve(merge_clusters(points, 9), points), stability_curve(points, 9)):
        assert np.isfinite(curve.values).all()
        assert 2 <= curve.selected <= num_samples


def test_silhouettes_equal_those_of_scikit_learn():
    points, _ = mixture(4, num_samples=150)
    hierarchy = merge_clusters(points, 6)
    curve = silhouette_curve(hierarchy, points)
    expected = [silhouette_score(points, hierarchy.assign(int(size), points)) for size in curve.num_clusters]
    np.testing.assert_allclose(curve.values, expected, atol=1e-5)


def test_noise_has_no_stable_clusters():
    points = np.random.default_rng(0).normal(size=(800, 10)).astype(np.float32)
    curve = stability_curve(points, 12)
    assert curve.selected <= 3
    assert curve.values[curve.num_clusters > 4].max() < 0.8


def test_agreement_needs_samples_with_two_modalities():
    points, _ = mixture(3, num_samples=60)
    present = np.eye(2, dtype=bool)[np.arange(60) % 2]
    assert agreement_curve(merge_clusters(points, 4), np.stack([points, points], 1), present) is None


@pytest.mark.parametrize("num_modalities", [1, 2, 3, 5])
def test_the_joint_location_has_the_smallest_sum_of_distances(num_modalities):
    rng = np.random.default_rng(num_modalities)
    shared_loc = rng.normal(size=(20, num_modalities, 4))
    present = rng.random((20, num_modalities)) < 0.7
    present[:, 0] = True
    found = joint_location(shared_loc, present)
    for location, points, there in zip(found, shared_loc, present, strict=True):
        points = points[there]

        def distance(x, points=points):
            return np.linalg.norm(points - x, axis=1).sum()

        if len(points) > 2:
            best = minimize(distance, points.mean(0), method="Nelder-Mead", options={"maxiter": 4000}).fun
            assert distance(location) <= best + 2e-3
        else:
            np.testing.assert_allclose(location, points.mean(0), atol=1e-6)


def test_an_outlying_modality_hardly_moves_the_joint_location():
    shared_loc = np.zeros((1, 5, 2))
    shared_loc[0, 4] = 10
    present = np.ones((1, 5), dtype=bool)
    assert np.linalg.norm(joint_location(shared_loc, present)) < 0.05


def test_group_means_use_the_samples_with_the_modality():
    shared_loc = np.arange(12.0).reshape(3, 2, 2)
    present = np.array([[True, False], [True, True], [False, True]])
    means, there = mean_by_group(shared_loc, present, np.array([0, 0, 1]))
    assert there.tolist() == [[True, True], [False, True]]
    np.testing.assert_allclose(means[0], [[(0 + 4) / 2, (1 + 5) / 2], [6, 7]])
    np.testing.assert_allclose(means[1], [[0, 0], [10, 11]])


def test_jaccard_stability_separates_found_from_invented_clusters():
    points, labels = mixture(4)
    stability = jaccard_stability(points, labels)
    assert list(stability) == [0, 1, 2, 3]
    assert min(stability.values()) > 0.95
    # Cluster 0 is split in two at random: k-means finds neither half again.
    split = np.where(labels == 0, np.random.default_rng(1).choice([0, 9], size=len(labels)), labels)
    stability = jaccard_stability(points, split)
    assert max(stability[0], stability[9]) < 0.6 < min(stability[c] for c in (1, 2, 3))


def test_jaccard_stability_is_hennigs_definition_where_kmeans_cannot_err():
    # Two places; cluster 1 has one of five samples at the other place.
    points = np.repeat([[0.0, 0.0], [9.0, 0.0]], 500, axis=0)
    clusters = np.r_[np.zeros(500, dtype=int), np.zeros(125, dtype=int), np.ones(375, dtype=int)]
    stability = jaccard_stability(points, clusters)
    assert stability[0] == pytest.approx(500 / 625, abs=0.03)
    assert stability[1] == pytest.approx(375 / 500, abs=0.03)


def test_distances_in_the_tree_are_those_at_which_fcluster_joins():
    points, _ = mixture(6)
    hierarchy = merge_clusters(points, 12)
    distances, leaves = hierarchy.tree_distances(5)
    joins, names = hierarchy.linkage(5)
    assert leaves.tolist() == names.tolist()
    assert (distances == distances.T).all()
    for one, other in itertools.combinations(range(5), 2):
        height = distances[one, other]
        together = fcluster(joins, height, criterion="distance")
        apart = fcluster(joins, height * (1 - 1e-9), criterion="distance")
        assert together[one] == together[other]
        assert apart[one] != apart[other]


def test_fewer_points_than_centres_make_fewer_centres():
    """A small table: three samples and twenty components."""
    points = np.array([[[0.0, 0.0]], [[5.0, 0.0]], [[0.0, 5.0]]])
    means = find_cluster_means(points, np.ones((3, 1), dtype=bool), 20)
    assert means.shape == (20, 2)
    nearest = np.square(means[:, None] - points[:, 0]).sum(-1).min(1)
    assert nearest.max() < 0.1
