"""What training knows of a model: a task maps a batch to a loss and a report, and knows how to export."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from cmvae.data.index import SplitName
from cmvae.modalities import Modality

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Preview:
    """What people look at while a model trains."""

    figures: dict[str, Figure]
    """By name."""
    texts: dict[str, str] = field(default_factory=dict)
    """By name."""


class Task(nn.Module, ABC):
    """Something to train, as one module so that data parallelism and ZeRO wrap all of it."""

    name: ClassVar[str]
    """What is trained, for people."""
    progress_metric: str
    """The one number of the report that a progress bar has room for."""

    channels_last: ClassVar[bool]
    """Whether its convolutions are faster with weights in this layout."""

    @property
    @abstractmethod
    def modalities(self) -> Mapping[str, Modality]:
        """The modalities that it reads, in the order of every M axis."""

    @property
    def modality_names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self.modalities)

    @property
    @abstractmethod
    def networks(self) -> tuple[nn.Module, ...]:
        """What takes nearly all of the time of a step."""

    @property
    @abstractmethod
    def autocast_dtype(self) -> torch.dtype | None:
        """Precision of the networks, which may be set; None is fp32."""

    @autocast_dtype.setter
    @abstractmethod
    def autocast_dtype(self, dtype: torch.dtype | None) -> None: ...

    def compile_networks(self, backend: str = "inductor") -> None:
        """Let torch compile the networks when they are first called; their weights keep their names.

        Args:
            backend: of `torch.compile`.
        """
        for network in self.networks:
            network.compile(backend=backend)

    @property
    def frozen_hashes(self) -> dict[str, str]:
        """Hashes of what is not trained but must be the same when a training goes on, by name."""
        return {}

    @abstractmethod
    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, a mean over valid samples, and a report of terms, (B, ...) each.

        Args:
            batch: by modality data (B, *shape), see `cmvae.modalities`; `mask` (B, M), false where a sample
                lacks a modality; `valid` (B,), false where a sample only pads the batch; and what all noise
                is a function of, see `cmvae.utils.seeds.sample_generators`: `_seed`, an int that is the same
                on all ranks, and `_place`, B ints, the places of the samples in the batch of all ranks.
        """

    def begin(self, total_steps: int) -> None:
        """Called once before the first update, when it is known how many there are."""

    def reinitialize(
        self, step: int, train_batches: Callable[[int], Iterable[Mapping[str, Any]]]
    ) -> Mapping[nn.Parameter, Tensor]:
        """Parameters that start anew before the update that follows `step` updates, and their new values.

        Called on all ranks before every update; the first rank's values count. By default none start anew.

        Args:
            step: number of updates so far.
            train_batches: reads the first so many samples of the train split, the same on every rank.
        """
        return {}

    @abstractmethod
    def validation_metrics(self, records: Mapping[str, np.ndarray]) -> dict[str, float]:
        """What the report over a split, (N, ...) each and `label` (N,), comes to."""

    @abstractmethod
    def show(self, batch: Mapping[str, Any], num_samples: int, generator: torch.Generator) -> Preview:
        """What the model makes of the first samples of a batch; to be called on every rank."""

    @abstractmethod
    def export(
        self,
        folder: Path,
        state: Mapping[str, Tensor],
        batches: Callable[[SplitName, int | None], Iterable[Mapping[str, Any]]],
    ) -> None:
        """Write an export, on one rank.

        Args:
            folder: where to.
            state: the whole state of this task, gathered if it was spread over ranks.
            batches: reads the first so many samples of a split, or all of it.
        """
