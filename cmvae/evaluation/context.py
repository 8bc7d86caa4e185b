"""Context of an evaluation on each rank: the model, the data, and noise that belongs to the sample.

Metrics must not depend on the number of ranks or the batch size. So every rank encodes its part of a split,
the parts are concatenated in the order of the split, and the noise of a sample is a function of (seed,
stream, position).
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
    """Folder or URL of the packed data."""
    index: ShardIndex
    """Index of `shards`."""
    settings: EvaluationConfig
    """Settings of the evaluation."""
    accelerator: Accelerator
    """The process group and the device."""
    dcmvae: DCMVAE | None = None
    """The model with its refiner, on the same device; None without a refiner."""

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.accelerator.device

    def measured_by(self, metrics: MetricName) -> tuple[str, ...]:
        """Modalities that a group of metrics applies to."""
        return tuple(name for name, modality in self.model.modalities.items() if metrics in modality.metrics)

    def batches(self, split: str, num_samples: int | None = None) -> Iterator[dict[str, Any]]:
        """Batches of a split on this rank and device, with modalities as data (B, *shape).

        Args:
            split: name of the split.
            num_samples: use only the first samples, which packing has shuffled; None uses all.
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
        """Batches of `position` and `valid` on this rank, for samples that are generated instead of read.

        They are padded as `EvaluationPlan` pads a split, as `collect` requires.
        """
        world_size, rank = self.accelerator.num_processes, self.accelerator.process_index
        plan = EvaluationPlan([num_samples], self.settings.batch_size, rank, world_size)
        for positions, valid in map(plan.batch, range(plan.num_batches)):
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
        """Apply `compute` to batches on all ranks, and concatenate the results in the order of the split.

        All ranks must call it.

        Args:
            batches: batches of `batches` or `positions`.
            compute: batch → name → tensor (B, ...).

        Returns:
            Name → (N, ...), every sample exactly once, without padding; the same on every rank.
        """
        parts: dict[str, list[Tensor]] = {}
        for batch in batches:
            for name, value in {**compute(batch), "valid": batch["valid"]}.items():
                parts.setdefault(name, []).append(value.detach().cpu())
        # Every rank has a contiguous part, so the order of ranks is that of the split.
        gathered = {name: self._gather(torch.cat(values)) for name, values in parts.items()}
        valid = gathered.pop("valid")
        return {name: values[valid].numpy() for name, values in gathered.items()}

    def draw_noise(self, stream: str, positions: Tensor, shape: Sequence[int]) -> Tensor:
        """Draw standard noise of the model's family, (B, *shape), a function of (seed, stream, position).

        Args:
            stream: name of the use; different uses are independent.
            positions: (B,) int64.
            shape: shape of the noise of one sample.
        """
        rows = [
            self.model.family.draw_noise(shape, torch.device("cpu"), generator)
            for generator in self._generators(stream, positions)
        ]
        return torch.stack(rows).to(self.device)

    def draw_uniform(self, stream: str, positions: Tensor) -> Tensor:
        """Draw uniform numbers in [0, 1), (B,) float64 on the CPU, a function of (seed, stream, position).

        Args:
            stream: name of the use; different uses are independent.
            positions: (B,) int64.
        """
        rows = [
            torch.rand((), dtype=torch.float64, generator=generator)
            for generator in self._generators(stream, positions)
        ]
        return torch.stack(rows)

    def draw_seeds(self, stream: str, positions: Tensor) -> list[int]:
        """Draw one seed of 63 bits per sample, a function of (seed, stream, position).

        Args:
            stream: name of the use; different uses are independent.
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
