"""What every metric works with, on each rank: the model, the data, and noise that belongs to the sample.

A figure must not depend on how many ranks or how large batches it was computed with. So every rank encodes
its part of a split, all parts are put together in the split's own order, and the noise of a sample is a
function of (seed, stream, position) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from cmvae.config import EvaluationConfig
from cmvae.data.batch import to_device
from cmvae.data.index import ShardIndex
from cmvae.data.plan import EvaluationPlan
from cmvae.data.reader import EvaluationLoader
from cmvae.data.remote import Location
from cmvae.modalities.base import MetricName
from cmvae.models.cmvae import CMVAE
from cmvae.utils.seeds import derive_seed

if TYPE_CHECKING:  # diffusers takes seconds to import
    from cmvae.models.dcmvae import DCMVAE


@dataclass(frozen=True)
class EvaluationContext:
    """One evaluation on one rank."""

    model: CMVAE
    """The export, in evaluation mode, on `accelerator.device`."""
    shards: Location
    index: ShardIndex
    settings: EvaluationConfig
    accelerator: Accelerator
    dcmvae: DCMVAE | None = None
    """The model with its refiner, if there is one; on the same device."""

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.accelerator.device

    def measured_by(self, metrics: MetricName) -> tuple[str, ...]:
        """The modalities whose kind a group of metrics is for."""
        return tuple(name for name, modality in self.model.modalities.items() if metrics in modality.metrics)

    def batches(self, split: str, num_samples: int | None = None) -> Iterator[dict[str, Any]]:
        """This rank's batches of a split on the device, modalities as data (B, *shape).

        Args:
            split: which split.
            num_samples: only the first so many samples, which were shuffled when they were packed; None is
                all.
        """
        loader = EvaluationLoader(
            self.shards,
            split=split,
            modalities=self.model.modality_names,
            batch_size=self.settings.batch_size,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            num_samples=num_samples,
        )
        for batch in loader:
            yield to_device(batch, self.model.modalities, self.device)

    def positions(self, num_samples: int) -> Iterator[dict[str, Tensor]]:
        """This rank's batches of `position` and `valid` when there is nothing to read: generations.

        Padded as `EvaluationPlan` pads a split, so that `collect` takes them alike.
        """
        world_size, rank = self.accelerator.num_processes, self.accelerator.process_index
        plan = EvaluationPlan([num_samples], self.settings.batch_size, world_size).for_rank(0, rank)
        for positions, valid in zip(plan.batches, plan.valid, strict=True):
            yield {
                "position": torch.from_numpy(positions).to(self.device),
                "valid": torch.from_numpy(valid).to(self.device),
            }

    @torch.no_grad()
    def collect(
        self,
        batches: Iterator[Mapping[str, Any]],
        compute: Callable[[Mapping[str, Any]], Mapping[str, Tensor]],
    ) -> dict[str, np.ndarray]:
        """`compute` over batches on all ranks, put together in the split's order; on all ranks.

        Args:
            batches: from `batches` or `positions`.
            compute: a batch to tensors (B, ...), by name.

        Returns:
            By name (N, ...), every sample exactly once, without padding; the same on every rank.
        """
        parts: dict[str, list[Tensor]] = {}
        for batch in batches:
            for name, value in {**compute(batch), "valid": batch["valid"]}.items():
                parts.setdefault(name, []).append(value.detach().cpu())
        # One contiguous part a rank: rank by rank is the split's own order.
        gathered = {name: self._gather(torch.cat(values)) for name, values in parts.items()}
        valid = gathered.pop("valid")
        return {name: values[valid].numpy() for name, values in gathered.items()}

    def draw_noise(self, stream: str, positions: Tensor, shape: Sequence[int]) -> Tensor:
        """Standard noise of the model's family, (B, *shape): a function of (seed, stream, position).

        Args:
            stream: what the noise is for, so that two uses are independent.
            positions: (B,) int64.
            shape: of one sample's noise.
        """
        rows = [
            self.model.family.draw_noise(shape, torch.device("cpu"), generator)
            for generator in self._generators(stream, positions)
        ]
        return torch.stack(rows).to(self.device)

    def draw_uniform(self, stream: str, positions: Tensor) -> Tensor:
        """Uniform on [0, 1), (B,) float64 on the CPU: a function of (seed, stream, position), for choices.

        Args:
            stream: what the choice is, so that two uses are independent.
            positions: (B,) int64.
        """
        rows = [
            torch.rand((), dtype=torch.float64, generator=generator)
            for generator in self._generators(stream, positions)
        ]
        return torch.stack(rows)

    def draw_seeds(self, stream: str, positions: Tensor) -> list[int]:
        """One random number of 63 bits a sample: a function of (seed, stream, position).

        Args:
            stream: what it is for, so that two uses are independent.
            positions: (B,) int64.
        """
        return [derive_seed(self.settings.seed, stream, position) for position in positions.tolist()]

    def _generators(self, stream: str, positions: Tensor) -> Iterator[torch.Generator]:
        for seed in self.draw_seeds(stream, positions):
            yield torch.Generator().manual_seed(seed)

    def _gather(self, values: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return values
        return self.accelerator.gather(values.to(self.device)).cpu()
