"""Encode a split once, find clusters among the encodings, and assign samples to them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmvae.clustering import (
    ClusterHierarchy,
    Curve,
    IntArray,
    Selection,
    agreement_curve,
    joint_location,
    merge_clusters,
    number_groups,
    prune_clusters,
    responsibilities,
    select_clusters,
    silhouette_curve,
    stability_curve,
    vote,
)
from cmvae.config import ClustersConfig, CriterionName
from cmvae.data.batch import to_device
from cmvae.data.groups import NO_GROUP
from cmvae.models.cmvae import CMVAE, stack_shared_locations
from cmvae.models.export import ClusterRecord, CurveRecord

CLUSTER_SAMPLES = 4000
"""Number of train samples in which the final clusters are found, in addition to the validation split."""


@dataclass(frozen=True)
class EncodedSplit:
    """Encodings of a split: N samples, M modalities, all C clusters of the model."""

    log_density: np.ndarray
    """(N, M, C) log p(z|c) at the locations of q(z|x_m), in nats."""
    shared_loc: np.ndarray
    """(N, M, D_z) locations of q(z|x_m)."""
    present: np.ndarray
    """(N, M) bool, the modalities that a sample has. Other fields are arbitrary for missing modalities."""
    label: np.ndarray
    """(N,) labels, −1 for none."""
    variance: np.ndarray | None = None
    """(N, M) variance of q(z|x_m), averaged over dimensions."""
    group: np.ndarray | None = None
    """(N,) group of each sample, −1 for none; None if the split has no groups."""

    def numbered_groups(self) -> IntArray:
        """Groups (N,) as `mean_by_group` takes them, see `cmvae.clustering.number_groups`."""
        no_groups = np.full(len(self.label), NO_GROUP)
        return number_groups(no_groups if self.group is None else self.group)

    def with_modalities(self, indices: Sequence[int]) -> EncodedSplit:
        """Encodings by some of the modalities, for the samples that have at least one of them."""
        rows = self.present[:, indices].any(axis=1)
        return EncodedSplit(
            self.log_density[rows][:, indices],
            self.shared_loc[rows][:, indices],
            self.present[rows][:, indices],
            self.label[rows],
            None if self.variance is None else self.variance[rows][:, indices],
            None if self.group is None else self.group[rows],
        )


@torch.no_grad()
def encode_split(model: CMVAE, batches: Iterable[Mapping[str, Any]]) -> EncodedSplit:
    """Encode a split in one pass.

    Args:
        model: a model in evaluation mode.
        batches: batches of the split from a reader; padding is removed.
    """
    device = model.private_scale.device
    parts: dict[str, list[np.ndarray]] = {}
    for raw in batches:
        batch = to_device(raw, model.modalities, device)
        for name, values in encode_batch(model, batch).items():
            parts.setdefault(name, []).append(values[batch["valid"]].cpu().numpy())
    return EncodedSplit(**{name: np.concatenate(values) for name, values in parts.items()})


def encode_batch(model: CMVAE, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode a batch.

    Args:
        model: a model in evaluation mode.
        batch: a batch on the device of the model, see `cmvae.data.batch.to_device`.

    Returns:
        Fields of `EncodedSplit` by name, with one row per sample of the batch, including padding. `group` is
        among them if the batch has groups.
    """
    posteriors = model.encode({name: batch[name] for name in model.modality_names})
    shared_loc = stack_shared_locations(posteriors)
    _, log_density = model.cluster_prior(shared_loc)
    variances = [posterior.shared.variance.mean(-1) for posterior in posteriors.values()]
    fields = {
        "log_density": log_density,
        "shared_loc": shared_loc,
        "present": batch["mask"],
        "label": batch["label"],
        "variance": torch.stack(variances, dim=1),
    }
    if "group" in batch:
        fields["group"] = batch["group"]
    return fields


def assign_split(model: CMVAE, split: EncodedSplit) -> np.ndarray:
    """Assign samples to the active clusters of a model, as `config.assign_by` says; (N,)."""
    if model.config.assign_by == "joint":
        return model.assign_jointly(split.shared_loc, split.present)[0]
    active = model.cluster_prior.active.cpu().numpy()
    return vote(responsibilities(split.log_density, all_log_weights(model), active), split.present)


