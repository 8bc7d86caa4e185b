"""Vectors of yes and no."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from typing_extensions import override

from cmvae.modalities.base import ColumnsModality, as_array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor


class BinaryModality(ColumnsModality):
    """(dimensions,) uint8, 0 or 1; as data fp32."""

    likelihoods = ("bernoulli",)

    kind: Literal["binary"] = "binary"
    dtype: Literal["uint8"] = "uint8"

    @override
    def check_values(self, stored: np.ndarray) -> None:
        if stored.max() > 1:
            raise ValueError(f"holds {stored.max()}, where there can be 0 and 1 only")

    @override
    def to_data(self, stored: Tensor) -> Tensor:
        return stored.float()

    @override
    def to_stored(self, data: Tensor | np.ndarray) -> np.ndarray:
        """1 where the probability is above 0.5."""
        return (as_array(data) > 0.5).astype(np.uint8)

    @override
    def draw(self, ax: Axes, stored: np.ndarray) -> None:
        """Draw a strip that is dark where there is a one."""
        ax.imshow(stored[None], cmap="Greys", vmin=0, vmax=1, aspect="auto", interpolation="nearest")

    @override
    def describe(self, stored: np.ndarray) -> str:
        """Names of the columns that are set."""
        columns = self.column_names
        return ", ".join(columns[place] for place in np.flatnonzero(stored)) or "none"
