"""The interface between the loop and a model: a task maps a batch to a loss and a report, and exports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cmvae.data.index import SplitName
from cmvae.modalities import Modality

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Preview:
    """Figures and texts of a validation, which are drawn and written when they are called."""

    figures: dict[str, Callable[[], Figure]]
    """By name."""
    texts: dict[str, Callable[[], str | None]] = field(default_factory=dict)
    """By name; None where no modality has words."""


Measure = Callable[["Task", Accelerator], Mapping[str, float]]
"""Further validation metrics of a task in evaluation mode, the same on every rank; called on all ranks."""


class Task(nn.Module, ABC):
    """What is trained: one module, so that data parallelism and ZeRO wrap all of it."""

    name: ClassVar[str]
    """Name of the task in the tracker."""
    progress_metric: str
    """Name of the report's term that the progress bar shows."""

    channels_last: ClassVar[bool]
    """Whether the convolutions are faster with channels-last weights."""

    @property
    @abstractmethod
    def modalities(self) -> Mapping[str, Modality]:
        """The modalities that the task reads, in the order of every M axis."""

    @property
    def modality_names(self) -> tuple[str, ...]:
        """Names of the modalities."""
        return tuple(self.modalities)

    @property
    @abstractmethod
    def networks(self) -> tuple[nn.Module, ...]:
        """The networks, which take nearly all of the time of a step."""

    @property
    @abstractmethod
    def autocast_dtype(self) -> torch.dtype | None:
        """Precision of the networks, which can be set; None is fp32."""

    @autocast_dtype.setter
    @abstractmethod
    def autocast_dtype(self, dtype: torch.dtype | None) -> None: ...

    def compile_networks(self, backend: str = "inductor", mode: str | None = None) -> None:
        """Let torch compile the networks at their first call; the weights keep their names.

        Args:
            backend: of `torch.compile`.
            mode: of `torch.compile`.
        """
        for network in self.networks:
            network.compile(backend=backend, mode=mode)

    @property
    def frozen_hashes(self) -> dict[str, str]:
        """Hashes of weights that are used but not trained, by name; a run resumes only with the same ones."""
        return {}

    @abstractmethod
    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch, a mean over valid samples, and a report of terms, (B, ...) each.

        Args:
            batch: by modality data (B, *shape), see `cmvae.modalities`; `mask` (B, M), false where a sample
                lacks a modality; `valid` (B,), false where a sample only pads the batch; `_seed`, an int that
                is the same on all ranks; and `_place`, B ints, the places of the samples in the global batch.
                All noise is a function of the last two, see `cmvae.utils.seeds.sample_generators`.
        """

    def begin(self, total_steps: int) -> None:
        """Prepare for a training of `total_steps` updates; called once before the first."""

    def reinitialize(
        self, step: int, train_batches: Callable[[int], Iterable[Mapping[str, Any]]]
    ) -> Mapping[nn.Parameter, Tensor]:
        """New values of parameters that are reinitialized before an update; by default none are.

        Called on all ranks before every update; the values of rank 0 are used.

        Args:
            step: number of updates so far.
            train_batches: reads the first N samples of the train split, the same on every rank.
        """
        return {}

    @abstractmethod
    def validation_metrics(self, records: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Metrics of a split, from its report, (N, ...) each, and `label` (N,)."""

    @abstractmethod
    def show(self, batch: Mapping[str, Any], num_samples: int, generator: torch.Generator) -> Preview:
        """Generate from the first samples of a batch; must be called on all ranks."""

    @abstractmethod
    def export(
        self,
        folder: Path,
        state: Mapping[str, Tensor],
        batches: Callable[[SplitName, int | None], Iterable[Mapping[str, Any]]],
    ) -> None:
        """Write an export; called on rank 0 alone.

        Args:
            folder: where the export is written.
            state: the whole state of this task, gathered if it was sharded over ranks.
            batches: reads the first N samples of a split, or with None all of it.
        """
