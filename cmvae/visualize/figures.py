"""Figures of an evaluation: functions from plain arrays to matplotlib figures, without pyplot's global state.

Values of modalities come as they are stored, see `cmvae.modalities`, and each kind knows how to draw itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from cmvae.clustering import BoolArray, ClusterHierarchy, FloatArray, IntArray
from cmvae.modalities import ImageModality, Modality
from cmvae.models.export import ClusterRecord

_DPI = 120
# Between drawn values and the edge of their cell, in cells.
_CELL_GAP = 0.02
_ACCENT = "#d1495b"
_INK = "#22333b"
_MUTED = "#8d99ae"
# What a comparison of experiments shows, of the metrics that there are.
MAIN_METRICS = (
    "clustering/num_clusters",
    "clustering/acc",
    "clustering/nmi",
    "coherence/conditional",
    "coherence/unconditional",
    "frechet/classifier/unconditional",
    "frechet/classifier/conditional",
    "fid/unconditional",
    "fid/conditional",
    "likelihood/joint",
)
# More points of one colour than this run together.
_MAX_CATEGORIES_BY_COLOUR = 20
# What a refiner is for: this share of the CMVAE's distance at most, for so much of its coherence.
DISTANCE_SHARE, COHERENCE_LOSS = 0.5, 0.03
# Distances that differ by more than this factor are drawn on a logarithmic axis.
_LARGE_FACTOR = 20


def cross_modal_grid(
    inputs: Mapping[str, NDArray],
    generated: Mapping[tuple[str, str], NDArray],
    refined: Mapping[tuple[str, str], NDArray] | None = None,
    *,
    modalities: Mapping[str, Modality],
    present: Mapping[str, BoolArray] | None = None,
) -> Figure:
    """Every modality generated from every modality: a block of columns a target, a row a source.

    The first row holds the inputs; a column of a block is one sample, so that it shows one class from top
    to bottom. Where the source is the target, the block is framed. What a sample lacks is left white, and so
    is what would be generated from it.

    Args:
        inputs: modality → (N, *shape), as stored.
        generated: (source, target) → (N, *shape), for every ordered pair.
        refined: the same made sharp, in a row below each; of the targets that can be.
        modalities: by name.
        present: modality → (N,) bool, the samples that have it; None if all do.
    """
    names = list(inputs)
    num_samples = len(next(iter(inputs.values())))
    everything = np.ones(num_samples, dtype=bool)
    there = {name: everything if present is None else present[name] for name in names}
    rows: list[tuple[str, str | None, Mapping[str, NDArray]]] = [("input", None, inputs)]
    for source in names:
        rows.append((f"from {source}", source, {name: generated[source, name] for name in names}))
        if refined is not None:
            of_source = {name: refined[source, name] for name in names if (source, name) in refined}
            rows.append(("refined", source, of_source))
    widths, height = _cell_sizes([modalities[name] for name in names])
    figure = Figure(
        figsize=(
            0.9 + sum(num_samples * width + 0.15 for width in widths),
            0.45 + len(rows) * (height + 0.06),
        ),
        dpi=_DPI,
    )
    figure.set_layout_engine("constrained", w_pad=0.03, h_pad=0.03, wspace=0.01, hspace=0.0)
    axes = figure.subplots(len(rows), len(names), squeeze=False, width_ratios=widths)
    for column, (target, width) in enumerate(zip(names, widths, strict=True)):
        axes[0, column].set_title(f"→ {target}", fontsize=10, color=_INK, fontweight="bold")
        for row, (_, made_from, made) in enumerate(rows):
            ax = axes[row, column]
            _clear(ax)
            if target in made:
                shown = there[made_from or target]
                _show_values(ax, made[target][None], modalities[target], shown[None], (width, height))
                if made_from == target:
                    _frame(ax)
    for row, (title, _, _) in enumerate(rows):
        _title_row(axes[row, 0], title)
    return figure


def sample_rows(
    values: Mapping[str, NDArray],
    titles: Sequence[str],
    *,
    modalities: Mapping[str, Modality],
    present: Mapping[str, BoolArray] | None = None,
) -> Figure:
    """Samples that belong together in rows, such as those of one cluster; a block of columns a modality.

    Args:
        values: name of the block → (R, S, *shape), as stored; [r, s] is the same sample in every block.
        titles: R names of the rows.
        modalities: the modality that each block shows.
        present: name of the block → (R, S) bool, false where a place is left white; None if none is.
    """
    num_rows, num_samples = next(iter(values.values())).shape[:2]
    everything = np.ones((num_rows, num_samples), dtype=bool)
    widths, height = _cell_sizes([modalities[name] for name in values])
    figure = Figure(
        figsize=(
            1.2 + sum(num_samples * width + 0.15 for width in widths),
            0.45 + num_rows * height * 1.02,
        ),
        dpi=_DPI,
        layout="constrained",
    )
    axes = figure.subplots(1, len(values), squeeze=False, width_ratios=widths)[0]
    for ax, width, (name, samples) in zip(axes, widths, values.items(), strict=True):
        ax.set_title(name, fontsize=10, color=_INK, fontweight="bold")
        _clear(ax)
        shown = everything if present is None else present[name]
        _show_values(ax, samples, modalities[name], shown, (width, height))
    # Half a row down, in whatever units the first block counts.
    bottom, top = axes[0].get_ylim()
    middles = [top + (row + 0.5) / num_rows * (bottom - top) for row in range(num_rows)]
    axes[0].set_yticks(middles, titles)
    axes[0].tick_params(axis="y", length=0, labelsize=8, labelcolor=_INK)
    return figure


def criterion_curves(record: ClusterRecord) -> Figure:
    """Every criterion over the number of clusters, side by side, with the number that each selects.

    Args:
        record: of an export; the panel of the criterion that decided comes first, in colour.
    """
    names = sorted(record.curves, key=lambda name: name != record.criterion)
    figure = Figure(figsize=(3.4 * len(names), 3.2), dpi=_DPI, layout="constrained")
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        curve = record.curves[name]
        decides = name == record.criterion
        colour = _ACCENT if decides else _INK
        ax.plot(curve.num_clusters, curve.values, "o-", color=colour, markersize=3, linewidth=1.3)
        value = curve.values[curve.num_clusters.index(curve.selected)]
        ax.plot(curve.selected, value, "*", color=colour, markersize=13)
        ax.axvline(record.num_clusters, color=_MUTED, linestyle="--", linewidth=1, zorder=0)
        suffix = "" if not decides else ", decides" if record.told is None else f", told {record.told}"
        ax.set_title(f"{name}: {curve.selected}{suffix}", fontsize=9, color=_INK, loc="left")
        ax.set_xlabel("number of clusters", fontsize=9, color=_INK)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        _lighten(ax)
    return figure


def cluster_tree(hierarchy: ClusterHierarchy, num_clusters: int) -> Figure:
    """Which clusters merge first: a dendrogram from `num_clusters` down to one.

    Args:
        hierarchy: of merged clusters.
        num_clusters: leaves of the tree, a set of the hierarchy.
    """
    from scipy.cluster.hierarchy import dendrogram

    joins, names = hierarchy.linkage(num_clusters)
    figure = Figure(figsize=(2 + 0.4 * num_clusters, 3.4), dpi=_DPI, layout="constrained")
    ax = figure.subplots()
    dendrogram(
        joins, ax=ax, labels=[f"{name}" for name in names], color_threshold=0, above_threshold_color=_INK
    )
    ax.set_xlabel("cluster", fontsize=9, color=_INK)
    ax.set_ylabel("distance (Ward)", fontsize=9, color=_INK)
    _lighten(ax)
    return figure


def confusion_matrix(counts: IntArray, class_names: Sequence[str], cluster_ids: IntArray) -> Figure:
    """Samples of each class (rows) in each cluster (columns), coloured by the share of the class.

    Args:
        counts: (num_classes, U), from `cmvae.clustering.confusion`.
        class_names: names of the rows.
        cluster_ids: (U,) ids of the columns.
    """
    num_classes, num_clusters = counts.shape
    figure = Figure(
        figsize=(1.8 + 0.42 * num_clusters, 1.0 + 0.42 * num_classes), dpi=_DPI, layout="constrained"
    )
    ax = figure.add_subplot()
    # A class may have no samples in a small test set.
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.argwhere(counts > 0):
        ax.text(
            column,
            row,
            str(counts[row, column]),
            ha="center",
            va="center",
            fontsize=7,
            color="white" if share[row, column] > 0.5 else _INK,
        )
    ax.set_xticks(range(num_clusters), [str(cluster) for cluster in cluster_ids])
    ax.set_yticks(range(num_classes), class_names)
    ax.set_xticks(np.arange(1, num_clusters) - 0.5, minor=True)
    ax.set_yticks(np.arange(1, num_classes) - 0.5, minor=True)
    ax.grid(which="minor", color="#e9ecef", linewidth=0.8)
    ax.tick_params(which="both", length=0, labelsize=8, labelcolor=_INK)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("cluster", fontsize=9, color=_INK)
    ax.set_ylabel("class", fontsize=9, color=_INK)
    return figure


def coherence_matrix(coherence: FloatArray, sources: Sequence[str], targets: Sequence[str]) -> Figure:
    """Conditional coherence of every source (rows) and target (columns), as a heat map.

    Args:
        coherence: (sources, targets), shares.
        sources: names of the rows.
        targets: names of the columns.
    """
    num_rows, num_columns = coherence.shape
    figure = Figure(figsize=(1.4 + 0.62 * num_columns, 1.3 + 0.62 * num_rows), dpi=_DPI, layout="constrained")
    ax = figure.add_subplot()
    ax.imshow(coherence, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(num_rows, num_columns):
        ax.text(
            column,
            row,
            f"{coherence[row, column]:.2f}",
            ha="center",
            va="center",
            fontsize=9,
            color="white" if coherence[row, column] > 0.5 else _INK,
        )
    ax.set_xticks(range(num_columns), targets)
    ax.set_yticks(range(num_rows), sources)
    ax.tick_params(length=0, labelsize=9, labelcolor=_INK)
    ax.spines[:].set_visible(False)
    ax.set_title("read as the source's class", fontsize=10, color=_INK)
    ax.set_xlabel("generated", fontsize=9, color=_INK)
    ax.set_ylabel("from", fontsize=9, color=_INK)
    return figure


def latent_map(points: FloatArray, assignments: IntArray, labels: IntArray | None) -> Figure:
    """A 2-D map of z, coloured by cluster and, where there are labels, once more by class.

    Args:
        points: (N, 2), from `project_2d`.
        assignments: (N,) cluster ids.
        labels: (N,) class ids.
    """
    panels = [("clusters found", assignments)]
    if labels is not None:
        panels.append(("classes, which the model never saw", labels))
    figure = Figure(figsize=(5.2 * len(panels), 5.2), dpi=_DPI, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (title, categories) in zip(axes, panels, strict=True):
        ax.set_title(title, fontsize=10, color=_INK, loc="left")
        _scatter(ax, points, categories)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_color("#dee2e6")
    return figure


def project_2d(z: FloatArray, seed: int) -> FloatArray:
    """A t-SNE map of z (van der Maaten and Hinton, 2008), begun from its principal components.

    Args:
        z: (N, D); two thousand points take some seconds.
        seed: seed of the optimisation.

    Returns:
        (N, 2), without units.
    """
    # Slow to import, and only this draws with it.
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(z) - 1) / 3)
    tsne = TSNE(n_components=2, init="pca", perplexity=perplexity, random_state=seed)
    return tsne.fit_transform(np.asarray(z, dtype=np.float32))


def metric_comparison(
    groups: Mapping[str, Mapping[str, Sequence[float]]], metrics: Sequence[str] | None = None
) -> Figure:
    """The main metrics of some experiments, a panel each: every repeat, their mean and standard deviation.

    Args:
        groups: name of the experiment → metric → one value a repeat.
        metrics: what is drawn; None is those of `MAIN_METRICS` that there are, or all if there are none.
    """
    # The names of the experiments stand at the left only.
    figure, panels = _panels(groups.values(), metrics, 0.7 + 0.3 * len(groups), sharey=True)
    for ax, name in panels:
        for row, of_group in enumerate(groups.values()):
            values = np.asarray(of_group.get(name, ()), dtype=np.float64)
            ax.plot(values, np.full(len(values), row), "o", color=_MUTED, markersize=4, alpha=0.7)
            if len(values):
                ax.errorbar(
                    values.mean(), row, xerr=_spread(values), fmt="D", color=_ACCENT, markersize=5, capsize=3
                )
        ax.set_yticks(range(len(groups)), list(groups))
        ax.set_ylim(len(groups) - 0.5, -0.5)
    return figure


def metrics_along(
    groups: Mapping[float, Mapping[str, Sequence[float]]], key: str, metrics: Sequence[str] | None = None
) -> Figure:
    """Metrics over a setting, a panel each: every repeat, and a line through means with standard deviations.

    Args:
        groups: value of the setting → metric → one value a repeat.
        key: what the setting is called.
        metrics: as of `metric_comparison`.
    """
    figure, panels = _panels(groups.values(), metrics, 2.6, sharey=False)
    for ax, name in panels:
        known = {
            x: np.asarray(groups[x][name], dtype=np.float64) for x in sorted(groups) if groups[x].get(name)
        }
        for x, values in known.items():
            ax.plot(np.full(len(values), x), values, "o", color=_MUTED, markersize=4, alpha=0.7)
        ax.errorbar(
            list(known),
            [values.mean() for values in known.values()],
            yerr=[_spread(values) for values in known.values()],
            fmt="D-",
            color=_ACCENT,
            markersize=5,
            capsize=3,
            linewidth=1.2,
        )
        ax.set_xlabel(key, fontsize=9, color=_INK)
    return figure


def _panels(
    groups: Iterable[Mapping[str, Sequence[float]]],
    metrics: Sequence[str] | None,
    height: float,
    *,
    sharey: bool,
) -> tuple[Figure, list[tuple[Axes, str]]]:
    """A figure with a panel for each metric, `height` inches each: those asked for, or the main ones."""
    known = {name for of_group in groups for name in of_group}
    names = list(metrics or ()) or [name for name in MAIN_METRICS if name in known] or sorted(known)
    num_columns = min(3, len(names))
    num_rows = -(-len(names) // num_columns)
    figure = Figure(figsize=(1.2 + 3.4 * num_columns, height * num_rows), dpi=_DPI, layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False, sharey=sharey).ravel()
    for ax, name in zip(axes, names, strict=False):
        ax.set_title(name, fontsize=9, color=_INK, loc="left")
        _lighten(ax)
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    return figure, list(zip(axes, names, strict=False))


def _spread(values: FloatArray) -> float:
    """Standard deviation over repeats; of a single one nothing is known."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def curve_comparison(
    curves: Mapping[str, Mapping[int, float]],
    differences: Mapping[str, Mapping[int, float]],
    metric: str,
    reference: str,
) -> Figure:
    """One curve of several runs, and below it how far each is from the first.

    Args:
        curves: name of the run → step → value.
        differences: the same, the size of each run's difference.
        metric: what is drawn.
        reference: name of the run that the others are compared with.
    """
    figure = Figure(figsize=(6.4, 4.8), dpi=_DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, lines, title in (
        (above, curves, metric),
        (below, differences, f"distance to {reference}"),
    ):
        for number, name in enumerate(curves):
            line = lines.get(name, {})
            # Curves that lie on each other: the later ones dashed, for all to be seen.
            style = ("-", "--", "-.", ":")[number % 4]
            label = name if line else None
            axes.plot(list(line), list(line.values()), style, color=f"C{number}", label=label, linewidth=1.2)
        axes.set_title(title, fontsize=9, color=_INK, loc="left")
        axes.legend(fontsize=8, frameon=False)
        _lighten(axes)
    # Runs that are equal at first, and later in the last digits, differ by orders of magnitude.
    below.set_yscale("symlog", linthresh=1e-4)
    below.set_xlabel("step")
    return figure


def distance_by_steps(
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    references: Mapping[str, Mapping[str, float]],
) -> Figure:
    """Fréchet distances over the number of steps that a sampler takes, a panel a kind of generation.

    Args:
        curves: kind → name of the line → (number of steps, distance), by rising number of steps.
        references: kind → name → distance of what takes no steps: a horizontal line each.
    """
    figure = Figure(figsize=(0.6 + 3.6 * len(curves), 4.0), dpi=_DPI, layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, (kind, lines) in zip(axes, curves.items(), strict=True):
        for (name, line), style in zip(lines.items(), _line_styles(), strict=False):
            ax.plot(*zip(*line, strict=True), label=name, linewidth=1.3, markersize=5, **style)
        for (name, distance), (colour, dash) in zip(
            references[kind].items(), ((_ACCENT, "--"), (_INK, ":")), strict=False
        ):
            ax.axhline(distance, color=colour, linestyle=dash, linewidth=1.3, label=name, zorder=1)
        steps = sorted({steps for line in lines.values() for steps, _ in line})
        ax.set_xscale("log")
        ax.set_xticks(steps, [str(number) for number in steps])
        ax.set_xticks([], minor=True)
        ax.set_xlabel("steps", fontsize=9, color=_INK)
        ax.set_title(kind, fontsize=10, color=_INK, loc="left")
        _lighten(ax)
        _scale_distances(ax, [*references[kind].values(), *(y for line in lines.values() for _, y in line)])
    axes[0].set_ylabel("Fréchet distance, classifier features", fontsize=9, color=_INK)
    _put_legend_below(figure, axes[0])
    return figure


def distance_by_coherence(
    points: Mapping[str, Mapping[str, Sequence[tuple[str, float, float]]]],
    unrefined: Mapping[str, tuple[float, float]],
    floors: Mapping[str, float],
    names: tuple[str, str],
) -> Figure:
    """What refinement gains and costs: Fréchet distance over coherence, a panel a kind of generation.

    Shaded is where the distance is at most `DISTANCE_SHARE` of that without refinement, and at most
    `COHERENCE_LOSS` of the coherence is lost.

    Args:
        points: kind → name of the line → (label, coherence, distance), in the order of the line.
        unrefined: kind → (coherence, distance) without refinement.
        floors: kind → distance of real images, which have no coherence: a horizontal line.
        names: what the last two are called.
    """
    figure = Figure(figsize=(0.6 + 4.6 * len(points), 4.6), dpi=_DPI, layout="constrained")
    axes = figure.subplots(1, len(points), squeeze=False)[0]
    labels = []
    for ax, (kind, lines) in zip(axes, points.items(), strict=True):
        for (name, line), style in zip(lines.items(), _line_styles(), strict=False):
            texts, *values = zip(*line, strict=True)
            ax.plot(*values, label=name, linewidth=0.8, markersize=6, **style)
            labels += [(ax, text, (x, y), style["color"]) for text, x, y in zip(texts, *values, strict=True)]
        coherence, distance = unrefined[kind]
        ax.plot(coherence, distance, "*", color=_ACCENT, markersize=15, label=names[0])
        ax.axhline(floors[kind], color=_INK, linestyle=":", linewidth=1.3, label=names[1], zorder=1)
        _lighten(ax)
        _scale_distances(ax, [distance, floors[kind], *(y for line in lines.values() for _, _, y in line)])
        _shade_goal(ax, coherence, distance)
        ax.set_xlabel("coherence", fontsize=9, color=_INK)
        ax.set_title(kind, fontsize=10, color=_INK, loc="left")
    axes[0].set_ylabel("Fréchet distance, classifier features", fontsize=9, color=_INK)
    _put_legend_below(figure, axes[0])
    _place_labels(figure, labels)
    return figure


def _line_styles() -> Iterator[dict[str, Any]]:
    """Colours and markers of lines, without end and without repeating soon."""
    # Without its red and grey, which are those of what the lines are compared with.
    palette = [matplotlib.colormaps["tab10"](number) for number in (0, 1, 2, 4, 5, 6, 8, 9)]
    for colour, marker in zip(cycle(palette), cycle("osD^v"), strict=False):
        yield {"color": colour, "marker": marker}


def _scale_distances(ax: Axes, distances: Sequence[float]) -> None:
    """A vertical axis from zero, or a logarithmic one where the small distances would not be seen."""
    if min(distances) > 0 and max(distances) > _LARGE_FACTOR * min(distances):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter("{x:g}")
        return
    # Zero is the best there is, not where the panel ends.
    top = max(*distances, 1e-6)
    ax.set_ylim(-0.03 * top, 1.1 * top)


def _shade_goal(ax: Axes, coherence: float, distance: float) -> None:
    """Shade what is good enough, seen from (coherence, distance); the limits are moved to show some of it."""
    left, (low, high) = coherence - COHERENCE_LOSS, ax.get_ylim()
    first, last = ax.get_xlim()
    ax.set_xlim(min(first, left - COHERENCE_LOSS), max(last, min(1.0, coherence + COHERENCE_LOSS)))
    goal = DISTANCE_SHARE * distance
    low = min(low, 0.7 * goal)
    ax.set_ylim(low, high)
    ax.fill_between(
        [left, ax.get_xlim()[1]],
        low,
        goal,
        color="#52b788",
        alpha=0.18,
        linewidth=0,
        zorder=0,
        label=f"at most {DISTANCE_SHARE:.0%} of the distance, {100 * COHERENCE_LOSS:g} points less coherence",
    )


def _put_legend_below(figure: Figure, ax: Axes) -> None:
    handles, labels = ax.get_legend_handles_labels()
    # Inches: the line and the gaps, and a letter of this size.
    column = 0.7 + 0.06 * max(map(len, labels))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=max(1, int(figure.get_figwidth() / column)),
        fontsize=8,
        labelcolor=_INK,
        frameon=False,
    )


def _place_labels(
    figure: Figure, labels: Sequence[tuple[Axes, str, tuple[float, float], tuple[float, ...]]]
) -> None:
    """Write labels beside their points, where they cover neither points nor each other if there is room.

    Args:
        figure: drawn but for the labels.
        labels: axes, text, point in units of the data, colour.
    """
    figure.draw_without_rendering()
    points = [ax.transData.transform(point) for ax, _, point, _ in labels]
    pixels = figure.dpi / 72
    taken = [Bbox.from_extents(*(point - 4 * pixels), *(point + 4 * pixels)) for point in points]
    for ax, text, point, colour in labels:
        best, least = None, float("inf")
        for across, up in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            label = ax.annotate(
                text,
                point,
                (7 * across, 7 * up),
                textcoords="offset points",
                ha=("right", "center", "left")[across + 1],
                va=("top", "center", "bottom")[up + 1],
                fontsize=7,
                color=colour,
            )
            label.set_in_layout(False)
            box = label.get_window_extent()
            inside = Bbox.intersection(box, ax.bbox)
            overlaps = [Bbox.intersection(box, other) for other in taken]
            cost = _area(box) - _area(inside) + sum(map(_area, overlaps))
            if cost < least:
                if best is not None:
                    best[0].remove()
                best, least = (label, box), cost
            else:
                label.remove()
        if best is not None:
            taken.append(best[1])


def _area(box: Bbox | None) -> float:
    return 0.0 if box is None else float(box.width * box.height)


def _cell_sizes(modalities: Sequence[Modality]) -> tuple[list[float], float]:
    """Inches of a value of each modality beside each other: their widths, and the height of all."""
    sizes = [modality.drawn_size for modality in modalities]
    height = max(height for _, height in sizes)
    # A picture grows with its row; text and bars would only be pulled apart.
    widths = [
        width * height / own if isinstance(modality, ImageModality) else width
        for modality, (width, own) in zip(modalities, sizes, strict=True)
    ]
    return widths, height


def _show_values(
    ax: Axes, values: NDArray, modality: Modality, shown: BoolArray, cell: tuple[float, float]
) -> None:
    """Stored values (R, S, *shape) in rows and columns, where `shown` (R, S) says so.

    Images are one picture, which is quick; of other kinds each value has an axis of its own, `cell` wide and
    high.
    """
    if isinstance(modality, ImageModality):
        ax.imshow(_tile(values, shown), interpolation="nearest")
        return
    (num_rows, num_columns), (width, height) = shown.shape, cell
    # As wide and high as pictures of this size would be, so that rows are level with them.
    ax.set(xlim=(0, num_columns * width), ylim=(num_rows * height, 0), aspect="equal")
    for row, column in np.argwhere(shown):
        inner = ax.inset_axes(
            (
                (column + _CELL_GAP) / num_columns,
                1 - (row + 1 - _CELL_GAP) / num_rows,
                (1 - 2 * _CELL_GAP) / num_columns,
                (1 - 2 * _CELL_GAP) / num_rows,
            )
        )
        # Else the layout would look at each of hundreds, which takes long.
        inner.set_in_layout(False)
        inner.set(xticks=[], yticks=[])
        inner.spines[:].set(color="#e9ecef", linewidth=0.7)
        modality.draw(inner, values[row, column])


def _tile(images: NDArray, shown: BoolArray) -> NDArray:
    """One RGB picture (H', W', 3) uint8 of images (R, S, C, H, W) uint8, a white pixel apart."""
    rows, columns, _, height, width = images.shape
    canvas = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, 3), 255, dtype=np.uint8)
    for row, column in np.argwhere(shown):
        top, left = row * (height + 1) + 1, column * (width + 1) + 1
        # One channel spreads over the three of the canvas.
        canvas[top : top + height, left : left + width] = images[row, column].transpose(1, 2, 0)
    return canvas


def _clear(ax: Axes) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def _frame(ax: Axes) -> None:
    ax.spines[:].set(visible=True, color=_ACCENT, linewidth=1.8)


def _title_row(ax: Axes, title: str) -> None:
    ax.set_ylabel(title, rotation=0, ha="right", va="center", fontsize=9, color=_INK, labelpad=6)


def _lighten(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(_MUTED)
    ax.tick_params(labelsize=8, colors=_INK)
    ax.grid(color="#e9ecef", linewidth=0.7)
    ax.set_axisbelow(True)


def _scatter(ax: Axes, points: FloatArray, categories: IntArray) -> None:
    """Points coloured by category, and each category's id at the median of its points."""
    present = np.unique(categories)
    if len(present) <= _MAX_CATEGORIES_BY_COLOUR:
        # The saturated half of tab20 first: ten categories are then easy to tell apart.
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
            color=_INK,
            bbox={"boxstyle": "circle,pad=0.22", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )
