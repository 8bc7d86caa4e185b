"""Evaluate the clusters of an export."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cmvae.clustering import (
    clustering_metrics,
    confusion,
    label_by_group,
    mean_by_group,
)
from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.report import GroupResult
from cmvae.models.cmvae import CMVAE
from cmvae.models.encoding import EncodedSplit, assign_split, encode_batch
from cmvae.models.export import CLUSTER_RECORD_NAME, load_clusters
from cmvae.visualize import plots
from cmvae.visualize.previews import draw_cluster_samples

AGREEMENT = ("acc", "nmi", "ari", "purity")
# Samples per cluster in the figure.
CLUSTER_SAMPLES = 6
# With at most so many modalities, all subsets are evaluated: 30 of five, but 254 of eight.
_MAX_MODALITIES_FOR_ALL_SUBSETS = 5
_RULES = {
    "vote": "mode of the modalities' clusters; the most confident one decides ties",
    "joint": "the cluster at the geometric median of the modalities' locations",
}
_GROUP_RULE = (
    "a group is one sample: the mean of its members' locations in each modality, then the cluster at the "
    "geometric median of the modalities; its label is the most frequent one of its members"
)


def evaluate_clustering(context: EvaluationContext, export: Path) -> GroupResult:
    """Evaluate and draw the selected clusters of the split.

    Args:
        context: model, data and settings.
        export: folder of the export, with the record of the selection.

    Returns:
        `clustering/{num_clusters,acc,nmi,ari,purity}` by all modalities; `clustering_all/…` with as many
        clusters as the training began with; `clustering/from/m0-m1/…` by subsets of the modalities;
        `clustering/selected/CRITERION`, the number that each criterion selects. If samples have groups, also
        with each group as one sample: `clustering/by_group/{num_groups,acc,nmi,ari,purity}` by all
        modalities, and `clustering/by_group/from/NAME/…` by one modality.
    """
    model, settings = context.model, context.settings
    encoded = _encode_on_all_ranks(context, settings.split)
    metrics, assignments = evaluate_clusters(model, encoded)
    labelled = encoded.label >= 0
    result = GroupResult(
        metrics=metrics,
        protocol={
            "clustering.split": settings.split,
            "clustering.num_samples": len(encoded.label),
            "clustering.num_labelled_samples": int(labelled.sum()),
            "clustering.assign_by": _RULES[model.config.assign_by],
        },
    )
    if labelled.any():
        subsets, rule = modality_subsets(model.modality_names)
        for names in subsets:
            part = encoded.with_modalities([model.modality_names.index(name) for name in names])
            agreement = _agreement(assign_split(model, part), part.label)
            result.metrics |= {
                # "-" is allowed in MLflow's names and not in those of modalities.
                f"clustering/from/{'-'.join(names)}/{key}": agreement[key]
                for key in AGREEMENT
            }
        result.protocol["clustering.subsets_of_modalities"] = rule
    else:
        reason = f"no sample of the {settings.split} split has a label"
        result.left_out |= {f"clustering/{name}": reason for name in (*AGREEMENT, "from")}
    if encoded.group is not None:
        _add_groups(model, encoded, result)
    _compare_numbers(model, export, encoded, result)
    _draw(context, encoded, assignments, result)
    return result


def _add_groups(model: CMVAE, encoded: EncodedSplit, result: GroupResult) -> None:
    """Add the agreement of groups, by all modalities and by each."""
    names = model.modality_names
    groups = encoded.numbered_groups()
    result.metrics["clustering/by_group/num_groups"] = float(groups.max() + 1)
    result.protocol["clustering.by_group"] = _GROUP_RULE
    result.protocol["clustering.num_labelled_groups"] = len(np.unique(groups[encoded.label >= 0]))
    places = {"": list(range(len(names)))}
    if len(names) > 1:
        places |= {f"from/{name}/": [m] for m, name in enumerate(names)}
    for prefix, of_part in places.items():
        part = encoded.with_modalities(of_part)
        if (part.label >= 0).any():
            agreement = group_agreement(model, part)
            result.metrics |= {f"clustering/by_group/{prefix}{key}": agreement[key] for key in AGREEMENT}
    if not (encoded.label >= 0).any():
        reason = f"no group of the {result.protocol['clustering.split']} split has a label"
        result.left_out |= {f"clustering/by_group/{name}": reason for name in (*AGREEMENT, "from")}


def group_agreement(model: CMVAE, split: EncodedSplit) -> dict[str, float]:
    """`clustering_metrics` of the groups of a split that have a label, each as one sample.

    Args:
        model: model with selected clusters.
        split: encoded samples with groups, each with at least one modality; at least one has a label.
    """
    groups = split.numbered_groups()
    labels = label_by_group(split.label, groups)
    clusters, _ = model.assign_jointly(*mean_by_group(split.shared_loc, split.present, groups))
    return clustering_metrics(clusters[labels >= 0], labels[labels >= 0])


def _compare_numbers(model: CMVAE, export: Path, encoded: EncodedSplit, result: GroupResult) -> None:
    """Add selected numbers, criterion curves, the tree, and the agreement of the largest set of clusters."""
    if not (export / CLUSTER_RECORD_NAME).is_file():
        reason = f"{export} has no record of a selection, because no training wrote it"
        result.left_out |= dict.fromkeys(
            ("clustering/selected", "clustering_all", "figures/cluster_numbers"), reason
        )
        return
    hierarchy, record = load_clusters(export)
    result.metrics |= {
        f"clustering/selected/{name}": float(curve.selected) for name, curve in record.curves.items()
    }
    result.protocol["clustering.criterion"] = record.criterion if record.told is None else "told"
    result.draw("cluster_numbers", partial(plots.criterion_curves, record))
    if not hierarchy.is_pruned:
        result.draw("cluster_tree", partial(plots.cluster_tree, hierarchy, record.num_clusters))
    if (encoded.label >= 0).any():
        whole = copy.deepcopy(model)
        whole.cluster_prior.take(hierarchy, int(hierarchy.num_clusters[0]))
        agreement = _agreement(assign_split(whole, encoded), encoded.label)
        result.metrics |= {f"clustering_all/{name}": agreement[name] for name in AGREEMENT}


def modality_subsets(names: Sequence[str]) -> tuple[list[tuple[str, ...]], str]:
    """The proper subsets of modalities that are evaluated, and a description of the choice.

    Args:
        names: the modalities.
    """
    num_modalities = len(names)
    if num_modalities <= _MAX_MODALITIES_FOR_ALL_SUBSETS:
        sizes, rule = set(range(1, num_modalities)), "all"
    else:
        sizes, rule = {1, 2, num_modalities - 1}, "of one, of two, and of all but one"
    return [subset for size in sorted(sizes) for subset in itertools.combinations(names, size)], rule


def evaluate_clusters(model: CMVAE, split: EncodedSplit) -> tuple[dict[str, float], np.ndarray]:
    """Assign a split to clusters and compare them with its labels.

    Args:
        model: model with selected clusters.
        split: the encoded split.

    Returns:
        `clustering/num_clusters` and, if there are labels, `clustering/{acc,nmi,ari,purity}`; and the
        clusters (N,).
    """
    assignments = assign_split(model, split)
    metrics = {"clustering/num_clusters": float(model.cluster_prior.active.sum())}
    if (split.label >= 0).any():
        agreement = _agreement(assignments, split.label)
        metrics |= {f"clustering/{name}": agreement[name] for name in AGREEMENT}
    return metrics, assignments


def _agreement(assignments: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """`clustering_metrics` of the labelled samples; (N,) both."""
    labelled = label >= 0
    return clustering_metrics(assignments[labelled], label[labelled])


def _encode_on_all_ranks(context: EvaluationContext, split: str) -> EncodedSplit:
    return EncodedSplit(
        **context.collect(context.batches(split), lambda batch: encode_batch(context.model, batch))
    )


def _draw(
    context: EvaluationContext,
    encoded: EncodedSplit,
    assignments: np.ndarray,
    result: GroupResult,
) -> None:
    """Add the figures, or the reasons why one is left out."""
    settings, class_names = context.settings, context.index.class_names
    generator = torch.Generator(context.device).manual_seed(settings.seed)
    result.draw("cluster_samples", partial(draw_cluster_samples, context.model, CLUSTER_SAMPLES, generator))
    labelled = encoded.label >= 0
    if class_names is not None and labelled.any():
        counts, cluster_ids = confusion(assignments[labelled], encoded.label[labelled], len(class_names))
        result.draw("confusion_matrix", partial(plots.confusion_matrix, counts, class_names, cluster_ids))
    else:
        result.left_out["figures/confusion_matrix"] = "there are no labels"
