"""Coherence of classes that are known."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cmvae.evaluation.coherence import coherence_matrix, conditional_coherence, unconditional_coherence

NAMES = ("m0", "m1", "m2")


def readings(labels, change):
    """What classifiers would read, for every set of one or two sources."""
    read = {}
    for sources in [(name,) for name in NAMES] + list(itertools.combinations(NAMES, 2)):
        targets = NAMES if len(sources) == 1 else [name for name in NAMES if name not in sources]
        read[sources] = {target: change(labels) for target in targets}
    return read


def coherence_of(read, labels):
    return conditional_coherence(read, dict.fromkeys(read, labels))


def test_true_classes_are_fully_coherent_and_shuffled_ones_one_in_ten():
    rng = np.random.default_rng(0)
    labels = rng.integers(10, size=20_000)
    perfect = coherence_of(readings(labels, np.copy), labels)
    assert set(perfect.values()) == {1.0}
    shuffled = coherence_of(readings(labels, rng.permutation), labels)
    assert shuffled["coherence/conditional"] == pytest.approx(0.1, abs=0.005)
    assert unconditional_coherence(dict.fromkeys(NAMES, labels)) == 1.0
    independent = {name: rng.permutation(labels) for name in NAMES}
    assert unconditional_coherence(independent) == pytest.approx(0.01, abs=0.003)


def test_means_leave_out_what_they_should():
    labels = np.zeros(100, dtype=int)

    def share(percent):
        return np.where(np.arange(100) < percent, 0, 1)

    read = {
        ("m0",): {"m0": share(100), "m1": share(10), "m2": share(20)},
        ("m1",): {"m0": share(30), "m1": share(100), "m2": share(40)},
        ("m2",): {"m0": share(50), "m1": share(60), "m2": share(100)},
        ("m0", "m1"): {"m2": share(70)},
        ("m0", "m2"): {"m1": share(80)},
    }
    metrics = coherence_of(read, labels)
    assert metrics["coherence/conditional"] == pytest.approx(0.35)  # the diagonal is no part of it
    assert metrics["coherence/conditional_by_sources/1"] == pytest.approx(0.35)
    assert metrics["coherence/conditional_by_sources/2"] == pytest.approx(0.75)
    matrix = coherence_matrix(metrics, NAMES, NAMES)
    np.testing.assert_allclose(matrix, [[1, 0.1, 0.2], [0.3, 1, 0.4], [0.5, 0.6, 1]])


def test_unconditional_coherence_asks_all_modalities_to_agree():
    read = {"m0": np.array([1, 2, 3, 4]), "m1": np.array([1, 2, 3, 0]), "m2": np.array([1, 0, 3, 0])}
    assert unconditional_coherence(read) == 0.5


def test_every_source_is_compared_with_the_samples_that_have_it():
    read = {
        ("m0",): {"m0": np.array([0, 1, 2]), "m1": np.array([0, 1, 0])},
        ("m1",): {"m0": np.array([2]), "m1": np.array([1])},
    }
    label = {("m0",): np.array([0, 1, 2]), ("m1",): np.array([2])}
    metrics = conditional_coherence(read, label)
    matrix = coherence_matrix(metrics, ("m0", "m1"), ("m1", "m0"))
    np.testing.assert_allclose(matrix, [[2 / 3, 1], [0, 1]])
    assert metrics["coherence/conditional"] == pytest.approx((2 / 3 + 1) / 2)
