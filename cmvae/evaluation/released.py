"""The counting of the released CMVAE code, beside ours, for tables to be compared with the paper's.

`protocol=released` differs from ours as follows (generated samples: see `cmvae.evaluation.generative`):

- Clusters are read from one sample of q(z|x_m) per modality instead of its location. The most frequent
  cluster of the modalities wins, the lowest index in a tie.
- The criterion divides the entropy by log C at every step, with C the number of clusters at the start.
- Agreement with the labels is reported at every step of the pruning.
- Probes are linear and nonlinear, on z, w and both of each modality, and on z of all modalities together.
- Self-reconstructions, and their share of the mean distances, take w from q(w|x) instead of p(w).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import mode
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from cmvae.clustering import (
    BoolArray,
    FloatArray,
    IntArray,
    clustering_metrics,
    responsibilities,
    select_clusters,
)
from cmvae.data.index import SplitName
from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.probes import encode_for_probes, evaluate_probes, parts_of, probe_accuracy
from cmvae.evaluation.report import RELEASED, GroupResult
from cmvae.models.cmvae import CMVAE
from cmvae.models.export import load_clusters
from cmvae.visualize import plots

_AGREEMENT = ("acc", "nmi", "ari")
_HIDDEN_UNITS = 256


def mode_of_modalities(responsibilities: FloatArray, present: BoolArray) -> IntArray:
    """The most frequent cluster of the modalities of each sample, the lowest index in a tie.

    Args:
        responsibilities: (N, M, C) p(c|z) per modality.
        present: (N, M) bool, the modalities that a sample has; at least one per sample.

    Returns:
        (N,) cluster ids.
    """
    choices = np.where(present, responsibilities.argmax(axis=2), np.nan)
    most_frequent: FloatArray = mode(choices, axis=1, nan_policy="omit").mode
    return most_frequent.astype(np.int64)


def evaluate_released_clustering(context: EvaluationContext, export: Path, beta: float) -> GroupResult:
    """Select clusters on the validation split and compare them with the labels, as the released code does.

    Args:
        context: model, data and settings.
        export: folder of the export, with the record of the selection.
        beta: β of the objective.

    Returns:
        `released/clustering/{num_clusters,acc,nmi,ari}` of the selected clusters, and a figure of the
        agreement at every step of the pruning.
    """
    if context.settings.split == "validation" or "validation" not in context.index.splits:
        return GroupResult(left_out={f"{RELEASED}clustering": "it selects on the validation split"})
    hierarchy, _ = load_clusters(export)
    model = copy.deepcopy(context.model)
    model.cluster_prior.take(hierarchy, int(hierarchy.num_clusters[0]))
    active = model.cluster_prior.active.cpu().numpy()
    with torch.no_grad():
        log_weights = model.cluster_prior.logits.log_softmax(0).cpu().numpy()[active]
    validation, test = (
        _sample_split(context, model, split) for split in ("validation", context.settings.split)
    )
    everywhere = validation["present"].all(axis=1)
    selection = select_clusters(
        validation["log_density"][everywhere][..., active],
        log_weights,
        beta,
        model.config.shared_dim,
        normaliser="initial",
    )
    result = GroupResult(
        metrics={f"{RELEASED}clustering/num_clusters": float(selection.active.sum())},
        protocol={
            "released.clustering.num_clusters_at_start": int(active.sum()),
            "released.clustering.set_at_start": "the trained mixture"
            if hierarchy.is_pruned
            else "the clusters found in z after the training",
        },
    )
    labelled = test["label"] >= 0
    if not labelled.any():
        result.left_out[f"{RELEASED}clustering/acc"] = "there are no labels"
        return result
    log_density = test["log_density"][labelled][..., active]
    present, label = test["present"][labelled], test["label"][labelled]
    steps = {
        int(kept.sum()): clustering_metrics(
            mode_of_modalities(responsibilities(log_density, log_weights, kept), present), label
        )
        for kept in _pruned_sets(selection.dropped, len(log_weights))
    }
    selected = int(selection.active.sum())
    result.metrics |= {f"{RELEASED}clustering/{name}": steps[selected][name] for name in _AGREEMENT}
    curves = {name: [steps[size][name] for size in steps] for name in _AGREEMENT}
    result.draw("released_pruning", partial(plots.pruning_curves, curves, list(steps), selected))
    return result


def evaluate_released_probes(context: EvaluationContext) -> GroupResult:
    """Accuracy of linear and nonlinear classifiers on the latents of the labelled samples of the split.

    Returns:
        What `evaluate_probes` returns, `released/probe/{linear,mlp}/{z,w,both}/MODALITY` and
        `released/probe/{linear,mlp}/z/all`.
    """
    latents = encode_for_probes(context)
    result = evaluate_probes(context, latents)
    if isinstance(latents, str):
        result.left_out[f"{RELEASED}probe"] = latents
        return result
    result.protocol["released.probe.mlp"] = f"one hidden layer of {_HIDDEN_UNITS}, Adam, early stopping"
    # The linear classifiers on the latents of one modality are those of `evaluate_probes`.
    linear = {name.removeprefix("probe/"): accuracy for name, accuracy in result.metrics.items()}
    names = context.model.modality_names
    probed = {f"{latent}/{name}": parts for name in names for latent, parts in parts_of(name).items()}
    probed["z/all"] = tuple(parts_of(name)["z"][0] for name in names)
    for probe, parts in probed.items():
        of_linear, of_mlp = (f"{RELEASED}probe/{kind}/{probe}" for kind in ("linear", "mlp"))
        sets = latents.of(parts)
        if sets is None:
            reason = "too few labelled samples have the modalities"
            result.left_out |= {of_linear: reason, of_mlp: reason}
            continue
        train, test = sets
        known = linear.get(probe)
        result.metrics[of_linear] = probe_accuracy(*train, *test) if known is None else known
        mlp = MLPClassifier((_HIDDEN_UNITS,), early_stopping=True, random_state=context.settings.seed)
        result.metrics[of_mlp] = probe_accuracy(*train, *test, mlp)
    return result


def _sample_split(context: EvaluationContext, model: CMVAE, split: SplitName) -> dict[str, np.ndarray]:
    """Densities of the clusters at one sample of q(z|x_m): `log_density` (N, M, C), `present`, `label`."""

    def compute(batch: Mapping[str, Any]) -> dict[str, Tensor]:
        posteriors = model.encode({name: batch[name] for name in model.modality_names})
        shape = (len(posteriors), model.config.shared_dim)
        noise = context.draw_noise(f"released/clustering/{split}", batch["position"].cpu(), shape)
        samples = [q.shared.sample(noise[:, m]) for m, q in enumerate(posteriors.values())]
        _, log_density = model.cluster_prior(torch.stack(samples, dim=1))
        return {"log_density": log_density, "present": batch["mask"], "label": batch["label"]}

    return context.collect(context.batches(split), compute)


def _pruned_sets(dropped: IntArray, num_clusters: int) -> Iterator[BoolArray]:
    """The clusters that are left at every step, (C,) bool each, from all of them on."""
    active = np.ones(num_clusters, dtype=bool)
    yield active.copy()
    for cluster in dropped:
        active[cluster] = False
        yield active.copy()
