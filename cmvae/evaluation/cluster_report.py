"""Write the page that says what the clusters of a run are."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cmvae.clustering import ClusterHierarchy, jaccard_stability, matched_order
from cmvae.config import CMVAEExperiment, dump_yaml
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.evaluation.cluster_features import (
    HISTOGRAM_SAMPLES,
    cluster_features,
    column_histograms,
    shorten,
)
from cmvae.evaluation.cluster_summary import (
    MIN_MAP_SAMPLES,
    THUMBNAIL_SIZE,
    ClusterSummary,
    ImageStatistics,
    LowestScored,
    Member,
    SummaryLimits,
)
from cmvae.modalities import ImageModality, Modality
from cmvae.models.cmvae import CMVAE
from cmvae.models.export import CLUSTER_RECORD_NAME, ClusterRecord, load_clusters, weights_sha256
from cmvae.tracking import read_curves
from cmvae.utils.errors import UserError
from cmvae.utils.progress import progress_bar
from cmvae.visualize import page_figures
from cmvae.visualize.cluster_page import (
    CheckView,
    ClusterPage,
    ClusterView,
    SampleView,
    ValueView,
)
from cmvae.visualize.thumbnails import image_uri, shrink

PAGE_NAME = "report.html"

# Limits that bound the size of the page, whatever the data: pictures on the cards and on the map, samples of
# each kind per cluster, samples to check.
_CARD_PICTURES, _CHECK_PICTURES = 1500, 120
# Characters of all pictures; the map gets what the cards leave.
_PICTURE_CHARACTERS = 8_500_000
_MAX_MEMBERS, _MAX_TO_CHECK = 8, 40
_MAP_PICTURE_SIZE = 32
_MAX_CURVES, _MAX_CURVE_POINTS = 24, 200
_TEXT_LENGTH = 160
_MAX_CLASSES = 200


@dataclass(frozen=True)
class ReportSource:
    """Where the page comes from."""

    config: CMVAEExperiment
    index: ShardIndex
    run_dir: Path
    splits: Sequence[str]
    model: CMVAE
    hierarchy: ClusterHierarchy | None = None
    """None if the export has no record of a selection."""
    record: ClusterRecord | None = None


def read_clusters(
    config: CMVAEExperiment,
    index: ShardIndex,
    run_dir: Path,
    splits: Sequence[str],
    num_clusters: int | None = None,
    device: torch.device | None = None,
) -> tuple[ReportSource, ClusterSummary]:
    """Read splits once, for a page that says what the clusters of a run are.

    Args:
        config: the experiment of the run.
        index: index of `config.data.shards`.
        run_dir: folder of the run, with its export.
        splits: splits to read.
        num_clusters: number of clusters, from the same model; None is the number that was selected.
        device: device of the model; None is the accelerator if there is one, else the CPU.

    Raises:
        UserError: the export or the shards are missing, damaged or do not fit.
    """
    device = device or torch.accelerator.current_accelerator() or torch.device("cpu")
    export = run_dir / "export"
    model = CMVAE.from_pretrained(export, device, num_clusters=num_clusters)
    index.check_modalities(model.modalities, config.data.shards)
    clusters = load_clusters(export) if (export / CLUSTER_RECORD_NAME).is_file() else (None, None)
    source = ReportSource(config, index, run_dir, splits, model, *clusters)
    summary = ClusterSummary(
        model, len(index.class_names or ()), summary_limits(source), seed=config.evaluation.seed
    )
    summary.add_batches(_read(source))
    return source, summary


def _read(source: ReportSource) -> Iterator[tuple[str, dict[str, Any]]]:
    shards, index = source.config.data.shards, source.index
    total = sum(index.split(split, shards).num_samples for split in source.splits)
    with progress_bar(total=total, desc="report", unit=" samples", leave=False) as progress:
        for split in source.splits:
            loader = EvaluationLoader(
                shards,
                split=split,
                modalities=source.model.modality_names,
                batch_size=source.config.evaluation.batch_size,
            )
            for batch in loader:
                yield split, batch
                progress.update(int(batch["valid"].sum()))


def summary_limits(source: ReportSource) -> SummaryLimits:
    """Numbers of samples that fit on a page, fewer where each has several images."""
    images = sum(isinstance(modality, ImageModality) for modality in source.model.modalities.values())
    per_cluster = 3 * max(images, 1) * int(source.model.cluster_prior.active.sum())
    return SummaryLimits(
        members=min(_MAX_MEMBERS, max(1, _CARD_PICTURES // per_cluster)),
        rare_choices=min(_MAX_TO_CHECK, max(1, _CHECK_PICTURES // max(images, 1))),
        map_samples=source.config.evaluation.map_samples,
        histogram_samples=HISTOGRAM_SAMPLES,
    )


def make_page(source: ReportSource, summary: ClusterSummary) -> ClusterPage:
    """Make the contents of the page, of bounded size.

    Args:
        source: the run and its data.
        summary: of the data, with `summary_limits`.
    """
    model, index = source.model, source.index
    members = summary.map.items()
    stability = _stability(members)
    colours = {int(c): page_figures.category_colour(n) for n, c in enumerate(summary.clusters)}
    neighbours, neighbour_kind = _neighbours(source, summary)
    features = cluster_features(summary)
    curves, curves_note = _curves(source.run_dir)
    clusters = [
        ClusterView(
            id=int(cluster),
            colour=colours[int(cluster)],
            size=int(summary.sizes[place]),
            share=float(summary.sizes[place] / max(summary.sizes.sum(), 1)),
            confidence=float(summary.confidence_sums[place] / max(summary.sizes[place], 1)),
            stability=stability.get(int(cluster)),
            neighbours=neighbours.get(int(cluster), ()),
            classes=_classes(index, summary, place),
            summary=features[place].brief(),
            columns=[feature.view for feature in features[place].columns],
            words=[feature.view for feature in features[place].words],
            categories=[feature.view for feature in features[place].categories],
            presence=[feature.view for feature in features[place].presence],
            mean_images=_mean_images(summary, place),
            nearest=_sample_views(source, summary.nearest[place]),
            least_sure=_sample_views(source, summary.least_sure[place]),
            generated=generated,
        )
        for (place, cluster), generated in zip(
            enumerate(summary.clusters), _generate(source, summary), strict=True
        )
    ]
    to_check = [
        CheckView(_sample_view(source, rare.member), rare.modality, rare.rate, rare.member.opinions)
        for rare in summary.rare_choices.ranked()
    ]
    shown = [sample for view in clusters for sample in (*view.nearest, *view.least_sure, *view.generated)]
    shown += [view.sample for view in to_check]
    used = sum(len(value.image) for sample in shown for value in sample.values)
    map_figure, map_samples, map_note = _map(source, summary, _PICTURE_CHARACTERS - used)
    figures = {
        "map": map_figure,
        "criteria": _criteria(source.record, len(clusters)),
        "confusion": _confusion(index, summary),
        "curves": curves,
    }
    if source.hierarchy is not None and not source.hierarchy.is_pruned:
        figures["tree"] = page_figures.tree_figure(*source.hierarchy.linkage(len(summary.clusters)))
    for place, (view, found) in enumerate(zip(clusters, features, strict=True)):
        figures[f"histograms-{view.id}"] = column_histograms(summary, place, found, view.colour)
    return ClusterPage(
        title=f"{source.config.name}: {len(clusters)} clusters",
        facts=_facts(source, summary),
        modalities=model.modality_names,
        clusters=clusters,
        overall_images=_mean_images(summary, None),
        neighbour_kind=neighbour_kind,
        figures={name: figure for name, figure in figures.items() if figure is not None},
        map_samples=map_samples,
        map_note=map_note,
        to_check=to_check,
        check_note=_check_note(source, summary),
        curves_note=curves_note,
        settings=dump_yaml(source.config),
    )


def _facts(source: ReportSource, summary: ClusterSummary) -> list[tuple[str, str]]:
    record = source.record
    how = "not recorded"
    if record is not None:
        how = "set by hand" if len(summary.clusters) != record.selected else f"selected by {record.criterion}"
    facts = [
        ("run", str(source.run_dir)),
        ("data", source.index.name),
        ("splits", ", ".join(source.splits)),
        ("samples", f"{summary.sizes.sum():,}"),
        ("modalities", ", ".join(source.model.modality_names)),
        ("number of clusters", f"{len(summary.clusters)}, {how}"),
        ("export (SHA-256)", weights_sha256(source.run_dir / "export")[:12]),
    ]
    if summary.num_empty:
        facts.append(("samples without any modality", f"{summary.num_empty:,}, in no cluster"))
    return facts


def _stability(members: Sequence[Member]) -> dict[int, float]:
    if len(members) < MIN_MAP_SAMPLES:
        return {}
    return jaccard_stability(
        np.stack([member.location for member in members]), np.array([member.cluster for member in members])
    )


def _neighbours(
    source: ReportSource, summary: ClusterSummary
) -> tuple[dict[int, list[tuple[int, float]]], str]:
    """Up to three nearest clusters of each, and what their distances are."""
    means = source.model.cluster_prior.means.detach().cpu().numpy()[summary.clusters].astype(np.float64)
    apart = np.linalg.norm(means[:, None] - means, axis=2)
    if source.hierarchy is None or source.hierarchy.is_pruned:
        distances, kind = apart, "distance between means"
    else:
        distances, _ = source.hierarchy.tree_distances(len(means))
        kind = "height at which the tree joins them"
    found = {}
    for place, cluster in enumerate(summary.clusters):
        # Many clusters are joined at the same height; the nearer mean comes first.
        order = [int(other) for other in np.lexsort((apart[place], distances[place])) if other != place]
        found[int(cluster)] = [(int(summary.clusters[o]), float(distances[place, o])) for o in order[:3]]
    return found, kind


def _classes(index: ShardIndex, summary: ClusterSummary, place: int) -> list[tuple[str, float]]:
    """The up to three most frequent classes of a cluster's labelled samples, with their shares."""
    if index.class_names is None or not summary.class_counts[:, place].any():
        return []
    counts = summary.class_counts[:, place]
    largest = [label for label in np.argsort(-counts, kind="stable")[:3] if counts[label]]
    return [(shorten(index.class_names[label]), float(counts[label] / counts.sum())) for label in largest]


