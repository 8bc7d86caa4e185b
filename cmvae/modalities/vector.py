"""Vectors of real numbers, each dimension standardised by the mean and deviation of the train split."""

from __future__ import annotations

import math
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
    """(dimensions,) in the units of the data; as data fp32 with mean 0 and deviation 1 on train.

    Stored as float64 where float32 would lose the differences, such as those of seconds since 1970.
    """

    likelihoods = ("normal", "laplace")

    kind: Literal["vector"] = "vector"
    dtype: Literal["float32", "float64"] = "float32"
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
        mean, std = _statistics(self, stored.device, stored.dtype)
        return ((stored - mean) / std).float()

    @override
    def to_stored(self, data: Tensor | np.ndarray) -> np.ndarray:
        return (as_array(data) * np.array(self.std) + np.array(self.mean)).astype(self.dtype)

    @override
    def draw(self, ax: Axes, stored: np.ndarray) -> None:
        """Draw bars, in standard deviations from the mean of the train split."""
        standardised = (stored - np.array(self.mean)) / np.array(self.std)
        ax.bar(np.arange(len(stored)), standardised, color="#22333b")
        ax.set_ylim(-3, 3)
        ax.axhline(0, color="#8d99ae", linewidth=0.4)

    @override
    def describe(self, stored: np.ndarray) -> str:
        named = zip(self.column_names, stored, self.mean, self.std, strict=True)
        return ", ".join(
            f"{column}: {value:.{_num_digits(mean, std)}g}" for column, value, mean, std in named
        )


def _num_digits(mean: float, std: float) -> int:
    """Number of significant digits that shows a hundredth of a deviation, at least 4."""
    return max(4, 3 + math.ceil(math.log10(max(1.0, abs(mean) / std))))


@lru_cache(maxsize=256)
def _statistics(modality: VectorModality, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and deviation (dimensions,), copied to a device once: a copy from Python makes a GPU wait."""
    import torch

    mean = torch.tensor(modality.mean, dtype=dtype, device=device)
    return mean, torch.tensor(modality.std, dtype=dtype, device=device)
