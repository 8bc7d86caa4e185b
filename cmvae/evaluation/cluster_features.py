"""What sets each cluster apart: columns, words, categories and missing modalities, as the page shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cmvae.clustering import FloatArray
from cmvae.evaluation.cluster_profiles import class_tfidf, lift, standardized_differences
from cmvae.evaluation.cluster_summary import CategoryStatistics, ClusterSummary, ColumnStatistics, Member
from cmvae.modalities import Modality, TextModality, VectorModality
from cmvae.visualize.cluster_page import FeatureView
from cmvae.visualize.page_figures import Figure, Histogram, histogram_figure

HISTOGRAM_SAMPLES = 400
"""Random samples per cluster, for the histograms."""
_MAX_COLUMNS, _MAX_HISTOGRAMS, _MAX_WORDS, _MAX_CATEGORIES = 10, 6, 12, 10
_NUM_BINS = 24
_NAME_LENGTH = 60
# Below these a column, word or category is not worth a line. Cohen calls d = 0.2 small.
_SMALL_EFFECT, _SMALL_LIFT, _SMALL_SHARE = 0.2, 1.2, 0.02


@dataclass(frozen=True)
class Feature:
    """One feature of a cluster."""

    view: FeatureView
    score: float
    """Cohen's d, weight or lift."""
    column: int = 0
    """Number of a column in its modality."""


@dataclass
class ClusterFeatures:
    """What sets one cluster apart, strongest first."""

    columns: list[Feature] = field(default_factory=list)
    words: list[Feature] = field(default_factory=list)
    categories: list[Feature] = field(default_factory=list)
    presence: list[Feature] = field(default_factory=list)

    def brief(self) -> list[str]:
        """The strongest features in a few words."""
        columns = [f"{f.view.name} {'high' if f.score > 0 else 'low'}" for f in self.columns[:3]]
        words = [feature.view.name for feature in self.words[:3]]
        return columns + words + [f"{f.view.modality}: {f.view.name}" for f in self.categories[:2]]


def cluster_features(summary: ClusterSummary) -> list[ClusterFeatures]:
    """Find what sets each cluster apart from all other samples."""
    found = [ClusterFeatures() for _ in summary.clusters]
    for name, statistics in summary.modalities.items():
        _add_presence(found, summary, name, statistics.present)
        if isinstance(statistics, ColumnStatistics):
            _add_columns(found, name, statistics)
        elif isinstance(statistics, CategoryStatistics):
            _add_categories(found, name, statistics)
    for features in found:
        features.columns = _strongest(features.columns, _MAX_COLUMNS)
        features.words = _strongest(features.words, _MAX_WORDS)
        features.categories = _strongest(features.categories, _MAX_CATEGORIES)
    return found


def column_histograms(
    summary: ClusterSummary, place: int, features: ClusterFeatures, colour: str
) -> Figure | None:
    """Distributions of the columns that set a cluster apart, from random samples inside and outside.

    Args:
        summary: the summary.
        place: index of the cluster on the K axis.
        features: its features.
        colour: its colour.

    Returns:
        The figure; None without such columns.
    """
    histograms = []
    for feature in features.columns:
        name = feature.view.modality
        if not isinstance(summary.modalities[name].modality, VectorModality):
            continue
        histogram = _histogram(summary, place, name, feature)
        if histogram is not None:
            histograms.append(histogram)
    return histogram_figure(histograms[:_MAX_HISTOGRAMS], colour) if histograms else None


def shorten(name: str) -> str:
    """A name of the data, which may be of any length, with at most 60 characters."""
    return name if len(name) <= _NAME_LENGTH else name[: _NAME_LENGTH - 2] + " …"


