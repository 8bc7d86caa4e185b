"""Vectors of real numbers, each dimension standardised by the mean and deviation of the train split."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, model_validator
from typing_extensions import Self, override

from cmvae.modalities.base import ColumnsModality, Modality, ModalityName, as_array

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from torch import Tensor


_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]*"
NETWORK_PATTERN = rf"^((timm|torchvision):{_NAME}|sentence-transformers:({_NAME}/)?{_NAME})$"
"""Library and name of a pretrained network; names that are paths or hubs are none."""


class Embedding(BaseModel):
    """The pretrained network that computed a vector from another modality."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    of: ModalityName
    """The other modality."""
    kind: Literal["image", "text"]
    """Kind of the other modality."""
    network: str = Field(pattern=NETWORK_PATTERN)
    """Library and name of the network, such as `timm:vit_small_patch14_dinov2`."""
    weights: str | None
    """Local path of the weights; None for those that the library downloads."""
    version: str
    """Version of the library."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Hash of the weights."""


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
    embedding: Embedding | None = None
    """How the numbers were computed from another modality; None if they are data."""

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


def embedding_of(modality: Modality) -> Embedding | None:
    """How the numbers of a modality were computed from another one; None if it is data."""
    return modality.embedding if isinstance(modality, VectorModality) else None


def _num_digits(mean: float, std: float) -> int:
    """Number of significant digits that shows a hundredth of a deviation, at least 4."""
    return max(4, 3 + math.ceil(math.log10(max(1.0, abs(mean) / std))))


@lru_cache(maxsize=256)
def _statistics(modality: VectorModality, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and deviation (dimensions,), copied to a device once: a copy from Python makes a GPU wait."""
    import torch

    mean = torch.tensor(modality.mean, dtype=dtype, device=device)
    return mean, torch.tensor(modality.std, dtype=dtype, device=device)
