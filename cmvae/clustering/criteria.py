"""How many clusters there are: criteria that need no labels, each a curve over the sets of a hierarchy.

All look at the same encodings, so that their curves can be compared. The paper's own criterion, which looks
at the trained mixture instead, is `selection.select_clusters`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cmvae.clustering.arrays import BoolArray, FloatArray, IntArray
from cmvae.clustering.hierarchy import ClusterHierarchy, merge_clusters

STABLE = 0.8
"""Prediction strength from which a set of clusters counts as stable (Tibshirani and Walther, 2005)."""
_HALVINGS = 5
_LARGEST_SILHOUETTE = 4000


@dataclass(frozen=True)
class Curve:
    """A criterion for every number of clusters, and the number that it selects."""

    num_clusters: IntArray
    """(S,) descending."""
    values: FloatArray
    """(S,)"""
    selected: int


def silhouette_curve(hierarchy: ClusterHierarchy, locations: FloatArray) -> Curve:
    """The mean silhouette (Rousseeuw, 1987); the highest is selected.

    Args:
        hierarchy: sets of clusters.
        locations: (N, D); of more than 4,000 the first 4,000 are taken, as time grows with their square.
    """
    from sklearn.metrics import pairwise_distances, silhouette_score

    points = locations[:_LARGEST_SILHOUETTE]
    distances = pairwise_distances(points)
    np.fill_diagonal(distances, 0)

    def silhouette(num_clusters: int) -> float:
        labels = hierarchy.assign(num_clusters, points)
        num_labels = len(np.unique(labels))
        if not 2 <= num_labels < len(points):
            return -1.0
        return float(silhouette_score(distances, labels, metric="precomputed"))

    return _highest(hierarchy, silhouette)


def stability_curve(locations: FloatArray, max_clusters: int, seed: int = 0) -> Curve:
    """Prediction strength (Tibshirani and Walther, 2005): do halves of the data find the same clusters?

    Clusters are found in each half. The strength of a set is that of its weakest cluster: the share of its
    pairs that the clusters of the other half keep together, a mean over both directions and several random
    halvings. Selected is the largest set with a strength of at least `STABLE`, or the strongest. Fewer than
    four samples say nothing, and two clusters are selected.

    Args:
        locations: (N, D).
        max_clusters: C.
        seed: of the halvings.
    """
    if len(locations) < 4:  # a half of fewer than two samples has no clusters
        return Curve(np.array([2]), np.array([0.0]), 2)
    rng = np.random.default_rng(seed)
    curves = []
    for _ in range(_HALVINGS):
        order = rng.permutation(len(locations))
        halves = locations[order[: len(order) // 2]], locations[order[len(order) // 2 :]]
        found = [merge_clusters(half, max_clusters, seed=seed) for half in halves]
        largest = min(hierarchy.shares.shape[1] for hierarchy in found)
        strengths = [
            [
                _strength(own.assign(size, half), other.assign(size, half))
                for own, other, half in zip(found, found[::-1], halves, strict=True)
            ]
            for size in range(largest, 1, -1)
        ]
        curves.append(np.mean(strengths, axis=1))
    shortest = min(len(curve) for curve in curves)
    values = np.mean([curve[len(curve) - shortest :] for curve in curves], axis=0)
    sizes = np.arange(shortest + 1, 1, -1)
    stable = values >= STABLE
    # The sizes descend: the first stable one is the largest.
    selected = sizes[stable.argmax()] if stable.any() else sizes[values.argmax()]
    return Curve(sizes, values, int(selected))


def agreement_curve(hierarchy: ClusterHierarchy, shared_loc: FloatArray, present: BoolArray) -> Curve | None:
    """Adjusted Rand index between the clusters that two modalities choose, a mean over pairs of modalities.

    Args:
        hierarchy: sets of clusters.
        shared_loc: (N, M, D).
        present: (N, M) bool, which modalities a sample has.

    Returns:
        The curve, whose highest value is selected; None where no two samples have the same two modalities.
    """
    from sklearn.metrics import adjusted_rand_score

    num_modalities = present.shape[1]
    pairs = [(m, n) for m in range(num_modalities) for n in range(m)]
    both = {pair: present[:, pair[0]] & present[:, pair[1]] for pair in pairs}
    pairs = [pair for pair in pairs if both[pair].sum() > 1]
    if not pairs:
        return None

    def agreement(num_clusters: int) -> float:
        choices = [hierarchy.assign(num_clusters, shared_loc[:, m]) for m in range(num_modalities)]
        return float(
            np.mean([adjusted_rand_score(choices[m][both[m, n]], choices[n][both[m, n]]) for m, n in pairs])
        )

    return _highest(hierarchy, agreement)


def _highest(hierarchy: ClusterHierarchy, criterion: Callable[[int], float]) -> Curve:
    sizes = hierarchy.num_clusters
    values = np.array([criterion(int(size)) for size in sizes])
    return Curve(sizes, values, int(sizes[values.argmax()]))


def _strength(own: IntArray, other: IntArray) -> float:
    """Of each cluster in `own` the share of pairs that `other` keeps together; the lowest share."""
    shares = []
    for cluster in np.unique(own):
        sizes = np.unique(other[own == cluster], return_counts=True)[1]
        total = sizes.sum()
        if total > 1:
            shares.append((sizes * (sizes - 1)).sum() / (total * (total - 1)))
    return float(min(shares)) if shares else 0.0
