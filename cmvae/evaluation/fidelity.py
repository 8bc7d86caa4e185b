"""Precision, recall, density and coverage, which tell blur from mode loss.

Precision and recall: Kynkäänniemi et al., 2019; density and coverage: Naeem et al., 2020. The support of a
set is the union of the balls around its features that reach to their k-th nearest neighbours within the set.
The authors' package `prdc` has had no release since 2020, and torch-fidelity has precision and recall only.
"""

from __future__ import annotations

import numpy as np
from sklearn.metrics import pairwise_distances_chunked

from cmvae.clustering import FloatArray

NUM_NEIGHBOURS = 5
"""K, as Naeem et al. recommend."""

# Unlike sklearn's "euclidean", not computed by way of a dot product, which rounds distances of zero.
_METRIC = "sqeuclidean"


def fidelity(
    real: FloatArray, generated: FloatArray, k: int = NUM_NEIGHBOURS, working_memory: float = 128
) -> dict[str, float]:
    """Measure how well two sets of features cover each other.

    The values depend on the sizes of the sets, so they are comparable at equal sizes only.

    Args:
        real: (N, F).
        generated: (N, F).
        k: neighbours that a ball reaches to; less than N.
        working_memory: memory for distances that are held at once, in MiB.

    Returns:
        `precision`: share of generated samples in any real ball. `recall`: share of real samples in any
        generated ball. `density`: number of real balls around a generated sample, divided by k; may exceed 1.
        `coverage`: share of real balls that contain a generated sample.

    Raises:
        ValueError: the sets differ in size, or have at most k samples.
    """
    if len(real) != len(generated) or len(real) <= k:
        raise ValueError(f"{len(real)} real and {len(generated)} generated samples, k = {k}")
    real_radius = _squared_radii(real, k, working_memory)
    generated_radius = _squared_radii(generated, k, working_memory)
    balls_around = np.zeros(len(generated), dtype=np.int64)
    recalled, covered = [], []
    start = 0
    for distances in pairwise_distances_chunked(
        real, generated, metric=_METRIC, working_memory=working_memory
    ):
        in_real_ball = distances <= real_radius[start : start + len(distances), None]
        start += len(distances)
        balls_around += in_real_ball.sum(axis=0)
        covered.append(in_real_ball.any(axis=1))
        recalled.append((distances <= generated_radius).any(axis=1))
    return {
        "precision": float(np.mean(balls_around > 0)),
        "recall": float(np.concatenate(recalled).mean()),
        "density": float(np.mean(balls_around) / k),
        "coverage": float(np.concatenate(covered).mean()),
    }


def _squared_radii(features: FloatArray, k: int, working_memory: float) -> FloatArray:
    """Squared distance (N,) of every sample to its k-th nearest neighbour."""
    # The nearest of all is the sample itself.
    chunks = pairwise_distances_chunked(features, metric=_METRIC, working_memory=working_memory)
    return np.concatenate([np.partition(distances, k, axis=1)[:, k] for distances in chunks])