def _mean_images(summary: ClusterSummary, place: int | None) -> list[ValueView]:
    """Mean image per modality of one cluster, or of all samples."""
    views = []
    for name, statistics in summary.modalities.items():
        if not isinstance(statistics, ImageStatistics):
            continue
        chosen = slice(None) if place is None else slice(place, place + 1)
        count = statistics.present[chosen].sum()
        if count:
            mean = (statistics.sums[chosen].sum(0) / count).round().astype(np.uint8)
            views.append(ValueView(name, image=image_uri(shrink(mean, THUMBNAIL_SIZE))))
    return views


def _generate(source: ReportSource, summary: ClusterSummary) -> Iterator[list[SampleView]]:
    """Samples that the model generates from each cluster."""
    model, number = source.model, summary_limits(source).members
    device = model.private_scale.device
    generator = torch.Generator(device).manual_seed(source.config.evaluation.seed)
    for cluster in summary.clusters:
        made = model.generate(number, cluster=int(cluster), generator=generator)
        stored = {name: model.modalities[name].to_stored(values) for name, values in made.items()}
        yield [
            SampleView([_value_view(n, model.modalities[n], values[row]) for n, values in stored.items()])
            for row in range(number)
        ]


def _sample_views(source: ReportSource, members: LowestScored[Member]) -> list[SampleView]:
    return [_sample_view(source, member) for member in members.items()]


