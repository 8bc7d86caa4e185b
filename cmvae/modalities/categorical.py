"""One of several categories."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cmvae.modalities.base import ArrayKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from cmvae.data.index import ModalitySchema


class Categorical(ArrayKind):
    """A scalar int64, the place in `categories`."""

    name = "categorical"
    dtype = "int64"
    likelihoods = ("categorical",)
    network = "mlp"
    metrics = frozenset({"prediction"})
    in_words = True

    def check(self, schema: ModalitySchema) -> None:
        """As `Kind.check`."""
        if schema.shape != ():
            raise ValueError(f"shape {schema.shape}: one category is a scalar, ()")
        if schema.categories is None or len(schema.categories) < 2:
            raise ValueError("categories: at least two names are needed")

    def to_data(self, stored: Tensor, schema: ModalitySchema) -> Tensor:
        """As `Kind.to_data`: (B,) int64."""
        return stored

    def to_stored(self, data: np.ndarray, schema: ModalitySchema) -> np.ndarray:
        """As `Kind.to_stored`."""
        return data.astype(np.int64)

    def draw(self, ax: Axes, stored: np.ndarray, schema: ModalitySchema) -> None:
        """As `Kind.draw`."""
        words = self.to_text(stored, schema)
        ax.text(0.5, 0.5, words, ha="center", va="center", fontsize=6, transform=ax.transAxes)

    def drawn_size(self, schema: ModalitySchema) -> tuple[float, float]:
        """As `Kind.drawn_size`: room for the longest name."""
        return max(0.4, 0.052 * max(map(len, schema.categories or ()))), 0.3

    def to_text(self, stored: np.ndarray, schema: ModalitySchema) -> str:
        """As `Kind.to_text`."""
        return (schema.categories or ())[int(stored)]

    def table_columns(self, schema: ModalitySchema) -> tuple[str, ...]:
        """As `Kind.table_columns`: the name."""
        return (self.name,)

    def parameter_shape(self, schema: ModalitySchema) -> tuple[int, ...]:
        """As `Kind.parameter_shape`: a logit a category."""
        return (len(schema.categories or ()),)
