"""Vectors of yes and no."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cmvae.modalities.base import ColumnsKind, column_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from cmvae.data.index import ModalitySchema


class Binary(ColumnsKind):
    """(dimensions,) uint8, 0 or 1; as data fp32."""

    name = "binary"
    dtype = "uint8"
    likelihoods = ("bernoulli",)

    def check_values(self, stored: np.ndarray, schema: ModalitySchema) -> None:
        """As `ArrayKind.check_values`."""
        if stored.max() > 1:
            raise ValueError(f"holds {stored.max()}, where there can be 0 and 1 only")

    def to_data(self, stored: Tensor, schema: ModalitySchema) -> Tensor:
        """As `Kind.to_data`."""
        return stored.float()

    def to_stored(self, data: np.ndarray, schema: ModalitySchema) -> np.ndarray:
        """As `Kind.to_stored`: what is more probable than not."""
        return (data > 0.5).astype(np.uint8)

    def draw(self, ax: Axes, stored: np.ndarray, schema: ModalitySchema) -> None:
        """As `Kind.draw`: a strip, dark where there is a one."""
        ax.imshow(stored[None], cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")

    def to_text(self, stored: np.ndarray, schema: ModalitySchema) -> str:
        """As `Kind.to_text`: the columns that are set."""
        columns = column_names(schema)
        return ", ".join(columns[place] for place in np.flatnonzero(stored)) or "none"
