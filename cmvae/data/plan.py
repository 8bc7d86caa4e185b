"""Which samples form the batches of an epoch, and in which order, computed from the sizes of the shards.

The *position* of a sample is its place in the concatenation of the split's shards in index order. A *slot* is
a place in the order in which an epoch reads the samples. Nothing is as long as the split: a rank computes the
slots of a batch, and the positions of one window of shards at a time, from numbers that every process has.

This module imports only numpy.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from cmvae.utils.errors import UserError

NUM_TURNS = 4
"""Parts of a lane that are read in turn, one per batch: up to this number of reader processes of a rank, no
two processes have to read the same shard.

This is not a setting, because the order must not depend on the number of processes.
"""
PLACES_PER_LANE = 64
"""Places of the global batch that are filled from one lane: with at least so many samples per rank, no two
ranks have to read the same shard.

This is not a setting either, because the order must not depend on the number of ranks.
"""

# First part of the key of each random stream, so that uses of one seed do not share random numbers.
_SHARD_STREAM = 0
_LEFT_OUT_STREAM = 1
_WINDOW_STREAM = 2


class RankPlan(Protocol):
    """What one rank reads in one epoch."""

    num_batches: int

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots of a batch, (B,) int64, and (B,) bool, False for a sample that only fills up the batch."""

    def window(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots and positions of the samples that are loaded together with `slot`, (n,) int64 each."""

    def is_read(self, slots: np.ndarray, batches: range) -> np.ndarray:
        """Whether any of `batches` of this rank reads each slot, (n,) bool."""


class TrainingPlan:
    """A new order in each epoch, a function of (seed, epoch) and the size of the global batch.

    The shards are permuted; consecutive shards form windows; the samples of each window are shuffled. The
    N mod G samples that do not fill a global batch are left out, in turn, so that over the epochs every
    sample is left out equally often. The remaining order is cut into lanes, each of which fills the same
    places of every global batch, and each lane into `NUM_TURNS` parts, from which batches are taken in turn.
    A rank reads some of the places. So neither the samples of a step nor their places depend on the number
    of ranks.

    Args:
        shard_sizes: number of samples of each shard of the split.
        global_batch: G, number of samples per batch of all ranks together.
        seed: seed of the order.
        shuffle_window: minimum number of samples in the windows that a global batch is drawn from.

    Raises:
        UserError: the split is smaller than one global batch.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | np.ndarray,
        global_batch: int,
        seed: int = 0,
        shuffle_window: int = 4096,
    ) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.global_batch = global_batch
        self.seed = seed
        self.num_samples = int(self.shard_sizes.sum())
        self.batches_per_epoch = self.num_samples // global_batch
        """Number of batches per epoch, the same on all ranks."""
        if self.batches_per_epoch == 0:
            raise UserError(
                f"train.batch_size: the ranks together read {global_batch} samples per batch, but the split "
                f"has only {self.num_samples}. Set train.batch_size (per rank) or train.global_batch_size "
                f"so that they read at most {self.num_samples}, or start fewer ranks"
            )
        most_lanes = max(1, global_batch // PLACES_PER_LANE)
        self.num_lanes = next(n for n in range(most_lanes, 0, -1) if global_batch % n == 0)
        # Every lane has a window of its own.
        self.window_size = -(-shuffle_window // self.num_lanes)

    def left_out(self, epoch: int) -> np.ndarray:
        """Positions of the samples that no rank reads in this epoch, (N mod G,) int64."""
        size = self.num_samples
        num_left_out = size % self.global_batch
        rng = self.random(_LEFT_OUT_STREAM)
        first = stride = int(rng.integers(size))
        # With a stride that shares no divisor with N, the turns visit every sample before any twice.
        while math.gcd(stride, size) != 1:
            stride = int(rng.integers(size))
        turns = range(epoch * num_left_out, (epoch + 1) * num_left_out)
        return np.array([(first + stride * turn) % size for turn in turns], dtype=np.int64)

    def for_rank(self, epoch: int, rank: int = 0, world_size: int = 1) -> TrainingRankPlan:
        """What `rank` reads in `epoch`; the global batch is a multiple of `world_size`."""
        per_rank = self.global_batch // world_size
        return TrainingRankPlan(self, epoch, range(rank * per_rank, (rank + 1) * per_rank))

    def random(self, *stream: int) -> np.random.Generator:
        """Random numbers that are a function of the seed and `stream`."""
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=stream))


