"""Compare several runs on the same samples without labels: their agreement, the best run, their consensus.

Cluster ids are −1 for samples without a cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cmvae.clustering.arrays import FloatArray, IntArray

NO_CLUSTER = -1
_UNMATCHED = -2

MIN_AGREEMENT = 0.5
"""Mean pairwise adjusted Rand index below which the runs should not be trusted.

Five runs with independent errors reach it when 15 % of the samples are wrong with ten clusters, 10 % with
three and 7 % with two. Errors that all runs share do not lower the index.
"""


@dataclass(frozen=True)
class Consensus:
    """Clusters that most of several runs agree on."""

    clusters: IntArray
    """(N,) cluster ids of the chosen run; −1 where no run assigns the sample to one of its clusters."""
    confidence: FloatArray
    """(N,) share of the runs that agree, among those that assign the sample to a cluster; 0 if none does."""


def pairwise_agreement(labelings: IntArray) -> FloatArray:
    """Adjusted Rand index of each pair of runs, over the samples that both assign to a cluster.

    A run with all samples in one cluster has found nothing: its index with every other run is set to 0,
    because the index of two such runs would be 1.

    Args:
        labelings: (R, N) cluster ids, −1 for none.

    Returns:
        (R, R), symmetric, 1 on the diagonal.

    Raises:
        ValueError: two runs have fewer than two samples in common.
    """
    from sklearn.metrics import adjusted_rand_score

    num_runs = len(labelings)
    agreement = np.eye(num_runs)
    for first in range(num_runs):
        for second in range(first):
            both = (labelings[first] >= 0) & (labelings[second] >= 0)
            if both.sum() < 2:
                raise ValueError(f"runs {second} and {first} have fewer than two samples in common")
            pair = labelings[first][both], labelings[second][both]
            if min(len(np.unique(labels)) for labels in pair) > 1:
                agreement[first, second] = agreement[second, first] = adjusted_rand_score(*pair)
    return agreement


def mean_agreement(agreement: FloatArray) -> FloatArray:
    """Mean agreement of each run with the others, (R,).

    Args:
        agreement: (R, R) from `pairwise_agreement`; R is at least 2.
    """
    num_runs = len(agreement)
    return (agreement.sum(axis=1) - np.diagonal(agreement)) / (num_runs - 1)


def choose_run(agreement: FloatArray, bounds: FloatArray) -> int:
    """Index of the run that agrees most with the others; in a tie, the one with the highest bound.

    Two runs always tie, so the bound decides between them.

    Args:
        agreement: (R, R) from `pairwise_agreement`; R is at least 2.
        bounds: (R,) bound of each run on validation data.
    """
    # Rounded, because sums of the same numbers in another order differ in the last digits.
    means = mean_agreement(agreement).round(9)
    return int(np.lexsort((bounds, means))[-1])


def describe_disagreement(mean_pairwise: float) -> str | None:
    """Warning for runs that disagree too much, or None.

    Args:
        mean_pairwise: mean adjusted Rand index over all pairs of runs.
    """
    if mean_pairwise >= MIN_AGREEMENT:
        return None
    return (
        f"The runs disagree: their mean pairwise ARI is {mean_pairwise:.2f}, below {MIN_AGREEMENT:.1f}. "
        "Trust none of them. Train longer (train.max_steps), set the number of clusters if you know it "
        "(clusters.num_clusters), or check whether the modalities share any clusters"
    )


def match_clusters(labels: IntArray, reference: IntArray) -> IntArray:
    """Rename the clusters of a run to those of a reference, by the best one-to-one matching.

    The best matching is the one in which matched clusters share the most samples.

    Args:
        labels: (N,) cluster ids of the run, −1 for none.
        reference: (N,) cluster ids of the reference, −1 for none.

    Returns:
        (N,) cluster ids of the reference; −1 where the run has no cluster, −2 where its cluster is unmatched.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    renamed = np.where(labels < 0, NO_CLUSTER, _UNMATCHED)
    both = (labels >= 0) & (reference >= 0)
    if not both.any():
        return renamed
    shared = contingency_matrix(labels[both], reference[both])
    own_ids, reference_ids = np.unique(labels[both]), np.unique(reference[both])
    for own, partner in zip(*linear_sum_assignment(shared, maximize=True), strict=True):
        # The matching also pairs leftover clusters that share no sample: they stay unmatched.
        if shared[own, partner] > 0:
            renamed[labels == own_ids[own]] = reference_ids[partner]
    return renamed


def find_consensus(labelings: IntArray, chosen: int) -> Consensus:
    """Assign each sample to the cluster that most runs choose, with the cluster ids of the chosen run.

    The clusters of every run are first matched with those of the chosen run. An unmatched cluster, for
    example of a run with more clusters, votes for no cluster and lowers the confidence. In a tie the chosen
    run decides, or else the first of the tied runs. Memory grows with R · N.

    Args:
        labelings: (R, N) cluster ids, −1 for none.
        chosen: index of the run whose cluster ids are used.
    """
    # The chosen run comes first: a later cluster must have more votes to replace its cluster.
    order = [chosen, *(run for run in range(len(labelings)) if run != chosen)]
    votes = np.stack([match_clusters(labelings[run], labelings[chosen]) for run in order])
    clusters = np.full(votes.shape[1], NO_CLUSTER, dtype=np.int64)
    most = np.zeros(votes.shape[1], dtype=np.int64)
    for vote in votes:
        count = np.where(vote >= 0, (votes == vote).sum(axis=0), 0)
        better = count > most
        clusters[better], most[better] = vote[better], count[better]
    return Consensus(clusters, most / np.maximum((votes != NO_CLUSTER).sum(axis=0), 1))
