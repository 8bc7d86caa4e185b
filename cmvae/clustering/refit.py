"""Cluster means for a training that goes on, found where the data is."""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy.special import entr

from cmvae.clustering.arrays import BoolArray, FloatArray, IntArray

CENTRES_SHARE = 0.6
"""Centres of k-means a cluster, in `find_cluster_means`."""
AGREEMENT = 0.35
"""Of two pieces of k-means about which modalities agree less than so many times as much as about all pieces,
`merge_pieces` makes one."""
MEANS_SPREAD = 0.1
"""How far its means are moved from their centres, where the scale of p(z|c) is 1."""
_STARTS = 4


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
