"""Vectors of real numbers, each dimension standardised by the train split's mean and deviation."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from cmvae.modalities.base import ColumnsKind, check_lengths, column_names

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes
    from torch import Tensor

    from cmvae.data.index import ModalitySchema


class Vector(ColumnsKind):
    """(dimensions,) float32 in the units of the data; as data fp32 with mean 0 and deviation 1 on train."""

    name = "vector"
    dtype = "float32"
    likelihoods = ("normal", "laplace")

    def check(self, schema: ModalitySchema) -> None:
        """As `Kind.check`."""
        super().check(schema)
        if schema.mean is None or schema.std is None:
            raise ValueError("mean and std: a vector is standardised, so that it needs both")
        check_lengths(schema, mean=schema.mean, std=schema.std)
        if not np.isfinite([*schema.mean, *schema.std]).all() or min(schema.std) <= 0:
            raise ValueError("mean and std: must be finite numbers, std above 0")

    def check_values(self, stored: np.ndarray, schema: ModalitySchema) -> None:
        """As `ArrayKind.check_values`: numbers must be finite."""
        if not np.isfinite(stored).all():
            raise ValueError("holds values that are not finite")

    def to_data(self, stored: Tensor, schema: ModalitySchema) -> Tensor:
        """As `Kind.to_data`."""
        mean, std = _statistics(schema, stored.device)
        return (stored - mean) / std

    def to_stored(self, data: np.ndarray, schema: ModalitySchema) -> np.ndarray:
        """As `Kind.to_stored`."""
        return (data * np.array(schema.std) + np.array(schema.mean)).astype(np.float32)

    def draw(self, ax: Axes, stored: np.ndarray, schema: ModalitySchema) -> None:
        """As `Kind.draw`: bars in standard deviations from the mean of the train split."""
        standardised = (stored - np.array(schema.mean)) / np.array(schema.std)
        ax.bar(np.arange(len(stored)), standardised, color="#22333b")
        ax.set_ylim(-3, 3)
        ax.axhline(0, color="#8d99ae", linewidth=0.4)

    def to_text(self, stored: np.ndarray, schema: ModalitySchema) -> str:
        """As `Kind.to_text`."""
        named = zip(column_names(schema), stored, strict=True)
        return ", ".join(f"{column}: {value:.4g}" for column, value in named)


@lru_cache(maxsize=256)
def _statistics(schema: ModalitySchema, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation (dimensions,), copied once to a device: a GPU waits for what comes from Python."""
    import torch

    mean = torch.tensor(schema.mean, dtype=torch.float32, device=device)
    return mean, torch.tensor(schema.std, dtype=torch.float32, device=device)