def select_model_clusters(
    model: CMVAE, validation: EncodedSplit, beta: float, settings: ClustersConfig | None = None
) -> Selection:
    """Select among all clusters of a model by penalised normalised entropy. The model is not changed.

    Args:
        model: model whose clusters are selected.
        validation: encoded validation split.
        beta: β of the objective.
        settings: settings with the normaliser; None is the default.
    """
    # The selection treats samples and modalities alike, so the encodings that are present become its rows.
    log_density = validation.log_density[validation.present][:, None]
    return select_clusters(
        log_density,
        all_log_weights(model),
        beta,
        shared_dim=model.config.shared_dim,
        normaliser=(settings or ClustersConfig()).normaliser,
    )


def all_log_weights(model: CMVAE) -> np.ndarray:
    """Log π (C,) over all clusters, including those that are not active."""
    return model.cluster_prior.logits.detach().log_softmax(-1).cpu().numpy()


def find_clusters(
    model: CMVAE, train: EncodedSplit, validation: EncodedSplit, beta: float, settings: ClustersConfig
) -> tuple[ClusterHierarchy, ClusterRecord]:
    """Find the sets of clusters of a trained model and the number that each criterion selects.

    Args:
        model: a trained model with all clusters active; it is not changed.
        train: encoded train samples.
        validation: encoded validation split. The entropy is computed on it, as in the paper; the other
            criteria are computed on both.
        beta: β of the objective.
        settings: settings with the criterion that decides.

    Returns:
        The sets of clusters, and how they were found.
    """
    max_clusters = model.config.num_clusters
    selection = select_model_clusters(model, validation, beta, settings)
    locations, shared_loc, present, noise = _locate(train, validation)
    merged = merge_clusters(locations, max_clusters, noise)
    computed: dict[CriterionName, Curve | None] = {
        "silhouette": silhouette_curve(merged, locations),
        "stability": stability_curve(locations, max_clusters),
        "agreement": agreement_curve(merged, shared_loc, present),
    }
    curves: dict[CriterionName, CurveRecord] = {"entropy": _record_selection(selection)}
    curves |= {name: _record_curve(curve) for name, curve in computed.items() if curve is not None}
    # Agreement is not available with one modality.
    criterion = settings.criterion if settings.criterion in curves else "stability"
    record = ClusterRecord(
        criterion=criterion,
        selected=curves[criterion].selected,
        told=settings.num_clusters,
        curves=curves,
    )
    if criterion != "entropy":
        return merged, record
    prior = model.cluster_prior
    pruned = prune_clusters(
        prior.means.detach().cpu().numpy(),
        all_log_weights(model),
        selection.dropped,
        float(model.family.variance_of(prior.scale).mean()),
    )
    return pruned, record


def _locate(*splits: EncodedSplit) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Locate the samples that have at least one modality.

    Returns:
        Joint locations (N, D_z), locations per modality (N, M, D_z), the modalities that are present (N, M),
        and the variance of z ~ q(z|x_m) around the joint location, averaged over samples, modalities and
        dimensions.
    """
    shared_loc, present, variance = (
        np.concatenate([getattr(split, name) for split in splits])
        for name in ("shared_loc", "present", "variance")
    )
    rows = present.any(axis=1)
    shared_loc, present, variance = shared_loc[rows], present[rows], variance[rows]
    locations = joint_location(shared_loc, present)
    scatter = np.square(shared_loc - locations[:, None]).mean(axis=2) + variance
    return locations, shared_loc, present, float(scatter[present].mean())


def _record_curve(curve: Curve) -> CurveRecord:
    return CurveRecord(
        num_clusters=tuple(curve.num_clusters.tolist()),
        values=tuple(curve.values.tolist()),
        selected=curve.selected,
    )


def _record_selection(selection: Selection) -> CurveRecord:
    terms = {"entropy": selection.entropy_term, "likelihood": selection.likelihood_term}
    return CurveRecord(
        num_clusters=tuple(selection.num_clusters.tolist()),
        values=tuple(selection.criterion.tolist()),
        selected=int(selection.active.sum()),
        terms={name: tuple(values.tolist()) for name, values in terms.items()},
    )
