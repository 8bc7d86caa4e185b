"""The paper's selection of the number of clusters by penalised normalised entropy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy.special import entr

from cmvae.clustering.arrays import BoolArray, FloatArray, IntArray
from cmvae.clustering.assignment import check_densities, posterior_and_evidence


@dataclass(frozen=True)
class Selection:
    """Result of the selection: the clusters that are kept, and the criterion for every number of clusters.

    Set 0 has all C clusters, set s + 1 is set s without cluster `dropped[s]`, and the last set has two.
    """

    active: BoolArray
    """(C,) bool, the clusters that are kept."""
    num_clusters: IntArray
    """(S,) number of clusters of each set: C, C − 1, …, 2."""
    criterion: FloatArray
    """(S,) penalised normalised entropy, `entropy_term` + `likelihood_term`; the minimum is selected."""
    entropy_term: FloatArray
    """(S,) β · mean of H[p(c|z)], divided by its largest possible value; in [0, β]."""
    likelihood_term: FloatArray
    """(S,) −mean of log p(z) / dim z, in nats per dimension."""
    dropped: IntArray
    """(S − 1,) cluster ids in the order in which they were dropped."""


def select_clusters(
    log_density: FloatArray,
    log_weights: FloatArray,
    beta: float,
    shared_dim: int,
    normaliser: Literal["active", "initial"] = "active",
) -> Selection:
    """Select the number of clusters by the penalised normalised entropy of the paper.

    The criterion of a set of clusters is
    β · mean H[p(c|z)] / log(number of clusters) − mean log p(z) / dim z, with means over samples and
    modalities, and π renormalised. Starting from all C clusters, the cluster with the lowest mass is dropped
    until two are left; the mass of a cluster is the sum of p(c|z) over the samples and modalities that are
    assigned to it. The set with the smallest criterion is kept. Encodings do not depend on the set, so one
    encoding pass is enough.

    `normaliser` defines the number of clusters in the criterion:

    - "active": the clusters of the set with at least one assigned sample. Dropping an empty cluster then
      always improves the criterion, because its weight goes to the others.
    - "initial": always C, as in the released code, which adds 1e-20 to every probability before it counts
      those that are not zero.

    On well-separated clusters both select the same number. If clusters overlap, the larger normaliser of
    "initial" gives the entropy less weight at first, but it does not shrink with the set, so "initial" can
    merge true clusters, in the worst case down to two.

    Args:
        log_density: (N, M, C) log p(z_nm | c) on validation data, in nats.
        log_weights: (C,) log π_c.
        beta: β of the objective.
        shared_dim: dimension of z.
        normaliser: definition of the number of clusters; "active" counts at least two.

    Raises:
        ValueError: shapes do not match, a value is not finite, or there are fewer than two clusters.
    """
    check_densities(log_density, log_weights)
    total = log_weights.shape[0]
    if total < 2:
        raise ValueError("selection needs at least two clusters")
    remaining = np.arange(total)
    # Copies that shrink, so that the cost of a step is proportional to the number of remaining clusters.
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
        # Several clusters may have no samples; the one with the smallest weight is dropped first.
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
    """Mass of each cluster, (C,): sum of p(c|z) over the samples and modalities that are assigned to it."""
    mass = np.zeros(posterior.shape[2])
    np.add.at(mass, posterior.argmax(axis=2), posterior.max(axis=2))
    return mass
