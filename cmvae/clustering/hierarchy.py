"""A set of clusters for every number of them, from many down to two.

Two ways lead down. `prune_clusters` drops components of the mixture that was trained, as the paper does.
`merge_clusters` looks at the encodings alone: it starts from many pieces and merges two at every step, so
that the sequence is also a tree of the clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cmvae.clustering.arrays import BoolArray, FloatArray, IntArray

_STARTS = 4
DROPPED = -1
"""Stands in `ClusterHierarchy.merged` for the cluster that takes the samples of one that was dropped."""


@dataclass(frozen=True)
class ClusterHierarchy:
    """Sets of C, C − 1, …, 2 clusters. A cluster keeps its number, a place on the C axis, in all sets."""

    means: FloatArray
    """(S, C, D) float32, S = C − 1: the mean of each cluster in each set; where one is gone, its last."""
    shares: FloatArray
    """(S, C) float32: π, sums to one over the clusters of a set, zero where one is gone."""
    variance: FloatArray
    """(S,) float32, of p(z|c), per dimension."""
    merged: IntArray
    """(S − 1, 2) int64: the cluster that is gone in the next set, and the one that it became part of, or
    `DROPPED`."""
    heights: FloatArray
    """(S − 1,) float32: what each step adds to `variance` · D, by Ward's formula; zero where it drops one."""

    @property
    def num_clusters(self) -> IntArray:
        """(S,) sizes of the sets."""
        return np.arange(self.shares.shape[1], 1, -1)

    def step(self, num_clusters: int) -> int:
        """The place of the set of `num_clusters` clusters.

        Raises:
            ValueError: there is no such set.
        """
        largest = self.shares.shape[1]
        if not 2 <= num_clusters <= largest:
            raise ValueError(f"{num_clusters} clusters: this model has sets of 2 to {largest}")
        return largest - num_clusters

    @property
    def is_pruned(self) -> bool:
        """Whether the sets are parts of one mixture, as from `prune_clusters`."""
        return bool((self.merged[:, 1] == DROPPED).all()) and len(self.merged) > 0

    def active(self, num_clusters: int) -> BoolArray:
        """(C,) the clusters in the set of `num_clusters`."""
        gone = self.merged[: self.step(num_clusters), 0]
        active = np.ones(self.shares.shape[1], dtype=bool)
        active[gone] = False
        return active

    def linkage(self, num_clusters: int) -> tuple[FloatArray, IntArray]:
        """The tree of the set of `num_clusters`, as scipy's `linkage`, and the numbers of its leaves.

        Returns:
            (num_clusters − 1, 4): two nodes, the square root of what joining them costs, and leaves below;
            and (num_clusters,) the cluster that each leaf is.

        Raises:
            ValueError: there is no such set.
        """
        step = self.step(num_clusters)
        leaves = np.flatnonzero(self.active(num_clusters))
        node = {int(cluster): place for place, cluster in enumerate(leaves)}
        size = dict.fromkeys(node, 1)
        last = [int(cluster) for cluster in np.flatnonzero(self.active(2))]
        shares, means = self.shares[-1, last].astype(np.float64), self.means[-1, last].astype(np.float64)
        top = float(np.square(means[0] - means[1]).sum() * shares.prod() / max(shares.sum(), 1e-12))
        merges = [*self.merged[step:].tolist(), (last[1], last[0])]
        joins, height = [], 0.0
        for place, ((gone, into), cost) in enumerate(zip(merges, [*self.heights[step:], top], strict=True)):
            # k-means settles after each merge, so that a later one may cost less; a tree only rises.
            height = max(height, float(np.sqrt(cost)))
            joins.append((node[into], node[gone], height, size[into] + size[gone]))
            node[into], size[into] = num_clusters + place, size[into] + size[gone]
        return np.array(joins, dtype=np.float64), leaves

    def assign(self, num_clusters: int, locations: FloatArray) -> IntArray:
        """The nearest mean of the set of `num_clusters`, (N,) numbers of clusters.

        Args:
            num_clusters: size of the set.
            locations: (N, D).
        """
        kept = np.flatnonzero(self.active(num_clusters))
        return kept[_nearest(locations, self.means[self.step(num_clusters), kept])]


