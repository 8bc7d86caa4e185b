"""Statistics of clusters against scipy, scikit-learn and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import ttest_ind

from cmvae.evaluation.cluster_profiles import class_tfidf, lift, standardized_differences


def moments(values, clusters, num_clusters):
    """Counts, sums and sums of squares per cluster."""
    rows = [values[clusters == c] for c in range(num_clusters)]
    return (
        np.array([len(row) for row in rows]),
        np.array([row.sum(0) for row in rows]),
        np.array([np.square(row).sum(0) for row in rows]),
    )


def test_the_effect_size_is_that_of_students_t_test():
    rng = np.random.default_rng(0)
    clusters = rng.integers(3, size=400)
    values = rng.normal([0, 5], [1, 3], size=(400, 2)) + clusters[:, None] * [0.5, -2]
    found = standardized_differences(*moments(values, clusters, 3))
    for c in range(3):
        own, rest = values[clusters == c], values[clusters != c]
        t = ttest_ind(own, rest).statistic  # Student's, with the pooled variance
        np.testing.assert_allclose(found[c], t * np.sqrt(1 / len(own) + 1 / len(rest)))


def test_effect_sizes_without_scatter_or_samples():
    values = np.array([[1.0, 7.0], [1.0, 7.0], [2.0, 7.0], [2.0, 7.0]])
    found = standardized_differences(*moments(values, np.array([0, 0, 1, 1]), 3))
    assert found[0].tolist() == [-np.inf, 0]
    assert found[1].tolist() == [np.inf, 0]
    assert found[2].tolist() == [0, 0], "an empty cluster"
    only = standardized_differences(*moments(values, np.zeros(4, dtype=int), 1))
    assert only.tolist() == [[0, 0]], "nothing to compare with"


def test_class_tfidf_is_the_formula_of_bertopic():
    counts = np.array([[8, 2, 0, 10], [0, 4, 0, 6]])
    found = class_tfidf(counts)
    # A = (20 + 10) / 2 words per cluster.
    assert found[0, 0] == pytest.approx(8 / 20 * np.log(1 + 15 / 8))
    assert found[1, 1] == pytest.approx(4 / 10 * np.log(1 + 15 / 6))
    assert found[:, 2].tolist() == [0, 0], "a word that never occurs"
    assert class_tfidf(np.array([[0, 0], [1, 1]]))[0].tolist() == [0, 0], "a cluster without words"
    # The characteristic word of a cluster beats the one that is frequent everywhere.
    assert class_tfidf(np.array([[30, 40], [0, 40], [0, 40], [0, 40]]))[0].argmax() == 0


def test_lift_is_the_ratio_of_shares():
    found = lift(np.array([[30, 10, 0], [10, 50, 0]]))
    np.testing.assert_allclose(found, [[0.75 / 0.4, 0.25 / 0.6, 0], [(1 / 6) / 0.4, (5 / 6) / 0.6, 0]])
    assert lift(np.array([[0, 0], [2, 2]])).tolist() == [[0, 0], [1, 1]]