def _sample_view(source: ReportSource, member: Member, picture_size: int = THUMBNAIL_SIZE) -> SampleView:
    modalities, class_names = source.model.modalities, source.index.class_names
    note = f"cluster {member.cluster}, confidence {member.confidence:.2f}"
    if class_names is not None and member.label >= 0:
        note += f", class {shorten(class_names[member.label])}"
    values = [
        _value_view(name, modalities[name], value, picture_size) for name, value in member.values.items()
    ]
    return SampleView(values, f"{shorten(member.key)} ({member.split})", note)


def _value_view(
    name: str, modality: Modality, stored: np.ndarray, picture_size: int = THUMBNAIL_SIZE
) -> ValueView:
    if isinstance(modality, ImageModality):
        return ValueView(name, image=image_uri(shrink(stored, picture_size), picture_size < THUMBNAIL_SIZE))
    return ValueView(name, text=textwrap.shorten(modality.describe(stored), _TEXT_LENGTH, placeholder=" …"))


def _map(
    source: ReportSource, summary: ClusterSummary, picture_characters: int
) -> tuple[page_figures.Figure | None, list[SampleView], str]:
    """The map, the sample of each point, and a note; the first samples have pictures, as far as these fit."""
    members, points = summary.map.items(), summary.map_points
    if points is None:
        return None, [], f"A map takes at least {MIN_MAP_SAMPLES} samples."
    labels = np.array([member.label for member in members])
    figure = page_figures.map_figure(
        points,
        np.array([member.cluster for member in members]),
        labels if (labels >= 0).any() else None,
        [shorten(name) for name in source.index.class_names or ()],
    )
    samples, num_pictured = [], 0
    for member in members:
        sample = _sample_view(source, member, _MAP_PICTURE_SIZE)
        picture_characters -= sum(len(value.image) for value in sample.values)
        if picture_characters < 0:
            sample = replace(sample, values=[value for value in sample.values if not value.image])
        else:
            num_pictured += 1
        samples.append(sample)
    note = (
        f"{len(members):,} random samples at the joint location of their modalities, by t-SNE. Point at one "
        "to see it."
    )
    if num_pictured < len(members):
        note += f" {num_pictured:,} of them have pictures; more would make the page too large."
    return figure, samples, note


