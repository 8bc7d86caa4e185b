"""Agreement of clusters with labels.

scikit-learn and scipy.optimize take as long to import as torch, so only the functions that need them do.
"""

from __future__ import annotations

import numpy as np

from cmvae.clustering.arrays import IntArray


def clustering_metrics(assignments: IntArray, labels: IntArray) -> dict[str, float]:
    """Score a clustering against labels.

    Args:
        assignments: (N,) cluster ids.
        labels: (N,) class ids.

    Returns:
        `num_clusters`, the number of clusters in use; `acc`, the accuracy under the best one-to-one matching
        of clusters to classes, where samples of unmatched clusters count as wrong; `nmi`, normalised by the
        arithmetic mean of the entropies; `ari`, the adjusted Rand index; `purity`, the accuracy if each
        cluster predicts its most frequent class.
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
    """Confusion matrix of classes and clusters, with clusters in the order of their matched classes.

    Args:
        assignments: (N,) cluster ids.
        labels: (N,) class ids below `num_classes`.
        num_classes: number of rows.

    Returns:
        counts: (num_classes, U) number of samples; U is the number of clusters in use. The clusters of the
            best one-to-one matching come first, in the order of the classes, then the others, largest first.
        cluster_ids: (U,) cluster id of each column.

    Raises:
        ValueError: a label is negative or not below `num_classes`.
    """
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must be in 0..{num_classes - 1}; leave out samples without a label")
    cluster_ids, columns = np.unique(assignments, return_inverse=True)
    counts = np.zeros((num_classes, len(cluster_ids)), dtype=np.int64)
    np.add.at(counts, (labels, columns), 1)
    order = matched_order(counts)
    return counts[:, order], cluster_ids[order]


def matched_order(counts: IntArray) -> IntArray:
    """Order of the columns of a confusion matrix, see `confusion`.

    Args:
        counts: (classes, U) number of samples of each class in each cluster.

    Returns:
        (U,) first the columns of the best one-to-one matching, in the order of the classes, then the others,
        largest first.
    """
    from scipy.optimize import linear_sum_assignment

    _, matched = linear_sum_assignment(counts, maximize=True)
    unmatched = np.setdiff1d(np.arange(counts.shape[1]), matched)
    unmatched = unmatched[np.argsort(-counts[:, unmatched].sum(axis=0), kind="stable")]
    return np.concatenate([matched, unmatched])
