"""One of several categories."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from cmvae.modalities.base import CategoriesModality

if TYPE_CHECKING:
    from matplotlib.axes import Axes


_MAX_DRAWN = 40
"""Characters of a name in a drawing."""


class CategoricalModality(CategoriesModality):
    """A scalar int64, an index into `categories`; as data (B,) int64."""

    network = "mlp"
    metrics = frozenset({"prediction"})

    kind: Literal["categorical"] = "categorical"
    shape: tuple[()] = ()
    categories: tuple[str, ...] = Field(min_length=2)

    @override
    def draw(self, ax: Axes, stored: np.ndarray) -> None:
        words = _shorten(self.describe(stored))
        ax.text(0.5, 0.5, words, ha="center", va="center", fontsize=6, transform=ax.transAxes)

    @property
    @override
    def drawn_size(self) -> tuple[float, float]:
        """Room for the longest name."""
        return max(0.4, 0.052 * max(len(_shorten(name)) for name in self.categories)), 0.3

    @override
    def describe(self, stored: np.ndarray) -> str:
        return self.categories[int(stored)]


def _shorten(name: str) -> str:
    return name if len(name) <= _MAX_DRAWN else f"{name[: _MAX_DRAWN - 1]}…"