def _criteria(record: ClusterRecord | None, num_clusters: int) -> page_figures.Figure | None:
    if record is None:
        return None
    decides = record.criterion if record.told is None else None
    curves = {}
    for name, curve in record.curves.items():
        title = f"{name}: {curve.selected}{' (decides)' if name == decides else ''}"
        curves[title] = (curve.num_clusters, curve.values)
    return page_figures.curves_figure(curves, "%{x} clusters: %{y:.4g}", marked=num_clusters)


def _confusion(index: ShardIndex, summary: ClusterSummary) -> page_figures.Figure | None:
    counts = summary.class_counts
    if index.class_names is None or not counts.any():
        return None
    # The most frequent classes, in the order of the data.
    classes = np.sort(np.argsort(-counts.sum(1), kind="stable")[:_MAX_CLASSES])
    counts = counts[classes]
    order = matched_order(counts)
    names = [shorten(index.class_names[label]) for label in classes]
    return page_figures.confusion_figure(counts[:, order], names, summary.clusters[order].tolist())


def _check_note(source: ReportSource, summary: ClusterSummary) -> str:
    if not summary.num_several_modalities:
        return "No sample has two modalities that could disagree."
    share = summary.num_split_opinions / summary.num_several_modalities
    note = (
        f"The modalities of {summary.num_split_opinions:,} of {summary.num_several_modalities:,} samples "
        f"({share:.1%}) choose different clusters. First come those for which a modality chooses what it "
        "rarely chooses for samples of this cluster: wrong pairs, wrong entries and borderline cases."
    )
    if "train" in source.splits and len(source.splits) > 1:
        note += " The model may have learned wrong pairs of the train split by heart; it has not seen others."
    return note


def _curves(run_dir: Path) -> tuple[page_figures.Figure | None, str]:
    """The curves of the training, and a note."""
    try:
        found = read_curves(run_dir, ("train/", "validation/"))
    except UserError as error:
        return None, f"No curves: {error}"
    found = {name: points for name, points in found.items() if len(points) > 1}
    if not found:
        return None, "The run logged no curves."
    # Short names first: `train/bound` before the terms of each modality.
    names = sorted(sorted(found, key=lambda name: (name.count("/"), name))[:_MAX_CURVES])
    note = f"Metrics that the training logged to MLflow, over its steps: {len(names)} of {len(found)}."
    hover = "step %{x}: %{y:.5g}"
    return page_figures.curves_figure({name: _thin(found[name]) for name in names}, hover), note


def _thin(points: Mapping[int, float]) -> tuple[list[int], list[float]]:
    """At most `_MAX_CURVE_POINTS` points, with the first and the last: steps and values."""
    steps = list(points)
    places = np.unique(np.linspace(0, len(steps) - 1, _MAX_CURVE_POINTS).round().astype(int))
    kept = [steps[place] for place in places]
    return kept, [points[step] for step in kept]