class TrainingRankPlan:
    """The places of every global batch of an epoch that one rank reads; see `RankPlan`.

    Args:
        plan: the plan.
        epoch: number of the epoch.
        places: places of the global batch.
    """

    def __init__(self, plan: TrainingPlan, epoch: int, places: range) -> None:
        self._plan, self._epoch, self._places = plan, epoch, places
        self.num_batches = plan.batches_per_epoch
        self._depth = plan.global_batch // plan.num_lanes
        turns = np.arange(NUM_TURNS)
        # The first turns are one batch longer where the number of batches is not a multiple.
        self._first_rows = turns * (self.num_batches // NUM_TURNS) + np.minimum(
            turns, self.num_batches % NUM_TURNS
        )

        self._shards = plan.random(_SHARD_STREAM, epoch).permutation(len(plan.shard_sizes))
        self._shard_starts = np.cumsum(plan.shard_sizes) - plan.shard_sizes
        sizes = plan.shard_sizes[self._shards]
        ends = np.cumsum(sizes)
        self._bounds = _window_bounds(ends - sizes, ends, plan.window_size)
        self._left_out = np.sort(plan.left_out(epoch))
        # The slots of a window follow those of the window before.
        self._ends = ends[self._bounds[1:] - 1]
        if len(self._left_out):
            place_of_shard = np.empty_like(self._shards)
            place_of_shard[self._shards] = np.arange(len(sizes))
            shards = np.searchsorted(self._shard_starts, self._left_out, side="right") - 1
            windows = np.searchsorted(self._bounds, place_of_shard[shards], side="right") - 1
            self._ends -= np.cumsum(np.bincount(windows, minlength=len(self._ends)))

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots of a batch, (B,) int64, all valid."""
        turn, row_of_turn = number % NUM_TURNS, number // NUM_TURNS
        row = self._first_rows[turn] + row_of_turn
        lanes, columns = np.divmod(np.arange(self._places.start, self._places.stop), self._depth)
        slots = (lanes * self.num_batches + row) * self._depth + columns
        return slots, np.ones(len(slots), dtype=bool)

    def window(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Slots and positions of the window of `slot`."""
        window = int(np.searchsorted(self._ends, slot, side="right"))
        shards = self._shards[self._bounds[window] : self._bounds[window + 1]]
        sizes = self._plan.shard_sizes[shards]
        positions = np.arange(sizes.sum()) + np.repeat(
            self._shard_starts[shards] - (np.cumsum(sizes) - sizes), sizes
        )
        positions = self._plan.random(_WINDOW_STREAM, self._epoch, window).permutation(positions)
        positions = positions[np.isin(positions, self._left_out, invert=True)]
        return np.arange(self._ends[window] - len(positions), self._ends[window]), positions

    def is_read(self, slots: np.ndarray, batches: range) -> np.ndarray:
        """Whether any of `batches` of this rank reads each slot; the inverse of `batch`."""
        lanes, within = np.divmod(slots, self.num_batches * self._depth)
        rows, columns = np.divmod(within, self._depth)
        turns = np.searchsorted(self._first_rows, rows, side="right") - 1
        numbers = (rows - self._first_rows[turns]) * NUM_TURNS + turns
        return _is_in(lanes * self._depth + columns, self._places) & _is_in(numbers, batches)

    def positions(self) -> np.ndarray:
        """Positions of all batches, (num_batches, B) int64: for splits that fit in memory."""
        order = np.empty(self.num_batches * self._plan.global_batch, dtype=np.int64)
        for end in self._ends.tolist():
            slots, positions = self.window(end - 1)
            order[slots] = positions
        return order[np.stack([self.batch(number)[0] for number in range(self.num_batches)])]


def _window_bounds(starts: np.ndarray, ends: np.ndarray, window_size: int) -> np.ndarray:
    """Group consecutive shards to windows of at least `window_size` samples, or to one window.

    Returns:
        (num_windows + 1,): number of the first shard of each window, and the number of shards.
    """
    num_shards = len(ends)
    # Number of the shard after the window that would begin with each shard; beyond the last one if too small.
    following = np.append(np.searchsorted(ends, starts + window_size) + 1, num_shards + 1).data
    bounds, shard = array("q"), 0
    while shard <= num_shards:
        bounds.append(shard)
        shard = following[shard]
    # What is left is too small for a window, and joins the last one.
    bounds[max(1, len(bounds) - 1) :] = array("q", [num_shards])
    return np.array(bounds)


def _is_in(values: np.ndarray, numbers: range) -> np.ndarray:
    offsets = values - numbers.start
    return (offsets >= 0) & (values < numbers.stop) & (offsets % numbers.step == 0)


class EvaluationPlan:
    """Natural order; over all ranks every sample is valid exactly once; all ranks have equally many batches.

    Each rank reads one contiguous part; the sizes of the parts differ by at most one sample. A part is filled
    up with repetitions of its last sample, marked invalid. The slot of a sample is its position.

    Args:
        shard_sizes: number of samples of each shard of the split.
        batch_size: B, number of samples per batch on one rank.
        rank: number of this rank.
        world_size: W, number of ranks.
        num_samples: maximum number of samples, the first of the split.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | np.ndarray,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_samples: int | None = None,
    ) -> None:
        self._batch_size = batch_size
        self._shard_ends = np.cumsum(shard_sizes, dtype=np.int64)
        total = int(self._shard_ends[-1])
        total = total if num_samples is None else min(total, num_samples)
        smaller, larger_parts = divmod(total, world_size)
        self._start = rank * smaller + min(rank, larger_parts)
        self._stop = self._start + smaller + (rank < larger_parts)
        self.num_batches = -(-(smaller + (larger_parts > 0)) // batch_size)

    def for_epoch(self, epoch: int) -> EvaluationPlan:
        """This plan: all epochs are the same."""
        return self

    def batch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of a batch, (B,) int64, and whether each is valid, (B,) bool."""
        slots = self._start + number * self._batch_size + np.arange(self._batch_size)
        # With more ranks than samples, some parts are empty, and any sample can fill them up.
        return np.minimum(slots, max(self._stop - 1, 0)), slots < self._stop

    def window(self, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the shard of `slot`, twice."""
        shard = np.searchsorted(self._shard_ends, slot, side="right")
        positions = np.arange(self._shard_ends[shard - 1] if shard else 0, self._shard_ends[shard])
        return positions, positions

    def is_read(self, slots: np.ndarray, batches: range) -> np.ndarray:
        """Whether any of `batches` reads each slot; any may repeat the last one."""
        last = max(self._stop - 1, 0)
        is_mine = (slots >= self._start) & (slots < self._stop)
        return is_mine & _is_in((slots - self._start) // self._batch_size, batches) | (slots == last)
