"""Clusters as pure functions of numpy arrays: assignment, number of clusters, hierarchy and scores.

"The paper" is CMVAE (Palumbo et al., ICLR 2024).
"""

from cmvae.clustering.arrays import BoolArray, FloatArray, IntArray
from cmvae.clustering.assignment import (
    confidence,
    joint_location,
    label_by_group,
    mean_by_group,
    number_groups,
    responsibilities,
    vote,
)
from cmvae.clustering.criteria import (
    Curve,
    agreement_curve,
    jaccard_stability,
    silhouette_curve,
    stability_curve,
)
from cmvae.clustering.hierarchy import ClusterHierarchy, merge_clusters, prune_clusters
from cmvae.clustering.refit import MEANS_SPREAD, find_cluster_means, merge_pieces
from cmvae.clustering.scores import clustering_metrics, confusion, matched_order
from cmvae.clustering.selection import Selection, select_clusters

__all__ = [
    "MEANS_SPREAD",
    "BoolArray",
    "ClusterHierarchy",
    "Curve",
    "FloatArray",
    "IntArray",
    "Selection",
    "agreement_curve",
    "clustering_metrics",
    "confidence",
    "confusion",
    "find_cluster_means",
    "jaccard_stability",
    "joint_location",
    "label_by_group",
    "matched_order",
    "mean_by_group",
    "merge_clusters",
    "merge_pieces",
    "number_groups",
    "prune_clusters",
    "responsibilities",
    "select_clusters",
    "silhouette_curve",
    "stability_curve",
    "vote",
]
