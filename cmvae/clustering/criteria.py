"""Criteria that select the number of clusters without labels.

Each criterion is a curve over the numbers of clusters, computed from the same encodings, so that the curves
can be compared. The paper's criterion uses the trained mixture instead, see `selection.select_clusters`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cmvae.clustering.arrays import BoolArray, FloatArray, IntArray
from cmvae.clustering.hierarchy import ClusterHierarchy, merge_clusters

STABLE = 0.8
"""Prediction strength from which clusters count as stable (Tibshirani and Walther, 2005)."""
_HALVINGS = 5
_STABILITY_HALVES = 10
_STARTS = 4
_MAX_SILHOUETTE_SAMPLES = 4000


@dataclass(frozen=True)
class Curve:
    """Values of a criterion for every number of clusters, and the number that it selects."""

    num_clusters: IntArray
    """(S,) descending."""
    values: FloatArray
    """(S,)"""
    selected: int


def silhouette_curve(hierarchy: ClusterHierarchy, locations: FloatArray) -> Curve:
    """Mean silhouette (Rousseeuw, 1987); the number with the highest value is selected.

    Args:
        hierarchy: the clusters of every number.
        locations: (N, D); only the first 4,000 are used, because time grows with N².
    """
    from sklearn.metrics import pairwise_distances, silhouette_score

    points = locations[:_MAX_SILHOUETTE_SAMPLES]
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
    """Prediction strength (Tibshirani and Walther, 2005): do both halves of the data give the same clusters?

    The data is split into random halves, and each half is clustered. The strength of a cluster is the share
    of its pairs of samples that the clusters of the other half also put together. The curve shows the
    strength of the weakest cluster, averaged over both directions and several splits. The largest number
    with a strength of at least `STABLE` is selected, or else the number with the highest strength. With
    fewer than four samples, two clusters are selected.

    Args:
        locations: (N, D).
        max_clusters: largest number of clusters.
        seed: seed of the splits and of k-means.
    """
    if len(locations) < 4:  # a half needs two samples
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
    # Sizes are descending, so the first stable one is the largest.
    selected = sizes[stable.argmax()] if stable.any() else sizes[values.argmax()]
    return Curve(sizes, values, int(selected))


def agreement_curve(hierarchy: ClusterHierarchy, shared_loc: FloatArray, present: BoolArray) -> Curve | None:
    """Adjusted Rand index between the clusters from two modalities, averaged over pairs of modalities.

    The number with the highest value is selected.

    Args:
        hierarchy: the clusters of every number.
        shared_loc: (N, M, D) locations of q(z|x_m).
        present: (N, M) bool, the modalities that a sample has.

    Returns:
        The curve; None if no pair of modalities is present in at least two samples.
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


def jaccard_stability(locations: FloatArray, assignments: IntArray, seed: int = 0) -> dict[int, float]:
    """Stability of each cluster (Hennig, 2007): is it found again in halves of the data?

    k-means finds as many clusters in random halves of the data. The stability of a cluster is the Jaccard
    index with the most similar cluster of a half, averaged over the halves. Hennig calls clusters below 0.6
    not to be trusted, those above 0.75 valid, and those above 0.85 highly stable.

    Args:
        locations: (N, D).
        assignments: (N,) cluster ids.
        seed: seed of the halves and of k-means.

    Returns:
        Cluster id to stability in [0, 1], for every cluster that has samples in a half.
    """
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(seed)
    found: dict[int, list[float]] = {}
    for _ in range(_STABILITY_HALVES):
        half = rng.permutation(len(locations))[: (len(locations) + 1) // 2]
        own, points = assignments[half], locations[half].astype(np.float64)
        num_clusters = min(len(np.unique(assignments)), len(np.unique(points, axis=0)))
        other = KMeans(num_clusters, n_init=_STARTS, random_state=seed).fit(points).labels_
        for cluster in np.unique(own):
            both = np.bincount(other[own == cluster], minlength=num_clusters)
            union = (own == cluster).sum() + np.bincount(other, minlength=num_clusters) - both
            found.setdefault(int(cluster), []).append(float((both / union).max()))
    return {cluster: float(np.mean(values)) for cluster, values in found.items()}


def _highest(hierarchy: ClusterHierarchy, criterion: Callable[[int], float]) -> Curve:
    sizes = hierarchy.num_clusters
    values = np.array([criterion(int(size)) for size in sizes])
    return Curve(sizes, values, int(sizes[values.argmax()]))


def _strength(own: IntArray, other: IntArray) -> float:
    """Lowest share, over the clusters of `own`, of pairs of samples that are also together in `other`."""
    shares = []
    for cluster in np.unique(own):
        sizes = np.unique(other[own == cluster], return_counts=True)[1]
        total = sizes.sum()
        if total > 1:
            shares.append((sizes * (sizes - 1)).sum() / (total * (total - 1)))
    return float(min(shares)) if shares else 0.0
