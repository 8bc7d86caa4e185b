"""A whole split in the memory of the training device, as stored, for data sets that fit."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cmvae.data.plan import TrainingPlan
from cmvae.data.split_reader import Batch, SplitReader
from cmvae.utils.errors import UserError

# The rest of the memory is for the model, its optimizer and feature maps.
_MAX_SHARE_OF_FREE_MEMORY = 0.5


class ResidentLoader:
    """The batches of `TrainingLoader`, from a copy of the split on the device of the training.

    The split is read and decoded once. Batches are then selected on the device: nothing is decoded or copied
    from the CPU. Every rank holds the whole split. The stored values of PolyMNIST take 0.7 GB.

    Args:
        shards: the split.
        plan: the order of the samples.
        rank: number of this rank.
        world_size: number of ranks.
        device: where the split is kept.

    Raises:
        UserError: a shard is damaged, or the split takes more than half of the free memory of a GPU.
    """

    def __init__(
        self, shards: SplitReader, plan: TrainingPlan, rank: int, world_size: int, device: torch.device
    ) -> None:
        self._plan, self._rank, self._world_size, self._device = plan, rank, world_size, device
        self.batches_per_epoch = plan.batches_per_epoch
        """Number of batches per epoch on each rank."""
        _check_memory(shards.num_bytes, device)
        self._tensors: dict[str, Tensor] = {}
        self._lists: dict[str, list[str | None]] = {}
        self._problems: dict[int, str] = {}
        self._load(shards)

    def _load(self, shards: SplitReader) -> None:
        """Read the split shard by shard, so that only one is in memory twice."""
        start, size = 0, int(shards.ends[-1])
        for shard in shards.shards:
            samples = [shards.decode(sample) for sample in shards.read_shard(shard)]
            part = shards.collate(samples, np.ones(len(samples), dtype=bool))
            del part["skipped"]
            for name, values in part.items():
                if isinstance(values, Tensor):
                    if name not in self._tensors:
                        whole = torch.empty(size, *values.shape[1:], dtype=values.dtype, device=self._device)
                        self._tensors[name] = whole
                    self._tensors[name][start : start + len(samples)] = values.to(self._device)
                else:
                    self._lists.setdefault(name, []).extend(values)
            self._problems |= {
                start + place: str(sample)
                for place, sample in enumerate(samples)
                if isinstance(sample, UserError)
            }
            start += len(samples)

    def epoch_batches(self, epoch: int, skip_batches: int = 0) -> Iterator[Batch]:
        """Batches of one epoch after the first `skip_batches`; tensors are on the device."""
        batches = self._plan.for_rank(epoch, self._rank, self._world_size).positions()[skip_batches:]
        # Copied once per epoch, so that no step waits for it.
        on_device = torch.from_numpy(np.ascontiguousarray(batches)).to(self._device)
        for rows, positions in zip(on_device, batches.tolist(), strict=True):
            batch: Batch = {name: values[rows] for name, values in self._tensors.items()}
            for name, values in self._lists.items():
                batch[name] = [values[position] for position in positions]
            batch["skipped"] = [
                self._problems[position] for position in positions if position in self._problems
            ]
            batch["position"] = rows
            yield batch


def _check_memory(num_bytes: int, device: torch.device) -> None:
    if device.type != "cuda":
        return
    free, _ = torch.cuda.mem_get_info(device)
    if num_bytes > _MAX_SHARE_OF_FREE_MEMORY * free:
        raise UserError(
            f"data.on_device: the train split takes {num_bytes / 2**30:.1f} GiB, more than half of the "
            f"{free / 2**30:.1f} GiB that are free on {device}. Set data.on_device=false"
        )
