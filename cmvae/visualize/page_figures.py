"""Figures of the cluster page, as Plotly's JSON: `{"data": [...], "layout": {...}}`.

Colours of text, axes and grids are left to the page, which has a light and a dark theme.
"""

from __future__ import annotations

import colorsys
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cmvae.clustering import FloatArray, IntArray

Figure = dict[str, Any]

# The first ten are those of tab10, which are easy to tell apart; further ones are
# darker and go around the colour circle.
_COLOURS = (
    "#1f77b4",
    "#ff7f0e",
    "#2ca02c",
    "#d62728",
    "#9467bd",
    "#8c564b",
    "#e377c2",
    "#17becf",
    "#bcbd22",
    "#7f7f7f",
)
_GOLDEN_ANGLE = 0.381966
_REST_COLOUR = "#9aa5b1"
# Numbers in the cells of a larger confusion matrix could not be read.
_MAX_CELLS_WITH_NUMBERS = 600
_PANELS_PER_ROW = 3


@dataclass(frozen=True)
class Histogram:
    """Distribution of a column inside and outside of a cluster."""

    title: str
    edges: FloatArray
    """(B + 1,)"""
    inside: FloatArray
    """(B,) shares of the cluster's samples."""
    outside: FloatArray
    """(B,) shares of the other samples."""


def category_colour(number: int) -> str:
    """Colour of the `number`-th cluster or class, as `#rrggbb`."""
    if number < len(_COLOURS):
        return _COLOURS[number]
    hue = (number - len(_COLOURS) + 0.5) * _GOLDEN_ANGLE % 1
    rgb = colorsys.hls_to_rgb(hue, 0.35, 0.6)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def plain(text: str) -> str:
    """A text of the data as Plotly shows it literally: Plotly reads tags such as `<b>` and `<a>`."""
    return html.escape(text, quote=False)


def map_figure(
    points: FloatArray, clusters: IntArray, labels: IntArray | None, class_names: Sequence[str]
) -> Figure:
    """Scatter plot of z in two dimensions by cluster; with labels also by class, chosen by a button.

    Each point carries its index in `customdata`; the page shows the sample beside the pointer.

    Args:
        points: (N, 2).
        clusters: (N,) cluster ids.
        labels: (N,) class ids, −1 for none; None draws clusters only.
        class_names: names of the classes.
    """
    data = _scatter(points, clusters, {int(c): f"cluster {c}" for c in np.unique(clusters)})
    layout: Figure = {
        "height": 560,
        "margin": {"l": 10, "r": 10, "t": 40, "b": 10},
        "hovermode": "closest",
        "xaxis": {"visible": False},
        "yaxis": {"visible": False, "scaleanchor": "x"},
        "legend": {"itemsizing": "constant"},
    }
    if labels is not None:
        names = {int(label): class_names[label] if label >= 0 else "no label" for label in np.unique(labels)}
        by_class = [{**trace, "visible": False} for trace in _scatter(points, labels, names)]
        shown = [[True] * len(data) + [False] * len(by_class), [False] * len(data) + [True] * len(by_class)]
        layout["updatemenus"] = [
            {
                "type": "buttons",
                "direction": "right",
                "x": 0,
                "xanchor": "left",
                "y": 1.02,
                "yanchor": "bottom",
                "buttons": [
                    {"label": title, "method": "restyle", "args": [{"visible": visible}]}
                    for title, visible in zip(("by cluster", "by class"), shown, strict=True)
                ],
            }
        ]
        data += by_class
    return {"data": data, "layout": layout}


