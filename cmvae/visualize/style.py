"""The look that all figures share."""

from __future__ import annotations

import logging
import warnings
from functools import cache
from typing import Any

import matplotlib as mpl
from matplotlib import figure, font_manager
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.text import Text

DPI = 120
ACCENT = "#d1495b"
INK = "#22333b"
MUTED = "#8d99ae"
GRID = "#e9ecef"

_MAX_PIXELS = 16_384
"""Larger figures have fewer dots per inch: matplotlib draws at most 65,536, and memory is limited."""
_FALLBACK_FONTS = (
    "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Zen Hei",
    "PingFang SC", "Hiragino Sans", "Microsoft YaHei", "SimHei", "Malgun Gothic", "Noto Sans Thai",
    "Noto Sans Devanagari", "Noto Sans Arabic", "Noto Sans Hebrew", "Nirmala UI", "Leelawadee UI",
    "Arial Unicode MS", "Noto Emoji", "Segoe UI Emoji", "Symbola",
)  # fmt: skip
"""Fonts of scripts that matplotlib's own font lacks; those that are installed are used."""
_LOGGER = logging.getLogger(__name__)


class Figure(figure.Figure):
    """A figure in which a text is what it says: names in the data may contain `$`, or be in any script.

    Args:
        figsize: width and height in inches.
        settings: see `matplotlib.figure.Figure`.
    """

    def __init__(self, figsize: tuple[float, float], **settings: Any) -> None:
        super().__init__(figsize=figsize, dpi=min(DPI, _MAX_PIXELS / max(figsize)), **settings)

    def draw(self, renderer: RendererBase) -> None:
        """See `matplotlib.figure.Figure.draw`."""
        fonts = [*mpl.rcParams["font.family"], *_installed_fallbacks()]
        for text in self.findobj(Text):
            text.set(parse_math=False, usetex=False, fontfamily=fonts)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            super().draw(renderer)
        for warning in caught:
            if "missing from font" in str(warning.message):
                _report_missing_glyphs()
            else:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@cache
def _installed_fallbacks() -> tuple[str, ...]:
    installed = set(font_manager.get_font_names())
    return tuple(name for name in _FALLBACK_FONTS if name in installed)


@cache
def _report_missing_glyphs() -> None:
    """Warn once: every box in every figure would be reported otherwise."""
    _LOGGER.warning(
        "no installed font has all characters of the names and texts in the figures; these are drawn as "
        "boxes. Install one, such as Noto Sans CJK"
    )


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
