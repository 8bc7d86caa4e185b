"""Figures of the benchmarks: curves of runs, and samplers of a refiner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from cmvae.visualize.style import ACCENT, INK, Figure, lighten

# The goal of a refiner: at most this share of the CMVAE's distance, at most this loss of coherence.
DISTANCE_SHARE, COHERENCE_LOSS = 0.5, 0.03
# Distances that differ by more than this factor are drawn on a logarithmic axis.
_LARGE_FACTOR = 20
_LEGEND: Mapping[str, Any] = {
    "loc": "outside lower center",
    "ncols": 2,
    "fontsize": 8,
    "labelcolor": INK,
    "frameon": False,
}


def curve_comparison(
    curves: Mapping[str, Mapping[int, float]],
    differences: Mapping[str, Mapping[int, float]],
    metric: str,
    reference: str,
) -> Figure:
    """Draw a metric of several runs, and below it their absolute differences to the first run.

    Args:
        curves: name of the run → step → value.
        differences: name of the run → step → absolute difference.
        metric: name of the metric.
        reference: name of the first run.
    """
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for axes, lines, title in (
        (above, curves, metric),
        (below, differences, f"distance to {reference}"),
    ):
        for number, name in enumerate(curves):
            line = lines.get(name, {})
            # Later curves are dashed, so that coinciding ones can be seen.
            style = ("-", "--", "-.", ":")[number % 4]
            label = name if line else None
            axes.plot(list(line), list(line.values()), style, color=f"C{number}", label=label, linewidth=1.2)
        axes.set_title(title, fontsize=9, color=INK, loc="left")
        axes.legend(fontsize=8, frameon=False)
        lighten(axes)
    # Differences range over orders of magnitude and may be zero at first.
    below.set_yscale("symlog", linthresh=1e-4)
    below.set_xlabel("step")
    return figure


def distance_by_steps(
    curves: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]],
    references: Mapping[str, Mapping[str, float]],
) -> Figure:
    """Draw Fréchet distances over the number of sampling steps, one panel per kind of samples.

    Args:
        curves: kind → name of the line → (number of steps, distance), in ascending order.
        references: kind → name → distance that does not depend on steps, drawn as a horizontal line.
    """
    figure = Figure(figsize=(0.6 + 3.6 * len(curves), 4.0), layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, (kind, lines) in zip(axes, curves.items(), strict=True):
        for (name, line), style in zip(lines.items(), _line_styles(), strict=False):
            ax.plot(*zip(*line, strict=True), label=name, linewidth=1.3, markersize=5, **style)
        for (name, distance), (colour, dash) in zip(
            references[kind].items(), ((ACCENT, "--"), (INK, ":")), strict=False
        ):
            ax.axhline(distance, color=colour, linestyle=dash, linewidth=1.3, label=name, zorder=1)
        steps = sorted({steps for line in lines.values() for steps, _ in line})
        ax.set_xscale("log")
        ax.set_xticks(steps, [str(number) for number in steps])
        ax.set_xticks([], minor=True)
        ax.set_xlabel("steps", fontsize=9, color=INK)
        ax.set_title(kind, fontsize=10, color=INK, loc="left")
        lighten(ax)
        _scale_distances(ax, [*references[kind].values(), *(y for line in lines.values() for _, y in line)])
    axes[0].set_ylabel("Fréchet distance, classifier features", fontsize=9, color=INK)
    figure.legend(*axes[0].get_legend_handles_labels(), **_LEGEND)
    return figure


def distance_by_coherence(
    points: Mapping[str, Mapping[str, Sequence[tuple[str, float, float]]]],
    unrefined: Mapping[str, tuple[float, float]],
    floors: Mapping[str, float],
    names: tuple[str, str],
) -> Figure:
    """Draw Fréchet distance over coherence, one panel per kind of samples.

    The shaded area meets the goal of `DISTANCE_SHARE` and `COHERENCE_LOSS`.

    Args:
        points: kind → name of the line → (label, coherence, distance), in the order of the line.
        unrefined: kind → (coherence, distance) without refinement.
        floors: kind → distance of real images, drawn as a horizontal line.
        names: titles of `unrefined` and `floors`.
    """
    figure = Figure(figsize=(0.6 + 4.6 * len(points), 4.6), layout="constrained")
    axes = figure.subplots(1, len(points), squeeze=False)[0]
    for ax, (kind, lines) in zip(axes, points.items(), strict=True):
        for (name, line), style in zip(lines.items(), _line_styles(), strict=False):
            texts, *values = zip(*line, strict=True)
            ax.plot(*values, label=name, linewidth=0.8, markersize=6, **style)
            for text, *point in zip(texts, *values, strict=True):
                ax.annotate(text, point, (5, 3), textcoords="offset points", fontsize=7, color=style["color"])
        coherence, distance = unrefined[kind]
        ax.plot(coherence, distance, "*", color=ACCENT, markersize=15, label=names[0])
        ax.axhline(floors[kind], color=INK, linestyle=":", linewidth=1.3, label=names[1], zorder=1)
        lighten(ax)
        _scale_distances(ax, [distance, floors[kind], *(y for line in lines.values() for _, _, y in line)])
        _shade_goal(ax, coherence, distance)
        ax.set_xlabel("coherence", fontsize=9, color=INK)
        ax.set_title(kind, fontsize=10, color=INK, loc="left")
    axes[0].set_ylabel("Fréchet distance, classifier features", fontsize=9, color=INK)
    figure.legend(*axes[0].get_legend_handles_labels(), **_LEGEND)
    return figure


def _line_styles() -> Iterator[dict[str, Any]]:
    """Endless colours and markers of lines."""
    # Red and grey are left to the references.
    palette = [matplotlib.colormaps["tab10"](number) for number in (0, 1, 2, 4, 5, 6, 8, 9)]
    for colour, marker in zip(cycle(palette), cycle("osD^v"), strict=False):
        yield {"color": colour, "marker": marker}


def _scale_distances(ax: Axes, distances: Sequence[float]) -> None:
    """Start the vertical axis at zero, or make it logarithmic if distances differ by orders of magnitude."""
    if min(distances) > 0 and max(distances) > _LARGE_FACTOR * min(distances):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_formatter("{x:g}")
        return
    # A margin below zero, so that points at zero are visible.
    top = max(*distances, 1e-6)
    ax.set_ylim(-0.03 * top, 1.1 * top)


def _shade_goal(ax: Axes, coherence: float, distance: float) -> None:
    """Shade the goal relative to (coherence, distance), and extend the limits to show it."""
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


def metric_panels(
    columns: Sequence[str], rows: Mapping[str, Sequence[Mapping[str, float] | None]], metrics: Sequence[str]
) -> Figure:
    """Draw a table of metrics, one panel per metric, with values as numbers and colours; the best is bold.

    Args:
        columns: C names of columns.
        rows: name of a row → C metrics by name, None where there are none.
        metrics: the metrics to draw, in [0, 1] where they are good.
    """
    # Panels lie below each other, so that numbers stay legible on a narrow page.
    size = (3.4 + 0.58 * len(columns), 1.3 + len(metrics) * (0.4 + 0.27 * len(rows)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(metrics), 1, squeeze=False, sharex=True)[:, 0]
    for ax, metric in zip(axes, metrics, strict=True):
        values = np.array([[cell[metric] if cell else np.nan for cell in cells] for cells in rows.values()])
        ax.imshow(values, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
        best = np.nanmax(values, axis=0, initial=-1)
        for (row, column), value in np.ndenumerate(values):
            if np.isnan(value):
                continue
            ax.text(
                column,
                row,
                f"{round(value, 2) + 0.0:.2f}".replace("0.", ".", 1),  # no minus before zero
                ha="center",
                va="center",
                fontsize=7.5,
                color="white" if value > 0.5 else INK,
                fontweight="bold" if value == best[column] else "normal",
            )
        ax.set_title(metric.upper(), fontsize=10, color=INK, fontweight="bold")
        ax.set_yticks(range(len(rows)), list(rows), fontsize=8, color=INK)
        ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8, color=INK)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    return figure
