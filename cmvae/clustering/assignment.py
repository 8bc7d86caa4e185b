"""From densities to clusters: responsibilities, votes, and where several modalities put a sample together."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

from cmvae.clustering.arrays import BoolArray, FloatArray, IntArray

_MEDIAN_STEPS = 30
# Distances are at least this, so that a location that equals the median has a finite weight.
_SHORTEST = 1e-3


def joint_location(shared_loc: FloatArray, present: BoolArray) -> FloatArray:
    """Where the modalities of a sample put it together: the geometric median of their locations.

    The point with the least sum of distances. With one or two modalities it is their mean. With more, one
    that lies apart counts less than in a mean, as in a vote: a view that cannot tell two classes apart draws
    the mean towards the wrong one. Found by Weiszfeld's iteration from the mean.

    Args:
        shared_loc: (N, M, D) locations of q(z|x_m).
        present: (N, M) bool, the modalities that a sample has; at least one of each sample.

    Returns:
        (N, D), of the dtype of `shared_loc`.
    """
    location = _weighted_mean(shared_loc, present)
    if shared_loc.shape[1] < 3:
        return location
    for _ in range(_MEDIAN_STEPS):
        distances = np.linalg.norm(shared_loc - location[:, None], axis=2)
        location = _weighted_mean(shared_loc, present / np.maximum(distances, _SHORTEST))
    return location


def mean_by_group(
    shared_loc: FloatArray, present: BoolArray, groups: IntArray
) -> tuple[FloatArray, BoolArray]:
    """One sample for each group: the mean of each modality over the members that have it.

    Args:
        shared_loc: (N, M, D).
        present: (N, M) bool.
        groups: (N,) numbers from 0 to G − 1, each of which has a member.

    Returns:
        (G, M, D) and (G, M), as the arguments; zeros where no member has a modality.
    """
    counts = np.zeros((groups.max() + 1, present.shape[1]))
    sums = np.zeros((*counts.shape, shared_loc.shape[2]))
    np.add.at(counts, groups, present)
    np.add.at(sums, groups, np.where(present[..., None], shared_loc, 0))
    return (sums / np.maximum(counts, 1)[..., None]).astype(shared_loc.dtype), counts > 0


def number_groups(groups: IntArray) -> IntArray:
    """Number groups from 0, as `mean_by_group` takes them; samples without one are groups of their own.

    Args:
        groups: (N,) any numbers, negative for samples without a group.

    Returns:
        (N,) numbers from 0 to G − 1. Those of the groups come first, then those of samples without one.
    """
    alone = groups < 0
    names, numbers = np.unique(groups[~alone], return_inverse=True)
    numbered = np.empty(len(groups), dtype=np.int64)
    numbered[~alone] = numbers
    numbered[alone] = len(names) + np.arange(alone.sum())
    return numbered


def labels_of_groups(labels: IntArray, groups: IntArray) -> IntArray:
    """The most frequent label of each group's members, of several that are as frequent the lowest.

    Args:
        labels: (N,), −1 where there is none.
        groups: (N,) numbers from 0 to G − 1, each of which has a member.

    Returns:
        (G,), −1 where no member has a label.
    """
    labelled = labels >= 0
    counts = np.zeros((groups.max() + 1, max(labels.max(), 0) + 1), dtype=np.int64)
    np.add.at(counts, (groups[labelled], labels[labelled]), 1)
    return np.where(counts.any(axis=1), counts.argmax(axis=1), -1)


def _weighted_mean(shared_loc: FloatArray, weights: FloatArray | BoolArray) -> FloatArray:
    """(N, D): the mean over modalities with weights (N, M)."""
    shares = weights / weights.sum(axis=1, keepdims=True)
    mean: FloatArray = np.einsum("nmd,nm->nd", shared_loc, shares).astype(shared_loc.dtype)
    return mean


def responsibilities(log_density: FloatArray, log_weights: FloatArray, active: BoolArray) -> FloatArray:
    """p(c | z) ∝ π_c p(z | c) over the active clusters.

    Args:
        log_density: (N, M, C) log p(z_nm | c), in nats.
        log_weights: (C,) log π_c; π is renormalised over the active clusters.
        active: (C,) bool, the clusters that exist.

    Returns:
        (N, M, C) float64; sums to one over clusters, zero where a cluster is not active.

    Raises:
        ValueError: shapes disagree, a value is not finite, or no cluster is active.
    """
    check_densities(log_density, log_weights)
    if active.shape != log_weights.shape or not active.any():
        raise ValueError(f"active must be a mask over {log_weights.shape[0]} clusters with at least one set")
    posterior = np.zeros(log_density.shape)
    posterior[..., active], _ = posterior_and_evidence(
        log_density[..., active].astype(np.float64), log_weights[active].astype(np.float64)
    )
    return posterior


def vote(responsibilities: FloatArray, present: BoolArray | None = None) -> IntArray:
    """One cluster a sample: the mode of what its modalities choose.

    Where several clusters have the most votes, the most confident among the modalities that voted for one
    of them decides. With two modalities the mode says nothing when they disagree, so that this rule makes
    the more confident one decide.

    Args:
        responsibilities: (N, M, C).
        present: (N, M) bool, which modalities a sample has and may vote; None if all.

    Returns:
        (N,) cluster ids.
    """
    choices = responsibilities.argmax(axis=2)
    certainty = responsibilities.max(axis=2)
    voters = np.ones(choices.shape, dtype=bool) if present is None else present
    num_votes = ((choices[:, :, None] == choices[:, None, :]) & voters[:, None, :]).sum(axis=2)
    num_votes = np.where(voters, num_votes, -1)
    in_mode = num_votes == num_votes.max(axis=1, keepdims=True)
    deciding = np.where(in_mode, certainty, -1.0).argmax(axis=1)
    return np.take_along_axis(choices, deciding[:, None], axis=1)[:, 0]


def confidence(
    responsibilities: FloatArray, assignments: IntArray, present: BoolArray | None = None
) -> FloatArray:
    """How much the modalities agree with the vote: their mean responsibility of the sample's cluster.

    Args:
        responsibilities: (N, M, C).
        assignments: (N,) cluster ids, from `vote`.
        present: as of `vote`; at least one of each sample.

    Returns:
        (N,) in [0, 1].
    """
    agreement = np.take_along_axis(responsibilities, assignments[:, None, None], axis=2)[:, :, 0]
    return np.average(agreement, axis=1, weights=present)


def posterior_and_evidence(log_density: FloatArray, log_weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """p(c | z) (N, M, C) and log p(z) (N, M) under renormalised weights."""
    log_joint = log_density + (log_weights - logsumexp(log_weights))
    log_evidence = logsumexp(log_joint, axis=2)
    return np.exp(log_joint - log_evidence[:, :, None]), log_evidence


def check_densities(log_density: FloatArray, log_weights: FloatArray) -> None:
    """Refuse densities and weights that do not fit each other.

    Raises:
        ValueError: shapes disagree, or a value is not finite.
    """
    if log_density.ndim != 3 or log_weights.shape != log_density.shape[2:]:
        raise ValueError(
            f"log_density must be (N, M, C) and log_weights (C,), "
            f"not {log_density.shape} and {log_weights.shape}"
        )
    if not (np.isfinite(log_density).all() and np.isfinite(log_weights).all()):
        raise ValueError("log_density and log_weights must be finite; did the training diverge?")
