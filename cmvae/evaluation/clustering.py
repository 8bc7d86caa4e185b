"""Encode a split once, and say from that what the clusters are worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cmvae.clustering import Selection, clustering_metrics, responsibilities, select_clusters, vote
from cmvae.data.batch import to_device
from cmvae.model import CMVAE, stack_shared_locations


@dataclass(frozen=True)
class EncodedSplit:
    """A split at the locations of its posteriors; N samples, M modalities, C clusters, before selection."""

    log_density: np.ndarray
    """(N, M, C) log p(z|c), in nats."""
    shared_loc: np.ndarray
    """(N, M, D_z)."""
    label: np.ndarray
    """(N,), −1 where there is none."""


@torch.no_grad()
def encode_split(model: CMVAE, batches: Iterable[Mapping[str, Any]]) -> EncodedSplit:
    """One pass of the encoders over a split.

    Args:
        model: in evaluation mode, on its device.
        batches: of the split, padding marked in `valid`.
    """
    device = model.private_scale.device
    log_density, shared_loc, label = [], [], []
    for raw in batches:
        batch = to_device(raw, device)
        z = stack_shared_locations(model.encode({name: batch[name] for name in model.modality_names}))
        valid = batch["valid"]
        log_density.append(model.cluster_prior(z)[1][valid].cpu().numpy())
        shared_loc.append(z[valid].cpu().numpy())
        label.append(batch["label"][valid].cpu().numpy())
    return EncodedSplit(*(np.concatenate(parts) for parts in (log_density, shared_loc, label)))


def select_model_clusters(model: CMVAE, validation: EncodedSplit, beta: float) -> Selection:
    """The entropy-based selection among all clusters of a model; leaves the model as it is.

    Args:
        model: whose prior is asked.
        validation: the encoded validation split.
        beta: β of the objective.
    """
    return select_clusters(
        validation.log_density, all_log_weights(model), beta, shared_dim=model.config.shared_dim
    )


def all_log_weights(model: CMVAE) -> np.ndarray:
    """Log π (C,) of all clusters, as if none had been dropped."""
    return model.cluster_prior.logits.detach().log_softmax(-1).cpu().numpy()


def evaluate_clusters(
    split: EncodedSplit, log_weights: np.ndarray, active: np.ndarray
) -> tuple[dict[str, float], np.ndarray]:
    """Clusters of a split and, where it has labels, their agreement with them.

    Args:
        split: the encoded split.
        log_weights: log π of all clusters, (C,).
        active: the selected clusters, (C,) bool.

    Returns:
        `clustering/num_clusters` (selected), and where there are labels `clustering/{acc,nmi,ari,purity}` and
        the same under `clustering_all/` with every cluster, before selection; and the voted clusters (N,).
    """
    assignments = vote(responsibilities(split.log_density, log_weights, active))
    metrics = {"clustering/num_clusters": float(active.sum())}
    labelled = split.label >= 0
    if labelled.any():
        everything = vote(responsibilities(split.log_density, log_weights, np.ones_like(active)))
        for group, clusters in (("clustering", assignments), ("clustering_all", everything)):
            agreement = clustering_metrics(clusters[labelled], split.label[labelled])
            metrics |= {f"{group}/{name}": agreement[name] for name in ("acc", "nmi", "ari", "purity")}
    return metrics, assignments
