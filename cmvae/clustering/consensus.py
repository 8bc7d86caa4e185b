"""One answer from several runs on the same samples: how far they agree, which to take, what they agree on.

Nothing here needs labels. Samples without a cluster are −1 in a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cmvae.clustering.arrays import FloatArray, IntArray

NO_CLUSTER = -1
_NO_PARTNER = -2

TRUSTWORTHY = 0.5
"""Mean pairwise adjusted Rand index below which no run is to be trusted.

Five runs whose mistakes are independent of each other come to it with 15 % wrong in ten clusters, 10 % in
three and 7 % in two. Mistakes that the runs share do not show in it.
"""


@dataclass(frozen=True)
class Consensus:
    """What several runs say about each sample."""

    clusters: IntArray
    """(N,) cluster ids of the reference run; −1 where no run has the sample in a cluster of the reference."""
    confidence: FloatArray
    """(N,) share of the runs that agree, among those that have the sample in a cluster; 0 where none has."""


def pairwise_agreement(labelings: IntArray) -> FloatArray:
    """Adjusted Rand index between every two runs, over the samples that both have in a cluster.

    A run that has put all of them into one cluster has found nothing, and agrees with no other: 0, where the
    index itself calls two such runs equal.

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
    """The mean agreement of each run with the others, (R,).

    Args:
        agreement: (R, R) as of `pairwise_agreement`, of at least two runs.
    """
    num_runs = len(agreement)
    return (agreement.sum(axis=1) - np.diagonal(agreement)) / (num_runs - 1)


def choose_run(agreement: FloatArray, bounds: FloatArray) -> int:
    """The run to take: the one that agrees most with the others; of equal ones that with the highest bound.

    Two runs always agree equally with each other, so that of two the bound decides.

    Args:
        agreement: (R, R) as of `pairwise_agreement`, of at least two runs.
        bounds: (R,) each run's bound on validation data.
    """
    # Sums of the same numbers in another order are equal but for rounding.
    means = mean_agreement(agreement).round(9)
    return int(np.lexsort((bounds, means))[-1])


def describe_disagreement(mean_pairwise: float) -> str | None:
    """A sentence that warns of runs that disagree too much, or None.

    Args:
        mean_pairwise: the mean adjusted Rand index over all pairs of runs.
    """
    if mean_pairwise >= TRUSTWORTHY:
        return None
    return (
        f"The runs disagree: their mean pairwise ARI is {mean_pairwise:.2f}, below {TRUSTWORTHY:.1f}. Trust "
        "none of them. Train longer (train.max_steps), tell the number of clusters if it is known "
        "(clusters.num_clusters), or look whether the modalities share groups at all"
    )


def match_clusters(labels: IntArray, reference: IntArray) -> IntArray:
    """Rename the clusters of a run as those of a reference that share most samples with them, one to one.

    Args:
        labels: (N,) cluster ids of the run, −1 for none.
        reference: (N,) cluster ids of the reference, −1 for none.

    Returns:
        (N,) ids of the reference; −1 where the run has no cluster, −2 where its cluster has no partner.
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics.cluster import contingency_matrix

    renamed = np.where(labels < 0, NO_CLUSTER, _NO_PARTNER)
    both = (labels >= 0) & (reference >= 0)
    if not both.any():
        return renamed
    shared = contingency_matrix(labels[both], reference[both])
    own_ids, reference_ids = np.unique(labels[both]), np.unique(reference[both])
    for own, partner in zip(*linear_sum_assignment(shared, maximize=True), strict=True):
        # Clusters that share nothing are no partners, even if they are what is left.
        if shared[own, partner] > 0:
            renamed[labels == own_ids[own]] = reference_ids[partner]
    return renamed


def vote_of_runs(labelings: IntArray, chosen: int) -> Consensus:
    """The cluster that most runs put each sample in, under the names of the chosen run.

    Every run's clusters are matched with those of the chosen run; a cluster without a partner, as where a run
    has more of them, votes for no cluster and still counts in the confidence. A tie goes to the chosen run,
    else to the first of the runs. Memory grows with R · N.

    Args:
        labelings: (R, N) cluster ids, −1 for none.
        chosen: which run gives the names.
    """
    # The chosen run first: a later vote has to be stronger to replace it.
    order = [chosen, *(run for run in range(len(labelings)) if run != chosen)]
    votes = np.stack([match_clusters(labelings[run], labelings[chosen]) for run in order])
    clusters = np.full(votes.shape[1], NO_CLUSTER, dtype=np.int64)
    most = np.zeros(votes.shape[1], dtype=np.int64)
    for vote in votes:
        count = np.where(vote >= 0, (votes == vote).sum(axis=0), 0)
        better = count > most
        clusters[better], most[better] = vote[better], count[better]
    return Consensus(clusters, most / np.maximum((votes != NO_CLUSTER).sum(axis=0), 1))
