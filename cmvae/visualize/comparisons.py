"""Figures that compare the metrics of several experiments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes

from cmvae.clustering import FloatArray
from cmvae.visualize.style import ACCENT, INK, MUTED, Figure, lighten

# Drawn by default, as far as the experiments have them.
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


def metric_comparison(
    groups: Mapping[str, Mapping[str, Sequence[float]]], metrics: Sequence[str] | None = None
) -> Figure:
    """Compare experiments: one panel per metric with every repeat, their mean and standard deviation.

    Args:
        groups: name of the experiment → metric → one value per repeat.
        metrics: metrics to draw; None draws those of `MAIN_METRICS` that are available, or else all.
    """
    figure, panels = _panels(groups.values(), metrics, 0.7 + 0.3 * len(groups), sharey=True)
    for ax, name in panels:
        for row, of_group in enumerate(groups.values()):
            values = np.asarray(of_group.get(name, ()), dtype=np.float64)
            ax.plot(values, np.full(len(values), row), "o", color=MUTED, markersize=4, alpha=0.7)
            if len(values):
                ax.errorbar(
                    values.mean(), row, xerr=_spread(values), fmt="D", color=ACCENT, markersize=5, capsize=3
                )
        ax.set_yticks(range(len(groups)), list(groups))
        ax.set_ylim(len(groups) - 0.5, -0.5)
    return figure


def metrics_along(
    groups: Mapping[float, Mapping[str, Sequence[float]]], key: str, metrics: Sequence[str] | None = None
) -> Figure:
    """Metrics as a function of a setting: one panel per metric, with means and standard deviations.

    Args:
        groups: value of the setting → metric → one value per repeat.
        key: name of the setting.
        metrics: see `metric_comparison`.
    """
    figure, panels = _panels(groups.values(), metrics, 2.6, sharey=False)
    for ax, name in panels:
        known = {
            x: np.asarray(groups[x][name], dtype=np.float64) for x in sorted(groups) if groups[x].get(name)
        }
        for x, values in known.items():
            ax.plot(np.full(len(values), x), values, "o", color=MUTED, markersize=4, alpha=0.7)
        ax.errorbar(
            list(known),
            [values.mean() for values in known.values()],
            yerr=[_spread(values) for values in known.values()],
            fmt="D-",
            color=ACCENT,
            markersize=5,
            capsize=3,
            linewidth=1.2,
        )
        ax.set_xlabel(key, fontsize=9, color=INK)
    return figure


def _panels(
    groups: Iterable[Mapping[str, Sequence[float]]],
    metrics: Sequence[str] | None,
    height: float,
    *,
    sharey: bool,
) -> tuple[Figure, list[tuple[Axes, str]]]:
    """A figure with one panel per metric, each `height` inches high, and the panels with their metrics."""
    known = {name for of_group in groups for name in of_group}
    names = list(metrics or ()) or [name for name in MAIN_METRICS if name in known] or sorted(known)
    num_columns = min(3, len(names))
    num_rows = -(-len(names) // num_columns)
    figure = Figure(figsize=(1.2 + 3.4 * num_columns, height * num_rows), layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False, sharey=sharey).ravel()
    for ax, name in zip(axes, names, strict=False):
        ax.set_title(name, fontsize=9, color=INK, loc="left")
        lighten(ax)
    for ax in axes[len(names) :]:
        ax.set_visible(False)
    return figure, list(zip(axes, names, strict=False))


def _spread(values: FloatArray) -> float:
    """Sample standard deviation; 0 for a single value, which draws no bar."""
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