def tree_figure(joins: FloatArray, leaves: IntArray) -> Figure:
    """Dendrogram of the merges of clusters.

    Args:
        joins: linkage matrix, see `ClusterHierarchy.linkage`.
        leaves: (K,) cluster ids.
    """
    from scipy.cluster.hierarchy import dendrogram

    drawn = dendrogram(joins, labels=[str(leaf) for leaf in leaves], no_plot=True)
    lines = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": x,
            "y": y,
            "line": {"color": _REST_COLOUR, "width": 1.5},
            "hoverinfo": "y",
        }
        for x, y in zip(drawn["icoord"], drawn["dcoord"], strict=True)
    ]
    # scipy places leaf i at 5 + 10 i.
    places = [5 + 10 * place for place in range(len(leaves))]
    return {
        "data": lines,
        "layout": {
            "height": 300,
            "margin": {"l": 55, "r": 10, "t": 10, "b": 45},
            "showlegend": False,
            "xaxis": {
                "tickvals": places,
                "ticktext": drawn["ivl"],
                "range": [0, 10 * len(leaves)],
                "title": {"text": "cluster"},
                "showgrid": False,
                "zeroline": False,
            },
            "yaxis": {"title": {"text": "distance (Ward)"}, "zeroline": False, "rangemode": "tozero"},
        },
    }


def histogram_figure(histograms: Sequence[Histogram], colour: str) -> Figure:
    """Small histograms side by side: a cluster in its colour, all other samples in grey."""
    data: list[Figure] = []
    layout = _panels([histogram.title for histogram in histograms], height=150)
    for panel, histogram in enumerate(histograms, 1):
        centres = (histogram.edges[1:] + histogram.edges[:-1]) / 2
        for name, shares, fill in (
            ("other samples", histogram.outside, _REST_COLOUR),
            ("this cluster", histogram.inside, colour),
        ):
            data.append(
                {
                    "type": "bar",
                    "name": name,
                    "x": _numbers(centres),
                    "y": _numbers(shares),
                    "width": float(histogram.edges[1] - histogram.edges[0]),
                    "marker": {"color": fill, "opacity": 0.7, "line": {"width": 0}},
                    "showlegend": panel == 1,
                    "legendgroup": name,
                    "hovertemplate": "%{x:.4g}: %{y:.0%}",
                    **_axes_of(panel),
                }
            )
        layout[_layout_keys(panel)[1]] |= {"tickformat": ".0%", "nticks": 4}
    layout |= {"barmode": "overlay", "bargap": 0}
    return {"data": data, "layout": layout}


def curves_figure(
    curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], hover: str, marked: int | None = None
) -> Figure:
    """One panel per curve.

    Args:
        curves: title → x and y.
        hover: text at the pointer, with `%{x}` and `%{y}`.
        marked: a value of x that is drawn as a line, in figures whose points are drawn; None draws neither.
    """
    layout = _panels(list(curves), height=160)
    data = [
        {
            "type": "scatter",
            "mode": "lines" if marked is None else "lines+markers",
            "x": list(x),
            "y": _numbers(np.array(y)),
            "line": {"color": _COLOURS[0], "width": 1.5},
            "marker": {"size": 4},
            "hovertemplate": f"{hover}<extra></extra>",
            **_axes_of(panel),
        }
        for panel, (x, y) in enumerate(curves.values(), 1)
    ]
    if marked is not None:
        layout["shapes"] = [
            {
                "type": "line",
                "x0": marked,
                "x1": marked,
                "y0": 0,
                "y1": 1,
                "xref": axes["xaxis"],
                "yref": f"{axes['yaxis']} domain",
                "line": {"dash": "dot", "width": 1.5, "color": _COLOURS[3]},
            }
            for axes in map(_axes_of, range(1, len(curves) + 1))
        ]
    layout["showlegend"] = False
    return {"data": data, "layout": layout}


def confusion_figure(counts: IntArray, class_names: Sequence[str], clusters: Sequence[int]) -> Figure:
    """Number of samples per class (rows) and cluster (columns), coloured by the share of the class."""
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [plain(name) for name in class_names]
    trace: Figure = {
        "type": "heatmap",
        "x": [str(cluster) for cluster in clusters],
        # Classes may share a shortened name, and Plotly would merge their rows.
        "y": list(range(len(names))),
        "z": shares.round(4).tolist(),
        "customdata": counts.tolist(),
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "rgba(31,119,180,0.03)"], [1, "rgba(31,119,180,1)"]],
        "colorbar": {"title": {"text": "share of class"}, "tickformat": ".0%", "thickness": 12},
        "hovertemplate": "cluster %{x}: %{customdata} samples, %{z:.1%} of the class<extra></extra>",
        "xgap": 1,
        "ygap": 1,
    }
    if counts.size <= _MAX_CELLS_WITH_NUMBERS:
        trace |= {
            "text": [[str(n) if n else "" for n in row] for row in counts.tolist()],
            "texttemplate": "%{text}",
        }
    return {
        "data": [trace],
        "layout": {
            "height": 130 + 26 * max(3, len(names)),
            "margin": {"l": 60, "r": 10, "t": 10, "b": 50},
            "xaxis": {"type": "category", "title": {"text": "cluster"}, "showgrid": False},
            "yaxis": {
                "tickvals": list(range(len(names))),
                "ticktext": names,
                "autorange": "reversed",
                "automargin": True,
                "showgrid": False,
                "zeroline": False,
            },
        },
    }


def _scatter(points: FloatArray, categories: IntArray, names: Mapping[int, str]) -> list[Figure]:
    """One trace per category."""
    traces = []
    for number, (category, name) in enumerate(names.items()):
        rows = np.flatnonzero(categories == category)
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": plain(name),
                "x": _numbers(points[rows, 0]),
                "y": _numbers(points[rows, 1]),
                "customdata": rows.tolist(),
                "marker": {"color": category_colour(number), "size": 6, "opacity": 0.8},
                # The page draws what hovers; "skip" would also suppress the event.
                "hoverinfo": "none",
            }
        )
    return traces


def _panels(titles: Sequence[str], height: int) -> Figure:
    """Layout of panels in rows, see `_layout_keys`; each panel is `height` pixels high."""
    columns = min(_PANELS_PER_ROW, max(1, len(titles)))
    rows = max(1, -(-len(titles) // columns))
    total = rows * (height + 45) + 55
    gap_x, gap_y = 0.06, 55 / (total - 85)
    width, tall = (1 - gap_x * (columns - 1)) / columns, (1 - gap_y * (rows - 1)) / rows
    layout: Figure = {
        "height": total,
        "margin": {"l": 50, "r": 10, "t": 55, "b": 30},
        "annotations": [],
        "legend": {
            "orientation": "h",
            "x": 1,
            "xanchor": "right",
            "y": 1,
            "yref": "container",
            "yanchor": "top",
        },
    }
    for place, title in enumerate(titles):
        row, column = divmod(place, columns)
        left, top = column * (width + gap_x), 1 - row * (tall + gap_y)
        axes = _axes_of(place + 1)
        x_key, y_key = _layout_keys(place + 1)
        layout[x_key] = {
            "domain": [left, left + width],
            "anchor": axes["yaxis"],
            "nticks": 6,
            "zeroline": False,
        }
        layout[y_key] = {
            "domain": [top - tall, top],
            "anchor": axes["xaxis"],
            "nticks": 5,
            "zeroline": False,
        }
        layout["annotations"].append(
            {
                "text": plain(title),
                "x": left,
                "y": top,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 12},
            }
        )
    return layout


def _axes_of(panel: int) -> dict[str, str]:
    """Names of the axes of a panel, from 1."""
    suffix = "" if panel == 1 else str(panel)
    return {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}


def _layout_keys(panel: int) -> tuple[str, str]:
    """Keys of the axes of a panel in a layout, such as `xaxis2` and `yaxis2`."""
    suffix = "" if panel == 1 else str(panel)
    return f"xaxis{suffix}", f"yaxis{suffix}"


def _numbers(values: FloatArray) -> list[float | None]:
    """Values with five digits, which no eye misses; None for what is not finite."""
    return [float(f"{value:.5g}") if np.isfinite(value) else None for value in values.tolist()]
