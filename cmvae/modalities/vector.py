"""Vectors of real numbers, each dimension standardised by the mean and deviation of the train split."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, FiniteFloat, model_validator
from typing_extensions import Self, override

from cmvae.modalities.base import ColumnsModality, as_array

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from torch import Tensor


class VectorModality(ColumnsModality):
    """(dimensions,) float32 in the units of the data; as data fp32 with mean 0 and deviation 1 on train."""

    likelihoods = ("normal", "laplace")

    kind: Literal["vector"] = "vector"
    dtype: Literal["float32"] = "float32"
    mean: tuple[FiniteFloat, ...]
    """(dimensions,) means of the train split."""
    std: tuple[Annotated[FiniteFloat, Field(gt=0)], ...]
    """(dimensions,) standard deviations of the train split."""

    @model_validator(mode="after")
    def _check_statistics(self) -> Self:
        self.check_lengths("mean", "std")
        return self

    @override
    def check_values(self, stored: np.ndarray) -> None:
        if not np.isfinite(stored).all():
            raise ValueError("holds values that are not finite")

    @override
    def to_data(self, stored: Tensor) -> Tensor:
        mean, std = _statistics(self, stored.device)
        return (stored - mean) / std

    @override
    def to_stored(self, data: Tensor | np.ndarray) -> np.ndarray:
        return (as_array(data) * np.array(self.std) + np.array(self.mean)).astype(np.float32)

    @override
    def draw(self, ax: Axes, stored: np.ndarray) -> None:
        """Draw bars, in standard deviations from the mean of the train split."""
        standardised = (stored - np.array(self.mean)) / np.array(self.std)
        ax.bar(np.arange(len(stored)), standardised, color="#22333b")
        ax.set_ylim(-3, 3)
        ax.axhline(0, color="#8d99ae", linewidth=0.4)

    @override
    def describe(self, stored: np.ndarray) -> str:
        named = zip(self.column_names, stored, strict=True)
        return ", ".join(f"{column}: {value:.4g}" for column, value in named)


@lru_cache(maxsize=256)
def _statistics(modality: VectorModality, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation (dimensions,), copied to a device once: a copy from Python makes a GPU wait."""
    import torch

    mean = torch.tensor(modality.mean, dtype=torch.float32, device=device)
    return mean, torch.tensor(modality.std, dtype=torch.float32, device=device)
