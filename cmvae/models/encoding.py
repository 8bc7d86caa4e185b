"""Encode a split once, find the clusters that the encodings show, and put samples into them."""

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
"""Train samples that the final clusters are found in, besides the validation split."""


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
    variance: np.ndarray | None = None
    """(N, M) of q(z|x_m), a mean over its dimensions."""
    group: np.ndarray | None = None
    """(N,) number of a sample's group, −1 where it has none; None where the split has no groups."""

    def numbered_groups(self) -> IntArray:
        """(N,) the group of each sample, from 0 as `mean_by_group` takes them; without one it is alone."""
        alone = np.full(len(self.label), NO_GROUP)
        return number_groups(alone if self.group is None else self.group)

    def with_modalities(self, places: Sequence[int]) -> EncodedSplit:
        """The samples that have at least one of some modalities, as those encode them."""
        there = self.present[:, places].any(axis=1)
        return EncodedSplit(
            self.log_density[there][:, places],
            self.shared_loc[there][:, places],
            self.present[there][:, places],
            self.label[there],
            None if self.variance is None else self.variance[there][:, places],
            None if self.group is None else self.group[there],
        )


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
        batch = to_device(raw, model.modalities, device)
        for name, values in encode_batch(model, batch).items():
            parts.setdefault(name, []).append(values[batch["valid"]].cpu().numpy())
    return EncodedSplit(**{name: np.concatenate(values) for name, values in parts.items()})


def encode_batch(model: CMVAE, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The fields of `EncodedSplit` of a batch on the device, padding included; `group` if it has some."""
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
    """The cluster of every sample, (N,), among the model's active ones and by its `assign_by`."""
    if model.config.assign_by == "joint":
        return model.assign_jointly(split.shared_loc, split.present)[0]
    active = model.cluster_prior.active.cpu().numpy()
    return vote(responsibilities(split.log_density, all_log_weights(model), active), split.present)


def select_model_clusters(
    model: CMVAE, validation: EncodedSplit, beta: float, settings: ClustersConfig | None = None
) -> Selection:
    """The entropy-based selection among all clusters of a model; leaves the model as it is.

    Args:
        model: whose prior is asked.
        validation: the encoded validation split.
        beta: β of the objective.
        settings: which normaliser; None is the default.
    """
    # To the selection samples and modalities are alike: what is there stands in one row.
    log_density = validation.log_density[validation.present][:, None]
    return select_clusters(
        log_density,
        all_log_weights(model),
        beta,
        shared_dim=model.config.shared_dim,
        normaliser=(settings or ClustersConfig()).normaliser,
    )


def all_log_weights(model: CMVAE) -> np.ndarray:
    """Log π (C,) of all clusters, as if none had been dropped."""
    return model.cluster_prior.logits.detach().log_softmax(-1).cpu().numpy()


def find_clusters(
    model: CMVAE, train: EncodedSplit, validation: EncodedSplit, beta: float, settings: ClustersConfig
) -> tuple[ClusterHierarchy, ClusterRecord]:
    """All sets of clusters of a trained model, and their number by every criterion; from encodings alone.

    Args:
        model: as trained, all its clusters active; stays as it is.
        train: encoded train samples.
        validation: the encoded validation split; the entropy is computed on it, as in the paper, the other
            criteria on both.
        beta: β of the objective.
        settings: the criterion that decides.
    """
    max_clusters = model.config.num_clusters
    selection = select_model_clusters(model, validation, beta, settings)
    locations, shared_loc, present, noise = _locate(train, validation)
    merged = merge_clusters(locations, max_clusters, noise)
    found: dict[CriterionName, Curve | None] = {
        "silhouette": silhouette_curve(merged, locations),
        "stability": stability_curve(locations, max_clusters),
        "agreement": agreement_curve(merged, shared_loc, present),
    }
    curves: dict[CriterionName, CurveRecord] = {"entropy": _record_selection(selection)}
    curves |= {name: _record_curve(curve) for name, curve in found.items() if curve is not None}
    # With one modality there is no agreement between modalities.
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
    """Where samples are, of those that have a modality.

    Returns:
        Joint locations (N, D_z), locations by modality (N, M, D_z), who has which (N, M), and the variance of
        z ~ q(z|x_m) around the joint location, a mean over modalities and dimensions.
    """
    shared_loc, present, variance = (
        np.concatenate([getattr(split, name) for split in splits])
        for name in ("shared_loc", "present", "variance")
    )
    has_some = present.any(axis=1)
    shared_loc, present, variance = shared_loc[has_some], present[has_some], variance[has_some]
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
