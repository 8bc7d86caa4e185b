"""Statistics that tell clusters apart, as pure functions of counts and moments."""

from __future__ import annotations

import numpy as np

from cmvae.clustering import FloatArray, IntArray


def standardized_differences(counts: IntArray, sums: FloatArray, squares: FloatArray) -> FloatArray:
    """Cohen's d of each cluster against all other samples, for each column.

    d is the difference of the two means, divided by the pooled standard deviation.

    Args:
        counts: (C,) number of samples of each cluster.
        sums: (C, D) sum of each column.
        squares: (C, D) sum of the squares of each column.

    Returns:
        (C, D). Infinite where a column is constant inside and constant outside at another value; 0 where it
        is constant, or where there are no samples inside or outside.
    """
    inside = counts[:, None].astype(np.float64)
    outside = inside.sum() - inside
    rest, rest_squares = sums.sum(0) - sums, squares.sum(0) - squares
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = sums / inside - rest / outside
        scatter = squares - sums**2 / inside + rest_squares - rest**2 / outside
        # What is left of the cancellation of two large sums is no scatter.
        scatter = np.where(scatter > 1e-12 * squares.sum(0), scatter, 0)
        found = difference / np.sqrt(scatter / (inside + outside - 2))
    found[np.broadcast_to((inside == 0) | (outside == 0), found.shape)] = 0
    found[(np.abs(difference) <= 1e-6) & (scatter == 0)] = 0
    return found


def class_tfidf(counts: IntArray) -> FloatArray:
    """Class-based TF-IDF (Grootendorst, 2022): words that are frequent in one cluster and rare in others.

    The weight is tf · log(1 + A / f). tf is the share of the word among the words of the cluster, f its
    number in all clusters, and A the number of words per cluster.

    Args:
        counts: (C, V) number of occurrences of each word in each cluster.

    Returns:
        (C, V); 0 for words and clusters without occurrences.
    """
    per_cluster, per_word = counts.sum(1, keepdims=True), counts.sum(0)
    share = counts / np.maximum(per_cluster, 1)
    return share * np.log1p(per_cluster.mean() / np.maximum(per_word, 1))


def lift(counts: IntArray) -> FloatArray:
    """Lift of each category in each cluster: its share in the cluster, divided by its share in all clusters.

    Args:
        counts: (C, K) number of samples of each cluster and category.

    Returns:
        (C, K); 0 for categories and clusters without samples.
    """
    inside = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    overall = counts.sum(0) / max(counts.sum(), 1)
    return np.divide(inside, overall, out=np.zeros(counts.shape), where=overall > 0)
