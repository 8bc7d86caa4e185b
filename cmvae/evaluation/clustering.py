"""Encode a split once, and say from that what the clusters are worth."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmvae.clustering import (
    Selection,
    clustering_metrics,
    confusion,
    responsibilities,
    select_clusters,
    vote,
)
from cmvae.data.batch import to_device
from cmvae.evaluation import figures
from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.pictures import draw_cluster_samples, draw_latent_map
from cmvae.evaluation.result import GroupResult
from cmvae.model import CMVAE, stack_shared_locations

AGREEMENT = ("acc", "nmi", "ari", "purity")
# Samples that the picture of each cluster shows.
CLUSTER_SAMPLES = 6
# Up to so many modalities every subset of them is tried: 30 of five, but 254 of eight.
_MAX_MODALITIES_FOR_ALL_SUBSETS = 5
# t-SNE of fewer points is no map, and of fewer than four it fails.
_MIN_MAP_SAMPLES = 4


@dataclass(frozen=True)
class EncodedSplit:
    """A split at the locations of its posteriors; N samples, M modalities, C clusters, before selection."""

    log_density: np.ndarray
    """(N, M, C) log p(z|c), in nats."""
    shared_loc: np.ndarray
    """(N, M, D_z)."""
    present: np.ndarray
    """(N, M) bool, the modalities that a sample has; what else is said of the others means nothing."""
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
    parts: dict[str, list[np.ndarray]] = {}
    for raw in batches:
        batch = to_device(raw, model.schemas, device)
        for name, values in _encode_batch(model, batch).items():
            parts.setdefault(name, []).append(values[batch["valid"]].cpu().numpy())
    return EncodedSplit(**{name: np.concatenate(values) for name, values in parts.items()})


def _encode_batch(model: CMVAE, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The fields of `EncodedSplit` of a batch on the device, padding included."""
    shared_loc = stack_shared_locations(model.encode({name: batch[name] for name in model.modality_names}))
    _, log_density = model.cluster_prior(shared_loc)
    return {
        "log_density": log_density,
        "shared_loc": shared_loc,
        "present": batch["mask"],
        "label": batch["label"],
    }


def select_model_clusters(model: CMVAE, validation: EncodedSplit, beta: float) -> Selection:
    """The entropy-based selection among all clusters of a model; leaves the model as it is.

    Args:
        model: whose prior is asked.
        validation: the encoded validation split.
        beta: β of the objective.
    """
    # To the selection samples and modalities are alike: what is there stands in one row.
    log_density = validation.log_density[validation.present][:, None]
    return select_clusters(log_density, all_log_weights(model), beta, shared_dim=model.config.shared_dim)


def all_log_weights(model: CMVAE) -> np.ndarray:
    """Log π (C,) of all clusters, as if none had been dropped."""
    return model.cluster_prior.logits.detach().log_softmax(-1).cpu().numpy()


def evaluate_clustering(context: EvaluationContext, beta: float) -> GroupResult:
    """Clusters of the split that is evaluated, after the export's selection, and pictures of them.

    By vote of all modalities `clustering/{num_clusters,acc,nmi,ari,purity}`, with all clusters before
    selection `clustering_all/…`, and from a subset of the modalities `clustering/from/m0-m1/…`.

    Args:
        context: the evaluation.
        beta: β of the objective, for the selection's curve on the validation split.
    """
    model, settings = context.model, context.settings
    active = model.cluster_prior.active.cpu().numpy()
    log_weights = all_log_weights(model)
    encoded = _encode_on_all_ranks(context, settings.split)
    metrics, assignments = evaluate_clusters(encoded, log_weights, active)
    labelled = encoded.label >= 0
    result = GroupResult(
        metrics=metrics,
        protocol={
            "clustering.split": settings.split,
            "clustering.num_samples": len(encoded.label),
            "clustering.num_labelled_samples": int(labelled.sum()),
            "clustering.vote": "mode of the modalities' clusters; the most confident one decides a draw",
        },
    )
    if labelled.any():
        subsets, rule = modality_subsets(model.modality_names)
        for names in subsets:
            part = _from_modalities(encoded, [model.modality_names.index(name) for name in names])
            agreement = _agreement(part, log_weights, active)
            result.metrics |= {
                # Of all signs that join names, "-" is one that MLflow takes and no modality has.
                f"clustering/from/{'-'.join(names)}/{key}": agreement[key]
                for key in AGREEMENT
            }
        result.protocol["clustering.subsets_of_modalities"] = rule
    else:
        reason = f"no sample of the {settings.split} split has a label"
        result.left_out |= {f"clustering/{name}": reason for name in (*AGREEMENT, "from")}
        result.left_out["clustering_all"] = reason
    _draw(context, beta, encoded, assignments, result)
    return result


