"""From densities to clusters: responsibilities, votes, joint locations of modalities, groups of samples."""

from __future__ import annotations

import numpy as np
from scipy.special import logsumexp

from cmvae.clustering.arrays import BoolArray, FloatArray, IntArray

_MEDIAN_STEPS = 30
# Lower bound of distances: a location that equals the median still has a finite weight.
_MIN_DISTANCE = 1e-3


def joint_location(shared_loc: FloatArray, present: BoolArray) -> FloatArray:
    """Geometric median of the locations of each sample's modalities.

    The geometric median has the smallest sum of distances to the locations; of one or two, it is their mean.
    An outlier moves it less than the mean: a modality that cannot separate two classes would pull the mean
    towards the wrong class. Computed by Weiszfeld's algorithm, starting from the mean.

    Args:
        shared_loc: (N, M, D) locations of q(z|x_m).
        present: (N, M) bool, the modalities that a sample has; at least one per sample.

    Returns:
        (N, D), with the dtype of `shared_loc`.
    """
    location = _weighted_mean(shared_loc, present)
    if shared_loc.shape[1] < 3:
        return location
    for _ in range(_MEDIAN_STEPS):
        distances = np.linalg.norm(shared_loc - location[:, None], axis=2)
        location = _weighted_mean(shared_loc, present / np.maximum(distances, _MIN_DISTANCE))
    return location


def mean_by_group(
    shared_loc: FloatArray, present: BoolArray, groups: IntArray
) -> tuple[FloatArray, BoolArray]:
    """Average the samples of each group, per modality over the samples that have it.

    Args:
        shared_loc: (N, M, D) locations of q(z|x_m).
        present: (N, M) bool, the modalities that a sample has.
        groups: (N,) group of each sample, from 0 to G − 1 without gaps.

    Returns:
        Means (G, M, D), zero where no sample of the group has the modality, and a mask (G, M) of those that
        have a mean.
    """
    counts = np.zeros((groups.max() + 1, present.shape[1]))
    sums = np.zeros((*counts.shape, shared_loc.shape[2]))
    np.add.at(counts, groups, present)
    np.add.at(sums, groups, np.where(present[..., None], shared_loc, 0))
    return (sums / np.maximum(counts, 1)[..., None]).astype(shared_loc.dtype), counts > 0


def number_groups(groups: IntArray) -> IntArray:
    """Number groups from 0 without gaps. Each sample without a group becomes a group of its own.

    Args:
        groups: (N,) any integers, negative for samples without a group.

    Returns:
        (N,) from 0 to G − 1: first the groups, then the samples without a group.
    """
    alone = groups < 0
    names, numbers = np.unique(groups[~alone], return_inverse=True)
    numbered = np.empty(len(groups), dtype=np.int64)
    numbered[~alone] = numbers
    numbered[alone] = len(names) + np.arange(alone.sum())
    return numbered


def label_by_group(labels: IntArray, groups: IntArray) -> IntArray:
    """Most frequent label of each group; the lowest one in a tie.

    Args:
        labels: (N,), −1 for samples without a label.
        groups: (N,) group of each sample, from 0 to G − 1 without gaps.

    Returns:
        (G,), −1 where no sample of the group has a label.
    """
    labelled = labels >= 0
    counts = np.zeros((groups.max() + 1, max(labels.max(), 0) + 1), dtype=np.int64)
    np.add.at(counts, (groups[labelled], labels[labelled]), 1)
    return np.where(counts.any(axis=1), counts.argmax(axis=1), -1)


def _weighted_mean(shared_loc: FloatArray, weights: FloatArray | BoolArray) -> FloatArray:
    """Weighted mean over modalities, (N, D); weights (N, M)."""
    shares = weights / weights.sum(axis=1, keepdims=True)
    mean: FloatArray = np.einsum("nmd,nm->nd", shared_loc, shares).astype(shared_loc.dtype)
    return mean


def responsibilities(log_density: FloatArray, log_weights: FloatArray, active: BoolArray) -> FloatArray:
    """p(c | z) ∝ π_c p(z | c) over the active clusters.

    Args:
        log_density: (N, M, C) log p(z_nm | c), in nats.
        log_weights: (C,) log π_c; π is renormalised over the active clusters.
        active: (C,) bool, the clusters in use.

    Returns:
        (N, M, C) float64. Sums to one over clusters; zero for inactive clusters.

    Raises:
        ValueError: shapes do not match, a value is not finite, or no cluster is active.
    """
    check_densities(log_density, log_weights)
    if active.shape != log_weights.shape or not active.any():
        raise ValueError(f"active must be a mask of {log_weights.shape[0]} clusters with at least one active")
    posterior = np.zeros(log_density.shape)
    posterior[..., active], _ = posterior_and_evidence(
        log_density[..., active].astype(np.float64), log_weights[active].astype(np.float64)
    )
    return posterior


def vote(responsibilities: FloatArray, present: BoolArray | None = None) -> IntArray:
    """Assign each sample to the cluster that most of its modalities choose.

    In a tie, the most confident modality among those that chose a tied cluster decides. So when two
    modalities disagree, the more confident one decides.

    Args:
        responsibilities: (N, M, C) p(c|z) per modality.
        present: (N, M) bool, the modalities that a sample has, which vote; None if it has all.

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
    """Mean responsibility of the assigned cluster over the modalities of each sample.

    Args:
        responsibilities: (N, M, C) p(c|z) per modality.
        assignments: (N,) cluster ids, from `vote`.
        present: (N, M) bool, the modalities that a sample has, at least one per sample; None if it has all.

    Returns:
        (N,) in [0, 1].
    """
    agreement = np.take_along_axis(responsibilities, assignments[:, None, None], axis=2)[:, :, 0]
    return np.average(agreement, axis=1, weights=present)


def posterior_and_evidence(log_density: FloatArray, log_weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """p(c | z), (N, M, C), and log p(z), (N, M), with the weights renormalised."""
    log_joint = log_density + (log_weights - logsumexp(log_weights))
    log_evidence = logsumexp(log_joint, axis=2)
    return np.exp(log_joint - log_evidence[:, :, None]), log_evidence


def check_densities(log_density: FloatArray, log_weights: FloatArray) -> None:
    """Check that densities and weights are finite and have matching shapes.

    Raises:
        ValueError: shapes do not match, or a value is not finite.
    """
    if log_density.ndim != 3 or log_weights.shape != log_density.shape[2:]:
        raise ValueError(
            f"log_density must be (N, M, C) and log_weights (C,), "
            f"not {log_density.shape} and {log_weights.shape}"
        )
    if not (np.isfinite(log_density).all() and np.isfinite(log_weights).all()):
        raise ValueError("log_density and log_weights must be finite: the training may have diverged")
