"""New means for the mixture prior during training, from k-means on the encodings."""

from __future__ import annotations

import itertools
import math

import numpy as np
from scipy.special import entr

from cmvae.clustering.arrays import BoolArray, FloatArray, IntArray

CENTRES_PER_COMPONENT = 0.6
"""Number of k-means centres per component of the mixture, in `find_cluster_means`."""
MERGE_BELOW = 0.35
"""`merge_pieces` merges two pieces if the agreement of the modalities on them is below this fraction of the
agreement on all pieces."""
MEANS_SPREAD = 0.1
"""Largest offset of a mean from its k-means centre, per dimension, where the scale of p(z|c) is 1."""
_STARTS = 4


def find_cluster_means(shared_loc: FloatArray, present: BoolArray, num_clusters: int) -> FloatArray:
    """Find means for C components of the mixture prior, from k-means on the locations of all modalities.

    C usually exceeds the number of classes. With C centres, k-means would split classes into pieces, the
    decoders would learn to keep these pieces apart, and the selection would find too many clusters. So
    k-means gets fewer centres, `merge_pieces` merges those that split a class, and several components start
    at the same centre. If a class needs more than one component, training moves them apart; otherwise the
    selection drops all but one.

    Args:
        shared_loc: (N, M, D) locations of q(z|x_m).
        present: (N, M) bool, the modalities that a sample has.
        num_clusters: C, the number of components.

    Returns:
        (C, D) float32: the centres in order of size, largest first, repeated until there are C, each shifted
        by up to `MEANS_SPREAD` in every dimension. Deterministic.
    """
    from sklearn.cluster import KMeans

    points = shared_loc[present]
    num_pieces = min(math.ceil(CENTRES_PER_COMPONENT * num_clusters), len(points))
    pieces = np.full(present.shape, -1)
    pieces[present] = KMeans(num_pieces, n_init=_STARTS, random_state=0).fit(points).labels_
    # Renumbered without gaps: k-means finds fewer pieces if points are equal.
    _, labels = np.unique(merge_pieces(pieces, num_pieces)[pieces[present]], return_inverse=True)
    centres = np.array([points[labels == label].mean(0) for label in range(labels.max() + 1)])
    largest_first = np.argsort(-np.bincount(labels), kind="stable")
    offsets = np.random.default_rng(0).uniform(-MEANS_SPREAD, MEANS_SPREAD, (num_clusters, points.shape[1]))
    means = centres[np.resize(largest_first, num_clusters)] + offsets
    return means.astype(np.float32)


def merge_pieces(pieces: IntArray, num_pieces: int) -> IntArray:
    """Merge k-means pieces on which the modalities do not agree, because such pieces split one class.

    The modalities of a sample share its class and nothing else. If two pieces are two classes, the modalities
    of a sample fall into the same piece. If they split one class, the piece of one modality says nothing
    about the piece of another. The agreement on two pieces, see `piece_agreement`, is 1 in the first case and
    0 in the second.

    The pair with the lowest agreement is merged, repeatedly, as in the agglomerative information bottleneck
    (Slonim and Tishby, 1999), until the lowest agreement is at least `MERGE_BELOW` times the agreement on all
    pieces: the mutual information between the pieces of two modalities, divided by the entropy of the pieces.

    Args:
        pieces: (N, M) piece of each modality of each sample, from 0; −1 for a missing modality.
        num_pieces: P, the number of pieces.

    Returns:
        (P,) the merged piece that each piece belongs to, from 0 without gaps. All pieces stay apart if no
        sample has two modalities.
    """
    joint = np.zeros((num_pieces, num_pieces))
    for one, other in itertools.permutations(pieces.T, 2):
        both = (one >= 0) & (other >= 0)
        np.add.at(joint, (one[both], other[both]), 1)
    merged = np.arange(num_pieces)
    if np.count_nonzero(joint.sum(0)) < 2:
        return merged  # fewer than two pieces, or no sample with two modalities
    joint /= joint.sum()
    entropy = entr(joint.sum(0)).sum()
    threshold = MERGE_BELOW * (2 * entropy - entr(joint).sum()) / entropy
    while len(joint) > 1:
        agreement = piece_agreement(joint)
        first, second = sorted(np.unravel_index(agreement.argmin(), agreement.shape))
        if agreement[first, second] >= threshold:
            break
        joint[first] += joint[second]
        joint[:, first] += joint[:, second]
        joint = np.delete(np.delete(joint, second, axis=0), second, axis=1)
        merged[merged == second] = first
        merged[merged > second] -= 1
    return merged


def piece_agreement(joint: FloatArray) -> FloatArray:
    """Agreement of the modalities on each pair of pieces.

    The agreement on pieces a and b is the mutual information between the pieces of two modalities that is
    lost by merging a and b, divided by p(a or b) times the entropy of the choice between a and b.

    Args:
        joint: J, (P, P), symmetric: joint distribution of the pieces of two modalities of a sample.

    Returns:
        (P, P). Infinite on the diagonal, and for pieces of probability 0, so that they are never merged.
    """
    # With e(x) = −x log x, the mutual information is 2 Σ e(p) − Σ e(J), where p are the row sums of J.
    own, terms = joint.diagonal(), entr(joint)
    # Rows a and b of J without columns a and b: before and after they are added.
    rest = terms.sum(1) - terms.diagonal()
    rest_before = rest[:, None] + rest - 2 * terms
    in_own_columns = entr(joint + own)
    added = np.array([entr(joint + row).sum(1) for row in joint])
    rest_after = added - in_own_columns - in_own_columns.T
    # The four entries in rows and columns a and b, which become one.
    block_before = terms.diagonal()[:, None] + terms.diagonal() + 2 * terms
    block_after = entr(own[:, None] + own + 2 * joint)
    share = joint.sum(0)
    entropy = entr(share)[:, None] + entr(share) - entr(share[:, None] + share)
    loss = 2 * entropy - 2 * (rest_before - rest_after) - (block_before - block_after)
    agreement = np.divide(loss, entropy, out=np.full_like(loss, np.inf), where=entropy > 0)
    np.fill_diagonal(agreement, np.inf)
    return agreement
