"""Coherence: how often what was generated belongs to the class that it should belong to.

Functions of the classes that classifiers read in what was generated. Source: the protocols of MMVAE (Shi et
al., 2019) and MMVAE+ (Palumbo et al., 2023).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cmvae.clustering import FloatArray, IntArray

Sources = tuple[str, ...]
"""The modalities that a generation was conditioned on."""


def conditional_coherence(
    read: Mapping[Sources, Mapping[str, IntArray]], label: Mapping[Sources, IntArray]
) -> dict[str, float]:
    """Share of conditional generations that are read as the class of what they were generated from.

    Args:
        read: sources → target → classes (n,) read in the target's generations, n samples that have the
            sources.
        label: sources → classes (n,) of these samples.

    Returns:
        `coherence/matrix/SOURCE/TARGET` of every pair, also SOURCE itself; `coherence/conditional`, the mean
        over ordered pairs of two modalities; and `coherence/conditional_by_sources/S`, the mean over all
        sets of S sources and the targets outside of the set.
    """
    metrics = {}
    outside: dict[int, list[float]] = {}
    for sources, targets in read.items():
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


def unconditional_coherence(read: Mapping[str, IntArray]) -> float:
    """Share of joint generations in which all modalities are read as the same class.

    Args:
        read: modality → classes (N,).
    """
    first, *others = read.values()
    return float(np.mean(np.all([classes == first for classes in others], axis=0)))


def coherence_matrix(
    metrics: Mapping[str, float], sources: Sequence[str], targets: Sequence[str]
) -> FloatArray:
    """`coherence/matrix/SOURCE/TARGET` as an array (sources, targets)."""
    return np.array(
        [[metrics[f"coherence/matrix/{source}/{target}"] for target in targets] for source in sources]
    )
