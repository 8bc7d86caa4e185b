"""The paper's selection of the number of clusters, by penalised normalised entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import entr

from cmvae.clustering.arrays import BoolArray, FloatArray, IntArray
from cmvae.clustering.assignment import check_densities, posterior_and_evidence


@dataclass(frozen=True)
class Selection:
    """Outcome of the entropy-based selection: the kept clusters, and the curve behind the choice.

    Point s of the curve stands for a set of `num_clusters[s]` clusters: the first for all C, every next one
    for the set before it without `dropped[s]`, the last for two clusters.
    """

    active: BoolArray
    """(C,) the clusters that are kept."""
    num_clusters: IntArray
    """(S,) sizes of the sets, C, C − 1, …, 2."""
    criterion: FloatArray
    """(S,) penalised normalised entropy, `entropy_term` + `likelihood_term`; the smallest wins."""
    entropy_term: FloatArray
    """(S,) β · mean of H[p(c|z)] over its largest possible value, in [0, β]."""
    likelihood_term: FloatArray
    """(S,) −mean of log p(z) / dim z, in nats a dimension."""
    dropped: IntArray
    """(S − 1,) ids of the clusters in the order in which they were dropped."""


def select_clusters(
    log_density: FloatArray,
    log_weights: FloatArray,
    beta: float,
    shared_dim: int,
    normaliser: Literal["active", "initial"] = "active",
) -> Selection:
    """Entropy-based selection of the number of clusters (CMVAE, "penalised normalised entropy").

    For a set of clusters the criterion is β · mean H[p(c|z)] / log(number of clusters) −
    mean log p(z) / dim z, means over samples and modalities, π renormalised. From all C clusters, the one
    of the lowest mass is dropped again and again; its mass is the sum over modalities of p(c|z) of the
    samples that the modality assigns to it. The set with the smallest criterion is kept, a single cluster
    excluded. Dropping clusters does not change the encodings, so that one encoding pass is enough.

    "Number of clusters" is read in two ways. "active", the default, counts the clusters of the set that some
    sample is assigned to: an empty cluster is then always better dropped, as it only keeps weight from the
    others. "initial" is always C: the released code adds 1e-20 to every probability before it counts those
    that are not zero. On well-separated clusters both select the same. Where clusters overlap they differ:
    with the larger normaliser the entropy weighs less and the likelihood more at first, but merging clusters
    costs nothing in the normaliser, so that "initial" can merge true clusters, at worst down to two.

    Args:
        log_density: (N, M, C) log p(z_nm | c) on validation data, in nats.
        log_weights: (C,) log π_c.
        beta: β of the objective.
        shared_dim: dimensions of z.
        normaliser: which clusters the largest possible entropy counts, at least two.

    Raises:
        ValueError: shapes disagree, a value is not finite, or there are fewer than two clusters.
    """
    check_densities(log_density, log_weights)
    total = log_weights.shape[0]
    if total < 2:
        raise ValueError("selection needs at least two clusters")
    remaining = np.arange(total)
    # A copy that shrinks: every step then costs in proportion to the clusters that are left.
    log_density, log_weights = log_density.astype(np.float64), log_weights.astype(np.float64)
    entropy_terms, likelihood_terms, dropped = [], [], []
    while True:
        posterior, log_evidence = posterior_and_evidence(log_density, log_weights)
        mass = _mass(posterior)
        num_active = max(2, int(np.count_nonzero(mass))) if normaliser == "active" else total
        entropy_terms.append(beta * entr(posterior).sum(axis=2).mean() / np.log(num_active))
        likelihood_terms.append(-log_evidence.mean() / shared_dim)
        if len(remaining) == 2:
            break
        # Several clusters may have no samples at all; among them the one with the least weight goes.
        lowest = np.lexsort((log_weights, mass))[0]
        dropped.append(remaining[lowest])
        remaining = np.delete(remaining, lowest)
        log_density = np.delete(log_density, lowest, axis=2)
        log_weights = np.delete(log_weights, lowest)
    criterion = np.add(entropy_terms, likelihood_terms)
    active = np.ones(total, dtype=bool)
    active[dropped[: criterion.argmin()]] = False
    return Selection(
        active=active,
        num_clusters=np.arange(total, 1, -1),
        criterion=criterion,
        entropy_term=np.array(entropy_terms),
        likelihood_term=np.array(likelihood_terms),
        dropped=np.array(dropped, dtype=np.int64),
    )


def _mass(posterior: FloatArray) -> FloatArray:
    """Mass of each cluster (C,): summed confidence of what is assigned to it, over samples and modalities."""
    mass = np.zeros(posterior.shape[2])
    np.add.at(mass, posterior.argmax(axis=2), posterior.max(axis=2))
    return mass
