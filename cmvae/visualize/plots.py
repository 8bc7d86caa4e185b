"""Plots of the results of an evaluation: numbers of clusters, confusion, coherence, latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cmvae.clustering import ClusterHierarchy, FloatArray, IntArray
from cmvae.models.export import ClusterRecord
from cmvae.visualize.style import ACCENT, GRID, INK, MUTED, Figure, lighten

# More colours than this are hard to tell apart, and are taken from a continuous map.
_MAX_CATEGORIES_BY_COLOUR = 20
# Inches of a heat map; cells of more rows or columns are smaller, below these sizes without texts and names.
_MAX_HEAT_MAP, _MIN_TEXT, _MIN_NAME = 60.0, 0.2, 0.1
_MAX_NAME = 40


def criterion_curves(record: ClusterRecord) -> Figure:
    """One panel per criterion: its values over the number of clusters, and the number that it selects.

    Args:
        record: the cluster record of an export. The criterion that decided comes first, in colour.
    """
    names = sorted(record.curves, key=lambda name: name != record.criterion)
    figure = Figure(figsize=(3.4 * len(names), 3.2), layout="constrained")
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        curve = record.curves[name]
        decides = name == record.criterion
        colour = ACCENT if decides else INK
        ax.plot(curve.num_clusters, curve.values, "o-", color=colour, markersize=3, linewidth=1.3)
        value = curve.values[curve.num_clusters.index(curve.selected)]
        ax.plot(curve.selected, value, "*", color=colour, markersize=13)
        ax.axvline(record.num_clusters, color=MUTED, linestyle="--", linewidth=1, zorder=0)
        suffix = "" if not decides else ", decides" if record.told is None else f", told {record.told}"
        ax.set_title(f"{name}: {curve.selected}{suffix}", fontsize=9, color=INK, loc="left")
        ax.set_xlabel("number of clusters", fontsize=9, color=INK)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        lighten(ax)
    return figure


def cluster_tree(hierarchy: ClusterHierarchy, num_clusters: int) -> Figure:
    """Dendrogram of the merges from `num_clusters` down to one.

    Args:
        hierarchy: the merged clusters.
        num_clusters: number of leaves; the hierarchy must have a level of that size.
    """
    from scipy.cluster.hierarchy import dendrogram

    joins, names = hierarchy.linkage(num_clusters)
    figure = Figure(figsize=(2 + 0.4 * num_clusters, 3.4), layout="constrained")
    ax = figure.subplots()
    dendrogram(
        joins, ax=ax, labels=[f"{name}" for name in names], color_threshold=0, above_threshold_color=INK
    )
    ax.set_xlabel("cluster", fontsize=9, color=INK)
    ax.set_ylabel("distance (Ward)", fontsize=9, color=INK)
    lighten(ax)
    return figure


def pruning_curves(
    curves: Mapping[str, Sequence[float]], num_clusters: Sequence[int], selected: int
) -> Figure:
    """Agreement with the classes at every step of the pruning.

    Args:
        curves: by name of a score, its values per step.
        num_clusters: number of clusters per step.
        selected: the number that was selected.
    """
    figure = Figure(figsize=(4.6, 3.2), layout="constrained")
    ax = figure.subplots()
    for name, values in curves.items():
        ax.plot(num_clusters, values, "o-", markersize=3, linewidth=1.3, label=name.upper())
    ax.axvline(selected, color=MUTED, linestyle="--", linewidth=1, zorder=0)
    ax.set_title(f"selected: {selected}", fontsize=9, color=INK, loc="left")
    ax.set_xlabel("number of clusters", fontsize=9, color=INK)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(fontsize=8, frameon=False)
    lighten(ax)
    return figure


def confusion_matrix(counts: IntArray, class_names: Sequence[str], cluster_ids: IntArray) -> Figure:
    """Number of samples per class (rows) and cluster (columns), coloured by the share of the class.

    Args:
        counts: (num_classes, U), from `cmvae.clustering.confusion`.
        class_names: names of the rows.
        cluster_ids: (U,) ids of the columns.
    """
    # A class may have no samples in a small test set.
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    texts = [[str(count) if count else "" for count in row] for row in counts]
    figure, ax = _heat_map(shares, texts, class_names, [str(cluster) for cluster in cluster_ids], cell=0.42)
    if max(counts.shape) * _MIN_TEXT <= _MAX_HEAT_MAP:
        ax.set_xticks(np.arange(1, counts.shape[1]) - 0.5, minor=True)
        ax.set_yticks(np.arange(1, counts.shape[0]) - 0.5, minor=True)
    ax.grid(which="minor", color=GRID, linewidth=0.8)
    ax.tick_params(which="minor", length=0)
    ax.set_xlabel("cluster", fontsize=9, color=INK)
    ax.set_ylabel("class", fontsize=9, color=INK)
    return figure


def coherence_matrix(coherence: FloatArray, sources: Sequence[str], targets: Sequence[str]) -> Figure:
    """Heat map of the conditional coherence of every source (rows) and target (columns).

    Args:
        coherence: (sources, targets), shares in [0, 1].
        sources: names of the rows.
        targets: names of the columns.
    """
    texts = [[f"{share:.2f}" for share in row] for row in coherence]
    figure, ax = _heat_map(coherence, texts, sources, targets, cell=0.62)
    ax.set_title("classified as the source's class", fontsize=10, color=INK)
    ax.set_xlabel("generated", fontsize=9, color=INK)
    ax.set_ylabel("from", fontsize=9, color=INK)
    return figure


def _heat_map(
    shares: FloatArray,
    texts: Sequence[Sequence[str]],
    rows: Sequence[str],
    columns: Sequence[str],
    cell: float,
) -> tuple[Figure, Axes]:
    """Cells of at most `cell` inches, coloured by shares in [0, 1], with a text in each; it may be empty."""
    cell = min(cell, _MAX_HEAT_MAP / max(len(rows), len(columns)))
    size = (1.8 + cell * len(columns), 1.3 + cell * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.add_subplot()
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(*shares.shape) if cell >= _MIN_TEXT else ():
        if texts[row][column]:
            colour = "white" if shares[row, column] > 0.5 else INK
            ax.text(
                column, row, texts[row][column], ha="center", va="center", fontsize=15 * cell, color=colour
            )
    ax.set_xticks([], [])
    ax.set_yticks([], [])
    if cell >= _MIN_NAME:
        ax.set_xticks(range(len(columns)), [_shorten(name) for name in columns])
        ax.set_yticks(range(len(rows)), [_shorten(name) for name in rows])
    ax.tick_params(length=0, labelsize=min(8, 60 * cell), labelcolor=INK)
    ax.spines[:].set_visible(False)
    return figure, ax


def _shorten(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"


def latent_map(points: FloatArray, assignments: IntArray, labels: IntArray | None) -> Figure:
    """Scatter plot of z in two dimensions, coloured by cluster and, in a second panel, by class.

    Args:
        points: (N, 2), from `project_2d`.
        assignments: (N,) cluster ids.
        labels: (N,) class ids, −1 for samples without one, which the second panel leaves out; None draws the
            first panel only.
    """
    panels = [("clusters found", points, assignments)]
    if labels is not None:
        known = labels >= 0
        panels.append(("classes, which the model never saw", points[known], labels[known]))
    figure = Figure(figsize=(5.2 * len(panels), 5.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, places, categories) in zip(axes, panels, strict=True):
        ax.set_title(title, fontsize=10, color=INK, loc="left")
        _scatter(ax, places, categories)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_color("#dee2e6")
    return figure


def project_2d(z: FloatArray, seed: int) -> FloatArray:
    """t-SNE embedding of z (van der Maaten and Hinton, 2008), initialized with principal components.

    Args:
        z: (N, D), at least 4 points; 2,000 points take some seconds.
        seed: seed of the optimization.

    Returns:
        (N, 2), without units.
    """
    # Slow to import, and used only here.
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(z) - 1) / 3)
    tsne = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=seed)
    return tsne.fit_transform(np.asarray(z, dtype=np.float32))


def _scatter(ax: Axes, points: FloatArray, categories: IntArray) -> None:
    """Draw points coloured by category, and the id of each category at the median of its points."""
    present = np.unique(categories)
    if len(present) <= _MAX_CATEGORIES_BY_COLOUR:
        # The saturated half of tab20 first, so that up to ten categories are easy to tell apart.
        palette = matplotlib.colormaps["tab20"](np.r_[0:20:2, 1:20:2])
    else:
        palette = matplotlib.colormaps["turbo"](np.linspace(0.03, 0.97, len(present)))
    for colour, category in zip(palette, present, strict=False):
        x, y = points[categories == category].T
        ax.scatter(x, y, s=9, color=colour, linewidths=0, alpha=0.75)
    for category in present:
        x, y = np.median(points[categories == category], axis=0)
        ax.text(
            x,
            y,
            str(category),
            ha="center",
            va="center",
            fontsize=9,
            fontweight="bold",
            color=INK,
            bbox={"boxstyle": "circle,pad=0.22", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )
