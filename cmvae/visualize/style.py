"""The look that all figures share."""

from __future__ import annotations

from matplotlib.axes import Axes

DPI = 120
ACCENT = "#d1495b"
INK = "#22333b"
MUTED = "#8d99ae"
GRID = "#e9ecef"


def clear_axes(ax: Axes) -> None:
    """Remove ticks and frame."""
    ax.set_xticks([])
    ax.set_yticks([])
    ax.spines[:].set_visible(False)


def lighten(ax: Axes) -> None:
    """Leave two thin axes, small labels and a pale grid."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(MUTED)
    ax.tick_params(labelsize=8, colors=INK)
    ax.grid(color=GRID, linewidth=0.7)
    ax.set_axisbelow(True)
