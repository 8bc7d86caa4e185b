"""Precision, recall, density and coverage against their definitions, spelt out in loops."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cmvae.evaluation.fidelity import fidelity


def by_definition(real, generated, k):
    """Naeem et al., equations 1 to 4."""

    def radius(points, i):
        return sorted(math.dist(points[i], other) for j, other in enumerate(points) if j != i)[k - 1]

    real_radius = [radius(real, i) for i in range(len(real))]
    generated_radius = [radius(generated, j) for j in range(len(generated))]
    inside = [[math.dist(x, y) <= r for x, r in zip(real, real_radius, strict=True)] for y in generated]
    return {
        "precision": sum(any(row) for row in inside) / len(generated),
        "recall": sum(
            any(math.dist(x, y) <= r for y, r in zip(generated, generated_radius, strict=True)) for x in real
        )
        / len(real),
        "density": sum(map(sum, inside)) / (k * len(generated)),
        "coverage": sum(any(row[i] for row in inside) for i in range(len(real))) / len(real),
    }


@pytest.mark.parametrize(("shift", "k"), [(0.0, 5), (0.7, 3), (2.0, 1)])
def test_all_four_are_what_their_definitions_say(shift, k):
    rng = np.random.default_rng(1)
    real, generated = rng.normal(size=(40, 3)), rng.normal(shift, 0.8, size=(40, 3))
    expected = by_definition(real, generated, k)
    assert fidelity(real, generated, k) == pytest.approx(expected)
    # Three rows of distances at a time, as with large sets.
    assert fidelity(real, generated, k, working_memory=3 * 40 * 8 / 2**20) == pytest.approx(expected)


def test_blur_and_mode_loss_are_told_apart():
    rng = np.random.default_rng(0)
    modes = rng.normal(0, 0.1, size=(200, 2)) + 5 * (np.arange(200) % 2)[:, None]
    one_mode = rng.normal(0, 0.1, size=(200, 2))
    lost = fidelity(modes, one_mode)
    assert lost["precision"] > 0.9
    assert lost["recall"] == pytest.approx(0.5, abs=0.1)
    assert lost["coverage"] < 0.55
    blurred = fidelity(modes, modes + rng.normal(0, 2, size=modes.shape))
    assert blurred["precision"] < 0.2
    assert blurred["recall"] > 0.9
    assert fidelity(modes, modes + 100) == dict.fromkeys(lost, 0.0)


def test_sets_that_cannot_be_compared_are_refused():
    points = np.zeros((6, 2))
    with pytest.raises(ValueError, match="6 real and 5 generated"):
        fidelity(points, points[:5])
    with pytest.raises(ValueError, match="k = 6"):
        fidelity(points, points, k=6)
