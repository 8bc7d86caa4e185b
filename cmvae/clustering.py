"""What the model says about clusters: responsibilities, votes, how many clusters there are, and how good.

Pure functions of numpy arrays. One pass of the encoders over a data set gives `log_density`, of shape
(N, M, C): log p(z_nm | c) of sample n's encoding by modality m under cluster c. Everything else is
arithmetic on it. CMVAE is Palumbo et al., ICLR 2024.

scikit-learn and scipy.optimize take as long to import as torch, and every process that has a model imports
this: so the functions that want them import them.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import entr, logsumexp

FloatArray = npt.NDArray[np.floating]
IntArray = npt.NDArray[np.integer]
BoolArray = npt.NDArray[np.bool_]

CENTRES_SHARE = 0.6
"""Centres of k-means a cluster, in `find_cluster_means`."""
AGREEMENT = 0.35
"""Of two pieces of k-means about which modalities agree less than so many times as much as about all pieces,
`merge_pieces` makes one."""
MEANS_SPREAD = 0.1
"""How far its means are moved from their centres, where the scale of p(z|c) is 1."""
_STARTS = 4


@dataclass(frozen=True)
class Selection:
    """Outcome of the entropy-based selection: the kept clusters, and the curve behind the choice.

    Point s of the curve stands for a set of `num_clusters[s]` clusters: the first for all C, every next one
    for the set before it without `dropped[s]`, the last for two clusters.
    """

    active: BoolArray
    """(C,) the clusters that are kept."""
    num_clusters: IntArray
    """(S,) sizes of the sets, C, C − 1, …, 2."""
    criterion: FloatArray
    """(S,) penalised normalised entropy, `entropy_term` + `likelihood_term`; the smallest wins."""
    entropy_term: FloatArray
    """(S,) β · mean of H[p(c|z)] over its largest possible value, in [0, β]."""
    likelihood_term: FloatArray
    """(S,) −mean of log p(z) / dim z, in nats a dimension."""
    dropped: IntArray
    """(S − 1,) ids of the clusters in the order in which they were dropped."""


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
    _check(log_density, log_weights)
    if active.shape != log_weights.shape or not active.any():
        raise ValueError(f"active must be a mask over {log_weights.shape[0]} clusters with at least one set")
    posterior = np.zeros(log_density.shape)
    posterior[..., active], _ = _posterior(
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


def find_cluster_means(shared_loc: FloatArray, present: BoolArray, num_clusters: int) -> FloatArray:
    """Means for C clusters where the data is: centres of k-means, fewer than C, some of them shared.

    With as many centres as clusters, of which there are more than classes, k-means cuts classes into pieces,
    and a decoder that is trained on keeps the pieces apart, so that the selection sees too many clusters.
    With fewer, and with those made one that `merge_pieces` finds, clusters start side by side: a class that
    has a use for two of them pulls them apart, and of those that stay together all but one are dropped in
    the selection.

    Args:
        shared_loc: (N, M, D) locations in the shared space.
        present: (N, M), the modalities that a sample has.
        num_clusters: C.

    Returns:
        (C, D) float32: the centres, largest first, over and over until there are C, each moved by up to
        `MEANS_SPREAD` in every dimension. The same for the same points.
    """
    from sklearn.cluster import KMeans

    points = shared_loc[present]
    num_pieces = math.ceil(CENTRES_SHARE * num_clusters)
    pieces = np.full(present.shape, -1)
    pieces[present] = KMeans(num_pieces, n_init=_STARTS, random_state=0).fit(points).labels_
    # Numbered anew: k-means finds fewer pieces where points are equal.
    _, groups = np.unique(merge_pieces(pieces, num_pieces)[pieces[present]], return_inverse=True)
    centres = np.array([points[groups == group].mean(0) for group in range(groups.max() + 1)])
    largest_first = np.argsort(-np.bincount(groups), kind="stable")
    offsets = np.random.default_rng(0).uniform(-MEANS_SPREAD, MEANS_SPREAD, (num_clusters, points.shape[1]))
    means = centres[np.resize(largest_first, num_clusters)] + offsets
    return means.astype(np.float32)


def merge_pieces(pieces: IntArray, num_pieces: int) -> IntArray:
    """Make one of those pieces that modalities do not agree about: a class that was cut, seen without labels.

    The modalities of a sample share its class and nothing else. Two classes are told apart alike from all of
    them; which piece of one class a modality falls into says nothing about where another falls. So two
    pieces are told apart as well as they share information: what the mutual information between the pieces
    of two modalities loses when they become one, of the entropy of which of the two it is. That is 1 for two
    classes, and 0 for two halves of one. The pair with the least is merged, again and again, as in the
    agglomerative information bottleneck (Slonim and Tishby, 1999), while it has less than `AGREEMENT` times
    the same of all pieces: their mutual information, of their entropy.

    Args:
        pieces: (N, M) from 0, of every sample and modality; −1 where a sample lacks the modality.
        num_pieces: how many there are.

    Returns:
        (num_pieces,) the group of each, numbered from 0.
    """
    joint = np.zeros((num_pieces, num_pieces))
    for one, other in itertools.permutations(pieces.T, 2):
        both = (one >= 0) & (other >= 0)
        np.add.at(joint, (one[both], other[both]), 1)
    groups = np.arange(num_pieces)
    if np.count_nonzero(joint.sum(0)) < 2:
        return groups  # nothing to tell apart, or nothing that was seen through two modalities
    joint /= joint.sum()
    entropy = entr(joint.sum(0)).sum()
    needed = AGREEMENT * (2 * entropy - entr(joint).sum()) / entropy
    while len(joint) > 1:
        agreement = _agreement(joint)
        first, second = sorted(np.unravel_index(agreement.argmin(), agreement.shape))
        if agreement[first, second] >= needed:
            break
        joint[first] += joint[second]
        joint[:, first] += joint[:, second]
        joint = np.delete(np.delete(joint, second, axis=0), second, axis=1)
        groups[groups == second] = first
        groups[groups > second] -= 1
    return groups


def _agreement(joint: FloatArray) -> FloatArray:
    """Of every two pieces, see `merge_pieces`, (C, C); infinite on the diagonal.

    Args:
        joint: J, (C, C), symmetric: the share of samples and pairs of modalities in every two pieces.
    """
    # With e(x) = −x log x, the mutual information is 2 Σ e(p) − Σ e(J), p being the sums of J's rows.
    own, terms = joint.diagonal(), entr(joint)
    # Rows a and b of J without the columns a and b, before they are added up, and after.
    rest = terms.sum(1) - terms.diagonal()
    rest_before = rest[:, None] + rest - 2 * terms
    in_own_columns = entr(joint + own)
    added = np.array([entr(joint + row).sum(1) for row in joint])
    rest_after = added - in_own_columns - in_own_columns.T
    # The four entries where they meet, which become one.
    block_before = terms.diagonal()[:, None] + terms.diagonal() + 2 * terms
    block_after = entr(own[:, None] + own + 2 * joint)
    share = joint.sum(0)
    entropy = entr(share)[:, None] + entr(share) - entr(share[:, None] + share)
    loss = 2 * entropy - 2 * (rest_before - rest_after) - (block_before - block_after)
    # Of a piece that no sample of two modalities falls into nothing is known: it stays by itself.
    agreement = np.divide(loss, entropy, out=np.full_like(loss, np.inf), where=entropy > 0)
    np.fill_diagonal(agreement, np.inf)
    return agreement


def select_clusters(
    log_density: FloatArray,
    log_weights: FloatArray,
    beta: float,
    shared_dim: int,
    normaliser: Literal["active", "initial"] = "active",
) -> Selection:
    """Entropy-based selection of the number of clusters (CMVAE, "penalised normalised entropy").

    For a set of clusters the criterion is β · mean H[p(c|z)] / log(number of clusters) −
    mean log p(z) / dim z, means over samples and modalities, π renormalised. From all C clusters, the one
    of the lowest mass is dropped again and again; its mass is the sum over modalities of p(c|z) of the
    samples that the modality assigns to it. The set with the smallest criterion is kept, a single cluster
    excluded. Dropping clusters does not change the encodings, so that one encoding pass is enough.

    "Number of clusters" is read in two ways. "active", the default, counts the clusters of the set that some
    sample is assigned to: an empty cluster is then always better dropped, as it only keeps weight from the
    others. "initial" is always C: the released code adds 1e-20 to every probability before it counts those
    that are not zero. On well-separated clusters both select the same. Where clusters overlap they differ:
    with the larger normaliser the entropy weighs less and the likelihood more at first, but merging clusters
    costs nothing in the normaliser, so that "initial" can merge true clusters, at worst down to two.

    Args:
        log_density: (N, M, C) log p(z_nm | c) on validation data, in nats.
        log_weights: (C,) log π_c.
        beta: β of the objective.
        shared_dim: dimensions of z.
        normaliser: which clusters the largest possible entropy counts, at least two.

    Raises:
        ValueError: shapes disagree, a value is not finite, or there are fewer than two clusters.
    """
    _check(log_density, log_weights)
    total = log_weights.shape[0]
    if total < 2:
        raise ValueError("selection needs at least two clusters")
    remaining = np.arange(total)
    # A copy that shrinks: every step then costs in proportion to the clusters that are left.
    log_density, log_weights = log_density.astype(np.float64), log_weights.astype(np.float64)
    entropy_terms, likelihood_terms, dropped = [], [], []
    while True:
        posterior, log_evidence = _posterior(log_density, log_weights)
        mass = _mass(posterior)
        num_active = max(2, int(np.count_nonzero(mass))) if normaliser == "active" else total
        entropy_terms.append(beta * entr(posterior).sum(axis=2).mean() / np.log(num_active))
        likelihood_terms.append(-log_evidence.mean() / shared_dim)
        if len(remaining) == 2:
            break
        # Several clusters may have no samples at all; among them the one with the least weight goes.
        lowest = np.lexsort((log_weights, mass))[0]
        dropped.append(remaining[lowest])
        remaining = np.delete(remaining, lowest)
        log_density = np.delete(log_density, lowest, axis=2)
        log_weights = np.delete(log_weights, lowest)
    criterion = np.add(entropy_terms, likelihood_terms)
    active = np.ones(total, dtype=bool)
    active[dropped[: criterion.argmin()]] = False
    return Selection(
        active=active,
        num_clusters=np.arange(total, 1, -1),
        criterion=criterion,
        entropy_term=np.array(entropy_terms),
        likelihood_term=np.array(likelihood_terms),
        dropped=np.array(dropped, dtype=np.int64),
    )


def clustering_metrics(assignments: IntArray, labels: IntArray) -> dict[str, float]:
    """How well a clustering agrees with labels that it has not seen.

    Args:
        assignments: (N,) cluster ids.
        labels: (N,) class ids.

    Returns:
        `num_clusters` (how many are used), `acc` (accuracy under the best one-to-one matching of clusters
        to classes; samples of unmatched clusters count as wrong), `nmi` (normalised by the arithmetic
        mean), `ari`, `purity` (accuracy when every cluster stands for its most frequent class).
    """
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
    from sklearn.metrics.cluster import contingency_matrix

    counts = contingency_matrix(labels, assignments)
    matching = linear_sum_assignment(counts, maximize=True)
    return {
        "num_clusters": float(counts.shape[1]),
        "acc": float(counts[matching].sum() / counts.sum()),
        "nmi": float(normalized_mutual_info_score(labels, assignments)),
        "ari": float(adjusted_rand_score(labels, assignments)),
        "purity": float(counts.max(axis=0).sum() / counts.sum()),
    }


def confusion(assignments: IntArray, labels: IntArray, num_classes: int) -> tuple[IntArray, IntArray]:
    """Samples of every class in every used cluster, the clusters ordered by the class they match.

    Args:
        assignments: (N,) cluster ids.
        labels: (N,) class ids below `num_classes`.
        num_classes: number of rows.

    Returns:
        counts: (num_classes, U), U the number of used clusters. The columns are first the clusters with a
            class in the best one-to-one matching, in the order of the classes, then the others, the
            largest first.
        cluster_ids: (U,) which cluster each column is.

    Raises:
        ValueError: a label is negative or not below `num_classes`.
    """
    from scipy.optimize import linear_sum_assignment

    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must be in 0..{num_classes - 1}; leave out samples without one")
    cluster_ids, columns = np.unique(assignments, return_inverse=True)
    counts = np.zeros((num_classes, len(cluster_ids)), dtype=np.int64)
    np.add.at(counts, (labels, columns), 1)
    _, matched = linear_sum_assignment(counts, maximize=True)
    unmatched = np.setdiff1d(np.arange(len(cluster_ids)), matched)
    unmatched = unmatched[np.argsort(-counts[:, unmatched].sum(axis=0), kind="stable")]
    order = np.concatenate([matched, unmatched])
    return counts[:, order], cluster_ids[order]


def _posterior(log_density: FloatArray, log_weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """p(c | z) (N, M, C) and log p(z) (N, M) under renormalised weights."""
    log_joint = log_density + (log_weights - logsumexp(log_weights))
    log_evidence = logsumexp(log_joint, axis=2)
    return np.exp(log_joint - log_evidence[:, :, None]), log_evidence


def _mass(posterior: FloatArray) -> FloatArray:
    """Mass of each cluster (C,): summed confidence of what is assigned to it, over samples and modalities."""
    mass = np.zeros(posterior.shape[2])
    np.add.at(mass, posterior.argmax(axis=2), posterior.max(axis=2))
    return mass


def _check(log_density: FloatArray, log_weights: FloatArray) -> None:
    if log_density.ndim != 3 or log_weights.shape != log_density.shape[2:]:
        raise ValueError(
            f"log_density must be (N, M, C) and log_weights (C,), "
            f"not {log_density.shape} and {log_weights.shape}"
        )
    if not (np.isfinite(log_density).all() and np.isfinite(log_weights).all()):
        raise ValueError("log_density and log_weights must be finite; did the training diverge?")
