"""Who reads what, when: pure arithmetic on the sample counts of the index.

A sample is known by its *position*: its place when a split's shards are laid end to end in index order. Both
plans split samples, not shards, between the ranks, so that any number of shards gives every rank equally many
batches; and both are functions of numbers that every process has, so that no process has to ask another.

Imports only numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cmvae.utils.errors import UserError

NUM_LANES = 4
"""Places of a rank's run that are read in turn: up to this many reader processes share no shard's reading.

A constant of the order itself, hence not a setting: the order must not depend on the number of processes.
"""

# First word of each random stream, so that no two uses of one seed share random numbers.
_SHUFFLE_STREAM = 0
_LEFT_OUT_STREAM = 1


@dataclass(frozen=True)
class RankPlan:
    """What one rank reads in one pass."""

    batches: np.ndarray
    """(num_batches, B) int64: positions of the samples of each batch, in the order of the batches."""
    valid: np.ndarray
    """(num_batches, B) bool: False where a sample only fills up a batch and is counted elsewhere."""
    window_of_shard: np.ndarray
    """(num_shards,) int64: shards of the same number are worth loading together."""


@dataclass(frozen=True)
class WorldSizeChange:
    """Where in an epoch the number of ranks changed; the global batch stayed the same."""

    epoch: int
    batch: int
    """Batches of the epoch that were consumed before."""
    world_size: int
    """Number of ranks before."""


class Plan(Protocol):
    """A way to deal the samples of a split to the ranks."""

    batch_size: int
    world_size: int

    @property
    def batches_per_epoch(self) -> int:
        """Batches of each rank in one pass, the same on all ranks."""

    def for_rank(self, epoch: int, rank: int) -> RankPlan:
        """What `rank` reads in pass number `epoch`."""


class TrainingPlan:
    """A new order each epoch, a function of (seed, epoch); equally many full batches on all ranks.

    The shards are permuted; neighbours form windows of at least `shuffle_window` samples; the samples of each
    window are shuffled. Of the N samples, the N mod (W·B) that do not fill a global batch are left out. They
    are taken in turn from one fixed permutation, so that over the epochs every sample is left out equally
    often. Each rank owns one contiguous run of what remains, cut into `NUM_LANES` lanes, a batch of each in
    turn. What ranks of another number have left of an epoch is dealt in the same way.

    Args:
        shard_sizes: samples in each shard of the split.
        batch_size: B, samples of one batch on one rank.
        world_size: W, number of ranks.
        seed: seed of the order.
        shuffle_window: samples that are shuffled together, at least; the memory of a reader process is a
            few times as many undecoded samples.
        world_size_changes: where the number of ranks changed within the run, in order; W·B did not.

    Raises:
        UserError: the split is smaller than one global batch.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        batch_size: int,
        world_size: int = 1,
        seed: int = 0,
        shuffle_window: int = 4096,
        world_size_changes: Sequence[WorldSizeChange] = (),
    ) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.batch_size = batch_size
        self.world_size = world_size
        self.world_size_changes = tuple(world_size_changes)
        self.seed = seed
        self.shuffle_window = shuffle_window
        self.num_samples = int(self.shard_sizes.sum())
        if self.batches_per_epoch == 0:
            largest = self.num_samples // world_size
            raise UserError(
                f"train.batch_size: {batch_size} a rank on {world_size} rank(s) makes a global batch of "
                f"{batch_size * world_size}, but the split has only {self.num_samples} samples. "
                + (f"Set train.batch_size to at most {largest}" if largest else "Start fewer ranks")
            )

    @property
    def batches_per_epoch(self) -> int:
        """Batches of each rank in one epoch."""
        return self.num_samples // (self.world_size * self.batch_size)

    def left_out(self, epoch: int) -> np.ndarray:
        """Positions that no rank reads in this epoch, (N mod W·B,) int64."""
        num_left_out = self.num_samples % (self.world_size * self.batch_size)
        turns = self._random(_LEFT_OUT_STREAM).permutation(self.num_samples)
        return turns[(epoch * num_left_out + np.arange(num_left_out)) % self.num_samples]

    def order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's global order and its windows.

        Returns:
            Positions, (W·B·batches_per_epoch,) int64; and the window of each shard, (num_shards,) int64.
        """
        rng = self._random(_SHUFFLE_STREAM, epoch)
        first_positions = np.cumsum(self.shard_sizes) - self.shard_sizes
        window_of_shard = np.empty(len(self.shard_sizes), dtype=np.int64)
        shuffled = []
        for window, shards in enumerate(self._group(rng.permutation(len(self.shard_sizes)))):
            window_of_shard[shards] = window
            positions = [first_positions[shard] + np.arange(self.shard_sizes[shard]) for shard in shards]
            shuffled.append(rng.permutation(np.concatenate(positions)))
        order = np.concatenate(shuffled)
        return order[np.isin(order, self.left_out(epoch), invert=True)], window_of_shard

    def for_rank(self, epoch: int, rank: int) -> RankPlan:
        """What `rank` reads in `epoch`; batches before a change of the world size are shared evenly."""
        order, window_of_shard = self.order(epoch)
        global_batches = self._deal(epoch, order)
        batches = global_batches.reshape(-1, self.world_size, self.batch_size)[:, rank]
        return RankPlan(batches, np.ones(batches.shape, dtype=bool), window_of_shard)

    def _deal(self, epoch: int, order: np.ndarray) -> np.ndarray:
        """What all ranks read together, batch by batch: (batches_per_epoch, W·B) int64."""
        global_batch = self.world_size * self.batch_size
        consumed = np.empty((0, global_batch), dtype=np.int64)
        for change in self.world_size_changes:
            if change.epoch == epoch:
                dealt = _deal_to_ranks(order, change.world_size, global_batch)
                consumed = np.concatenate([consumed, dealt[: change.batch - len(consumed)]])
                order = order[np.isin(order, consumed, invert=True)]
        return np.concatenate([consumed, _deal_to_ranks(order, self.world_size, global_batch)])

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=stream))

    def _group(self, shards: np.ndarray) -> list[list[int]]:
        """Neighbouring shards in groups of at least `shuffle_window` samples, or all in one."""
        groups: list[list[int]] = [[]]
        size = 0
        for shard in shards.tolist():
            if size >= self.shuffle_window:
                groups.append([])
                size = 0
            groups[-1].append(shard)
            size += int(self.shard_sizes[shard])
        if size < self.shuffle_window and len(groups) > 1:
            last = groups.pop()
            groups[-1].extend(last)
        return groups


def _deal_to_ranks(order: np.ndarray, world_size: int, global_batch: int) -> np.ndarray:
    """A run of `order` for each rank, in lanes: (num_batches, global_batch), the ranks in a row."""
    runs = order.reshape(world_size, -1, global_batch // world_size)
    lanes = np.array_split(np.arange(runs.shape[1]), NUM_LANES)
    # array_split makes the first lanes the longer ones, so turns end with the first lanes.
    turns = [lane[turn] for turn in range(len(lanes[0])) for lane in lanes if turn < len(lane)]
    return runs[:, turns].swapaxes(0, 1).reshape(-1, global_batch)


class EvaluationPlan:
    """Natural order; over all ranks every sample is valid exactly once; all ranks have equally many batches.

    Rank r of W owns one contiguous part; parts differ by at most one sample. A part is filled up with repeats
    of its last sample, marked as not valid.

    Args:
        shard_sizes: samples in each shard of the split.
        batch_size: B, samples of one batch on one rank.
        world_size: W, number of ranks.
        num_samples: read at most this many samples, from the first on.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        batch_size: int,
        world_size: int = 1,
        num_samples: int | None = None,
    ) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.batch_size = batch_size
        self.world_size = world_size
        total = int(self.shard_sizes.sum())
        self.num_samples = total if num_samples is None else min(total, num_samples)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of each rank in one pass."""
        largest_part = -(-self.num_samples // self.world_size)
        return -(-largest_part // self.batch_size)

    def for_rank(self, epoch: int, rank: int) -> RankPlan:
        """What `rank` reads; every pass is the same."""
        part = np.array_split(np.arange(self.num_samples), self.world_size)[rank]
        shape = (self.batches_per_epoch, self.batch_size)
        # With more ranks than samples a part is empty: any sample will do to fill it up.
        filled = np.full(shape, part[-1] if len(part) else 0, dtype=np.int64)
        filled.flat[: len(part)] = part
        valid = np.arange(filled.size).reshape(shape) < len(part)
        return RankPlan(filled, valid, window_of_shard=np.arange(len(self.shard_sizes)))