def merge_clusters(
    locations: FloatArray, max_clusters: int, noise: float = 0.0, seed: int = 0
) -> ClusterHierarchy:
    """Start from the clusters of k-means, merge two at a time, and let k-means settle after every merge.

    Merged is the pair that adds the least to the squared distances (Ward, 1963). Each set starts from the one
    before, so that the result does not depend on many random starts; on trained encodings its squared
    distances equal those of the best of ten k-means runs to a percent.

    Args:
        locations: (N, D) of the samples in the shared space.
        max_clusters: C, at least two; fewer where there are fewer distinct locations.
        noise: variance of encodings around these locations, per dimension; what `variance` has besides the
            mean squared distance of locations to the mean of their cluster.
        seed: of k-means.

    Raises:
        ValueError: fewer than two samples, or fewer than two clusters.
    """
    from sklearn.cluster import KMeans

    if len(locations) < 2 or max_clusters < 2:
        raise ValueError(f"{len(locations)} samples in {max_clusters} clusters: both must be at least 2")
    points = locations.astype(np.float64)
    num_distinct = len(np.unique(points, axis=0))
    if num_distinct < 2:  # an encoder that says the same of everything
        points = points + 1e-6 * np.random.default_rng(seed).normal(size=points.shape)
        num_distinct = len(points)
    fitted = KMeans(min(max_clusters, num_distinct), n_init=_STARTS, random_state=seed).fit(points)
    means = fitted.cluster_centers_
    sizes = _sizes(fitted.labels_, len(means))
    # The largest cluster is number 0.
    order = np.argsort(-sizes, kind="stable")
    means, sizes = means[order], sizes[order]
    kept = np.arange(len(means))
    sets, merged, heights = [_set(points, means, sizes, kept, noise)], [], []
    while len(kept) > 2:
        costs = _ward_costs(means[kept], sizes[kept])
        pair = np.unravel_index(costs.argmin(), costs.shape)
        into, gone = sorted(kept[list(pair)], key=lambda cluster: -sizes[cluster])
        heights.append(costs.min() / len(points))
        merged.append((gone, into))
        total = sizes[into] + sizes[gone]
        means[into] = (sizes[into] * means[into] + sizes[gone] * means[gone]) / total
        kept = kept[kept != gone]
        settled = KMeans(len(kept), init=means[kept], n_init=1).fit(points)
        means[kept], sizes[kept] = settled.cluster_centers_, _sizes(settled.labels_, len(kept))
        sizes[gone] = 0
        sets.append(_set(points, means, sizes, kept, noise))
    return _stack(sets, merged, heights)


def prune_clusters(
    means: FloatArray, log_weights: FloatArray, dropped: Sequence[int] | IntArray, variance: float
) -> ClusterHierarchy:
    """The sets that the paper's selection goes through: those of the trained mixture, one fewer each time.

    Args:
        means: (C, D) of the mixture.
        log_weights: (C,) log π.
        dropped: (C − 2,) in their order, see `Selection.dropped`.
        variance: of p(z|c), per dimension.
    """
    shares = np.exp(log_weights - log_weights.max())
    sets = []
    for step in range(len(dropped) + 1):
        kept = shares.copy()
        kept[np.asarray(dropped[:step], dtype=np.int64)] = 0
        sets.append((means, kept / kept.sum(), variance))
    return _stack(sets, [(cluster, DROPPED) for cluster in dropped], [0.0] * len(dropped))


def _nearest(points: FloatArray, means: FloatArray) -> IntArray:
    """Which of `means` (C, D) is nearest to each of `points` (N, D), (N,)."""
    distances = np.square(means).sum(1) - 2 * points @ means.T
    return distances.argmin(1)


def _stack(
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


def _set(
    points: FloatArray, means: FloatArray, sizes: FloatArray, kept: IntArray, noise: float
) -> tuple[FloatArray, FloatArray, float]:
    residuals = points - means[kept][_nearest(points, means[kept])]
    return means.copy(), sizes / sizes.sum(), float(np.square(residuals).mean()) + noise


def _sizes(labels: IntArray, num_clusters: int) -> FloatArray:
    """Samples of each cluster, (C,)."""
    return np.bincount(labels, minlength=num_clusters).astype(np.float64)


def _ward_costs(means: FloatArray, sizes: FloatArray) -> FloatArray:
    """(C, C): what merging two clusters adds to the sum of squared distances; infinite on the diagonal."""
    distances = np.square(means[:, None] - means).sum(-1)
    costs = distances * (sizes[:, None] * sizes) / np.maximum(sizes[:, None] + sizes, 1)
    np.fill_diagonal(costs, np.inf)
    return costs
