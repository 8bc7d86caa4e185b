"""Precision and recall, density and coverage: blur and mode loss told apart.

Precision and recall: Kynkäänniemi et al., 2019; density and coverage: Naeem et al., 2020. Both take the balls
around one set's features that reach to the k-th nearest neighbour within the set as that set's support. (The
authors' package `prdc` has had no release since 2020, and torch-fidelity has the first two only.)
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.spatial.distance import cdist

from cmvae.clustering import FloatArray

NUM_NEIGHBOURS = 5
"""K, as Naeem et al. recommend."""

# Distances that are held at once: 128 MB.
_CHUNK_ELEMENTS = 1 << 24


def fidelity(real: FloatArray, generated: FloatArray, k: int = NUM_NEIGHBOURS) -> dict[str, float]:
    """How well two sets of features cover each other.

    All four depend on the sizes of the sets, so they are compared at equal size only.

    Args:
        real: (N, F).
        generated: (N, F), as many.
        k: neighbours that a ball reaches to; less than N.

    Returns:
        `precision`: share of generated samples in any real ball. `recall`: share of real samples in any
        generated ball. `density`: number of real balls around a generated sample, over k; may exceed 1.
        `coverage`: share of real balls that hold a generated sample.

    Raises:
        ValueError: the sets differ in size, or have at most k samples.
    """
    if len(real) != len(generated) or len(real) <= k:
        raise ValueError(f"{len(real)} real and {len(generated)} generated samples, k = {k}")
    real_radius, generated_radius = _radii(real, k), _radii(generated, k)
    balls_around = np.zeros(len(generated), dtype=np.int64)
    recalled, covered = [], []
    for rows, distances in _distances(real, generated):
        in_real_ball = distances <= real_radius[rows, None]
        balls_around += in_real_ball.sum(axis=0)
        covered.append(in_real_ball.any(axis=1))
        recalled.append((distances <= generated_radius).any(axis=1))
    return {
        "precision": float(np.mean(balls_around > 0)),
        "recall": float(np.concatenate(recalled).mean()),
        "density": float(np.mean(balls_around) / k),
        "coverage": float(np.concatenate(covered).mean()),
    }


def _radii(features: FloatArray, k: int) -> FloatArray:
    """Distance of every sample to its k-th nearest neighbour, (N,)."""
    # The nearest of all is the sample itself.
    return np.concatenate(
        [np.partition(distances, k, axis=1)[:, k] for _, distances in _distances(features, features)]
    )


def _distances(a: FloatArray, b: FloatArray) -> Iterator[tuple[slice, FloatArray]]:
    """Euclidean distances in float64, some rows of `a` at a time: the rows and (rows, len(b))."""
    step = max(1, _CHUNK_ELEMENTS // len(b))
    for start in range(0, len(a), step):
        rows = slice(start, start + step)
        yield rows, cdist(a[rows], b)
