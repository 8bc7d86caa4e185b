"""Coherence: how often generated samples have the class of what they were generated from.

Functions of predicted classes. Source: the protocols of MMVAE (Shi et al., 2019) and MMVAE+ (Palumbo et al.,
2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cmvae.clustering import FloatArray, IntArray

Sources = tuple[str, ...]
"""Modalities that a sample was generated from."""


def conditional_coherence(
    predicted: Mapping[Sources, Mapping[str, IntArray]], label: Mapping[Sources, IntArray]
) -> dict[str, float]:
    """Share of conditional samples that are classified as the class of their sources.

    Args:
        predicted: sources → target → predicted classes (n,) of the generated target, n samples that have the
            sources.
        label: sources → classes (n,) of these samples.

    Returns:
        `coherence/matrix/SOURCE/TARGET` of every pair, with SOURCE itself; `coherence/conditional`, the mean
        over ordered pairs of different modalities; `coherence/conditional_by_sources/S`, the mean over all
        sets of S sources and the targets outside of the set.
    """
    metrics = {}
    outside: dict[int, list[float]] = {}
    for sources, targets in predicted.items():
        for target, classes in targets.items():
            share = float(np.mean(classes == label[sources]))
            if len(sources) == 1:
                metrics[f"coherence/matrix/{sources[0]}/{target}"] = share
            if target not in sources:
                outside.setdefault(len(sources), []).append(share)
    for num_sources, shares in outside.items():
        metrics[f"coherence/conditional_by_sources/{num_sources}"] = float(np.mean(shares))
    if 1 in outside:
        metrics["coherence/conditional"] = float(np.mean(outside[1]))
    return metrics


def unconditional_coherence(predicted: Mapping[str, IntArray]) -> float:
    """Share of joint samples in which all modalities are classified as the same class.

    Args:
        predicted: modality → predicted classes (N,).
    """
    first, *others = predicted.values()
    return float(np.mean(np.all([classes == first for classes in others], axis=0)))


def coherence_matrix(
    metrics: Mapping[str, float], sources: Sequence[str], targets: Sequence[str]
) -> FloatArray:
    """`coherence/matrix/SOURCE/TARGET` as an array (sources, targets)."""
    return np.array(
        [[metrics[f"coherence/matrix/{source}/{target}"] for target in targets] for source in sources]
    )