def _add_columns(found: Sequence[ClusterFeatures], name: str, statistics: ColumnStatistics) -> None:
    counts, sums = statistics.present[:, None], statistics.sums
    effects = standardized_differences(statistics.present, sums, statistics.squares)
    inside = sums / np.maximum(counts, 1)
    outside = (sums.sum(0) - sums) / np.maximum(counts.sum() - counts, 1)
    for place, features in enumerate(found):
        for column in np.flatnonzero(np.abs(effects[place]) >= _SMALL_EFFECT).tolist():
            view = FeatureView(
                name,
                shorten(statistics.modality.table_columns[column]),
                _format_mean(statistics.modality, inside[place, column], column),
                _format_mean(statistics.modality, outside[place, column], column),
                f"{effects[place, column]:+.2f}",
            )
            features.columns.append(Feature(view, float(effects[place, column]), column))


def _add_categories(found: Sequence[ClusterFeatures], name: str, statistics: CategoryStatistics) -> None:
    """Add words by their class-based TF-IDF, or categories by their lift."""
    is_text = isinstance(statistics.modality, TextModality)
    scores = class_tfidf(statistics.occurrences) if is_text else lift(statistics.samples)
    counts, present = statistics.samples, statistics.present[:, None]
    inside = counts / np.maximum(present, 1)
    outside = (counts.sum(0) - counts) / np.maximum(present.sum() - present, 1)
    # A word that is as frequent elsewhere says nothing, and a rare one little.
    often = (inside >= _SMALL_SHARE) & (inside >= _SMALL_LIFT * outside)
    for place, features in enumerate(found):
        for category in np.flatnonzero(often[place]).tolist():
            view = FeatureView(
                name,
                shorten(statistics.names[category]),
                f"{inside[place, category]:.0%}",
                f"{outside[place, category]:.0%}",
                f"{scores[place, category]:.3g}",
            )
            kind = features.words if is_text else features.categories
            kind.append(Feature(view, float(scores[place, category])))


def _add_presence(
    found: Sequence[ClusterFeatures], summary: ClusterSummary, name: str, present: np.ndarray
) -> None:
    """Add a modality where a cluster has it more or less often than others."""
    sizes = summary.sizes
    inside = present / np.maximum(sizes, 1)
    outside = (present.sum() - present) / np.maximum(sizes.sum() - sizes, 1)
    for place in np.flatnonzero((sizes > 0) & (np.abs(inside - outside) >= _SMALL_EFFECT)).tolist():
        strength = inside[place] / max(outside[place], 1e-9)
        view = FeatureView("", name, f"{inside[place]:.0%}", f"{outside[place]:.0%}", f"{strength:.2f}")
        found[place].presence.append(Feature(view, float(strength)))


def _format_mean(modality: Modality, mean: float, column: int) -> str:
    """Mean of a column in the units of the data; the share of ones of a binary column."""
    if isinstance(modality, VectorModality):
        return f"{modality.mean[column] + modality.std[column] * mean:.4g}"
    return f"{mean:.0%}"


def _strongest(features: Sequence[Feature], limit: int) -> list[Feature]:
    return sorted(features, key=lambda feature: -abs(feature.score))[:limit]


def _histogram(summary: ClusterSummary, place: int, name: str, feature: Feature) -> Histogram | None:
    """Distribution of a column; None if it does not vary."""
    values, weights = [], []
    for members, size in zip(summary.random, summary.sizes, strict=True):
        values.append(_column_values(members.items(), name, feature.column))
        # Equally many random samples per cluster are kept, but larger clusters count more.
        weights.append(np.full(len(values[-1]), size / max(len(values[-1]), 1)))
    own = values.pop(place)
    own_weights, rest, rest_weights = weights.pop(place), np.concatenate(values), np.concatenate(weights)
    if len(own) == 0 or len(rest) == 0:
        return None
    low, high = np.quantile(np.concatenate([own, rest]), [0.01, 0.99])
    if low == high:
        return None
    edges = np.linspace(low, high, _NUM_BINS + 1)
    inside, outside = (
        np.histogram(drawn.clip(low, high), edges, weights=weight)[0] / weight.sum()
        for drawn, weight in ((own, own_weights), (rest, rest_weights))
    )
    return Histogram(f"{feature.view.name} (d = {feature.view.strength})", edges, inside, outside)


def _column_values(members: Sequence[Member], name: str, column: int) -> FloatArray:
    values = [member.values[name][column] for member in members if name in member.values]
    return np.array(values, dtype=np.float64)