def modality_subsets(names: Sequence[str]) -> tuple[list[tuple[str, ...]], str]:
    """The subsets of modalities that clusters are read from, without the set of all, and the rule in words.

    Args:
        names: the modalities.
    """
    num_modalities = len(names)
    if num_modalities <= _MAX_MODALITIES_FOR_ALL_SUBSETS:
        sizes, rule = set(range(1, num_modalities)), "all"
    else:
        sizes, rule = {1, 2, num_modalities - 1}, "of one, of two, and of all but one"
    return [subset for size in sorted(sizes) for subset in itertools.combinations(names, size)], rule


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
    assignments = vote(responsibilities(split.log_density, log_weights, active), split.present)
    metrics = {"clustering/num_clusters": float(active.sum())}
    if (split.label >= 0).any():
        for group, clusters in (("clustering", active), ("clustering_all", np.ones_like(active))):
            agreement = _agreement(split, log_weights, clusters)
            metrics |= {f"{group}/{name}": agreement[name] for name in AGREEMENT}
    return metrics, assignments


def _agreement(split: EncodedSplit, log_weights: np.ndarray, active: np.ndarray) -> dict[str, float]:
    """`clustering_metrics` of the voted clusters of the labelled samples."""
    labelled = split.label >= 0
    assignments = vote(
        responsibilities(split.log_density[labelled], log_weights, active), split.present[labelled]
    )
    return clustering_metrics(assignments, split.label[labelled])


def _encode_on_all_ranks(context: EvaluationContext, split: str) -> EncodedSplit:
    return EncodedSplit(
        **context.collect(context.batches(split), lambda batch: _encode_batch(context.model, batch))
    )


def _from_modalities(split: EncodedSplit, places: Sequence[int]) -> EncodedSplit:
    """The samples that have at least one of some modalities, encoded by those."""
    there = split.present[:, places].any(axis=1)
    return EncodedSplit(
        split.log_density[there][:, places],
        split.shared_loc[there][:, places],
        split.present[there][:, places],
        split.label[there],
    )


def _draw(
    context: EvaluationContext,
    beta: float,
    encoded: EncodedSplit,
    assignments: np.ndarray,
    result: GroupResult,
) -> None:
    """Add the pictures to the result, or the reasons why there is none."""
    settings, class_names = context.settings, context.index.class_names
    generator = torch.Generator(context.device).manual_seed(settings.seed)
    result.figures["cluster_samples"] = draw_cluster_samples(context.model, CLUSTER_SAMPLES, generator)
    if "validation" in context.index.splits:
        selection = select_model_clusters(context.model, _encode_on_all_ranks(context, "validation"), beta)
        result.figures["selection_curve"] = figures.selection_curve(selection)
    else:
        result.left_out["figures/selection_curve"] = "the data has no validation split"
    if min(len(encoded.label), settings.map_samples) >= _MIN_MAP_SAMPLES:
        result.figures["latent_map"] = draw_latent_map(
            encoded, assignments, settings.map_samples, settings.seed
        )
    else:
        result.left_out["figures/latent_map"] = f"a map needs at least {_MIN_MAP_SAMPLES} samples"
    labelled = encoded.label >= 0
    if class_names is not None and labelled.any():
        counts, cluster_ids = confusion(assignments[labelled], encoded.label[labelled], len(class_names))
        result.figures["confusion_matrix"] = figures.confusion_matrix(counts, class_names, cluster_ids)
    else:
        result.left_out["figures/confusion_matrix"] = "there are no labels"
