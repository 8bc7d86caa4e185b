"""Hierarchies: a set of clusters of every number, from many down to two.

`prune_clusters` drops one component of the trained mixture at a time, as the paper does. `merge_clusters`
uses the encodings only: it starts from many clusters and merges two at a time, which also gives a tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cmvae.clustering.arrays import BoolArray, FloatArray, IntArray

_STARTS = 4
DROPPED = -1
"""Second entry in `ClusterHierarchy.merged` for a cluster that was dropped and not merged into another."""


@dataclass(frozen=True)
class ClusterHierarchy:
    """Sets of C, C − 1, …, 2 clusters. A cluster has the same id, its index on the C axis, in all sets."""

    means: FloatArray
    """(S, C, D) float32, S = C − 1: cluster means of each set; a removed cluster keeps its last mean."""
    shares: FloatArray
    """(S, C) float32: π. Sums to one in each set; zero for removed clusters."""
    variance: FloatArray
    """(S,) float32: variance of p(z|c), per dimension."""
    merged: IntArray
    """(S − 1, 2) int64: the cluster that is removed in the next set, and the one that it is merged into, or
    `DROPPED`."""
    heights: FloatArray
    """(S − 1,) float32: increase of `variance` · D by each merge (Ward's formula); zero for a drop."""

    @property
    def num_clusters(self) -> IntArray:
        """(S,) number of clusters of each set, descending."""
        return np.arange(self.shares.shape[1], 1, -1)

    def step(self, num_clusters: int) -> int:
        """Index of the set of `num_clusters` clusters.

        Raises:
            ValueError: the hierarchy has no such set.
        """
        largest = self.shares.shape[1]
        if not 2 <= num_clusters <= largest:
            raise ValueError(f"{num_clusters} clusters: this model has sets of 2 to {largest}")
        return largest - num_clusters

    @property
    def is_pruned(self) -> bool:
        """Whether the sets are subsets of one mixture, as from `prune_clusters`."""
        return bool((self.merged[:, 1] == DROPPED).all()) and len(self.merged) > 0

    def active(self, num_clusters: int) -> BoolArray:
        """(C,) bool, the clusters in the set of `num_clusters`."""
        removed = self.merged[: self.step(num_clusters), 0]
        active = np.ones(self.shares.shape[1], dtype=bool)
        active[removed] = False
        return active

    def linkage(self, num_clusters: int) -> tuple[FloatArray, IntArray]:
        """Tree of the set of `num_clusters`, in the format of `scipy.cluster.hierarchy.linkage`.

        Returns:
            Linkage matrix (num_clusters − 1, 4): two nodes, the square root of the cost of joining them, the
            number of leaves below. And the cluster id of each leaf, (num_clusters,).

        Raises:
            ValueError: the hierarchy has no such set.
        """
        step = self.step(num_clusters)
        leaves = np.flatnonzero(self.active(num_clusters))
        node = {int(cluster): index for index, cluster in enumerate(leaves)}
        size = dict.fromkeys(node, 1)
        last = [int(cluster) for cluster in np.flatnonzero(self.active(2))]
        shares, means = self.shares[-1, last].astype(np.float64), self.means[-1, last].astype(np.float64)
        top = float(np.square(means[0] - means[1]).sum() * shares.prod() / max(shares.sum(), 1e-12))
        merges = [*self.merged[step:].tolist(), (last[1], last[0])]
        joins, height = [], 0.0
        for index, ((gone, into), cost) in enumerate(zip(merges, [*self.heights[step:], top], strict=True)):
            # k-means runs after each merge, so a later merge may cost less. Heights of a tree must not fall.
            height = max(height, float(np.sqrt(cost)))
            joins.append((node[into], node[gone], height, size[into] + size[gone]))
            node[into], size[into] = num_clusters + index, size[into] + size[gone]
        return np.array(joins, dtype=np.float64), leaves

    def tree_distances(self, num_clusters: int) -> tuple[FloatArray, IntArray]:
        """Distances in the tree of the set of `num_clusters`: the height at which two clusters are joined.

        Returns:
            Cophenetic distances (num_clusters, num_clusters), and the cluster id of each row.

        Raises:
            ValueError: the hierarchy has no such set.
        """
        from scipy.cluster.hierarchy import cophenet
        from scipy.spatial.distance import squareform

        joins, leaves = self.linkage(num_clusters)
        return squareform(cophenet(joins)), leaves

    def assign(self, num_clusters: int, locations: FloatArray) -> IntArray:
        """Assign each location to the nearest mean of the set of `num_clusters`.

        Args:
            num_clusters: number of clusters.
            locations: (N, D).

        Returns:
            (N,) cluster ids.

        Raises:
            ValueError: the hierarchy has no such set.
        """
        kept = np.flatnonzero(self.active(num_clusters))
        return kept[_nearest(locations, self.means[self.step(num_clusters), kept])]


def merge_clusters(
    locations: FloatArray, max_clusters: int, noise: float = 0.0, seed: int = 0
) -> ClusterHierarchy:
    """Build a hierarchy from k-means clusters by merging two at a time, with k-means after every merge.

    The pair that adds the least to the sum of squared distances is merged (Ward, 1963). Each set starts from
    the one before, so few random starts are needed: on trained encodings the sum of squared distances is
    within one percent of the best of ten k-means runs.

    Args:
        locations: (N, D) location of each sample in the shared space.
        max_clusters: C, at least 2. With fewer distinct locations, their number is used.
        noise: variance of encodings around these locations, per dimension. It is added to the mean squared
            distance of the locations to their cluster means, to give `variance`.
        seed: seed of k-means.

    Raises:
        ValueError: fewer than two samples, or fewer than two clusters.
    """
    from sklearn.cluster import KMeans

    if len(locations) < 2 or max_clusters < 2:
        raise ValueError(f"{len(locations)} samples, {max_clusters} clusters: both must be at least 2")
    points = locations.astype(np.float64)
    num_distinct = len(np.unique(points, axis=0))
    if num_distinct < 2:  # a collapsed encoder
        points = points + 1e-6 * np.random.default_rng(seed).normal(size=points.shape)
        num_distinct = len(points)
    fitted = KMeans(min(max_clusters, num_distinct), n_init=_STARTS, random_state=seed).fit(points)
    means = fitted.cluster_centers_
    sizes = _sizes(fitted.labels_, len(means))
    # Cluster 0 is the largest.
    order = np.argsort(-sizes, kind="stable")
    means, sizes = means[order], sizes[order]
    kept = np.arange(len(means))
    sets, merged, heights = [_make_set(points, means, sizes, kept, noise)], [], []
    while len(kept) > 2:
        costs = _ward_costs(means[kept], sizes[kept])
        pair = np.unravel_index(costs.argmin(), costs.shape)
        into, gone = sorted(kept[list(pair)], key=lambda cluster: -sizes[cluster])
        heights.append(costs.min() / len(points))
        merged.append((gone, into))
        total = sizes[into] + sizes[gone]
        means[into] = (sizes[into] * means[into] + sizes[gone] * means[gone]) / total
        kept = kept[kept != gone]
        refined = KMeans(len(kept), init=means[kept], n_init=1).fit(points)
        means[kept], sizes[kept] = refined.cluster_centers_, _sizes(refined.labels_, len(kept))
        sizes[gone] = 0
        sets.append(_make_set(points, means, sizes, kept, noise))
    return _stack_sets(sets, merged, heights)


def prune_clusters(
    means: FloatArray, log_weights: FloatArray, dropped: Sequence[int] | IntArray, variance: float
) -> ClusterHierarchy:
    """Build the hierarchy of the paper's selection: the trained mixture with one component fewer each time.

    Args:
        means: (C, D) means of the mixture.
        log_weights: (C,) log π.
        dropped: (C − 2,) components in the order in which they are dropped, see `Selection.dropped`.
        variance: variance of p(z|c), per dimension.
    """
    shares = np.exp(log_weights - log_weights.max())
    sets = []
    for step in range(len(dropped) + 1):
        kept = shares.copy()
        kept[np.asarray(dropped[:step], dtype=np.int64)] = 0
        sets.append((means, kept / kept.sum(), variance))
    return _stack_sets(sets, [(cluster, DROPPED) for cluster in dropped], [0.0] * len(dropped))


def _nearest(points: FloatArray, means: FloatArray) -> IntArray:
    """Index of the nearest mean of each point, (N,); points (N, D), means (C, D)."""
    distances = np.square(means).sum(1) - 2 * points @ means.T
    return distances.argmin(1)


def _stack_sets(
    sets: Sequence[tuple[FloatArray, FloatArray, float]],
    merged: Sequence[tuple[int, int]],
    heights: Sequence[float],
) -> ClusterHierarchy:
    means, shares, variance = zip(*sets, strict=True)
    return ClusterHierarchy(
        np.stack(means).astype(np.float32),
        np.stack(shares).astype(np.float32),
        np.array(variance, dtype=np.float32),
        np.array(merged, dtype=np.int64).reshape(-1, 2),
        np.array(heights, dtype=np.float32),
    )


def _make_set(
    points: FloatArray, means: FloatArray, sizes: FloatArray, kept: IntArray, noise: float
) -> tuple[FloatArray, FloatArray, float]:
    """Means, shares and variance of one set of clusters."""
    residuals = points - means[kept][_nearest(points, means[kept])]
    return means.copy(), sizes / sizes.sum(), float(np.square(residuals).mean()) + noise


def _sizes(labels: IntArray, num_clusters: int) -> FloatArray:
    """Number of samples of each cluster, (C,)."""
    return np.bincount(labels, minlength=num_clusters).astype(np.float64)


def _ward_costs(means: FloatArray, sizes: FloatArray) -> FloatArray:
    """Increase of the sum of squared distances by merging two clusters, (C, C); infinite on the diagonal."""
    distances = np.square(means[:, None] - means).sum(-1)
    costs = distances * (sizes[:, None] * sizes) / np.maximum(sizes[:, None] + sizes, 1)
    np.fill_diagonal(costs, np.inf)
    return costs
