"""Read shards as batches, in the order of a plan.

Samples stay undecoded until their batch is due, so a sample that the plan leaves out, or that a resumed
training has consumed, is never decoded.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cmvae.data.index import OnError
from cmvae.data.plan import EvaluationPlan, RankPlan, TrainingPlan
from cmvae.data.remote import Location
from cmvae.data.split_reader import Batch, DecodedSample, RawSample, SplitReader
from cmvae.utils.errors import UserError

PREFETCHED_BATCHES = 8
"""Batches that a reader process prepares in advance, to bridge the time in which it loads a window. Fewer if
shared memory is small."""
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where Linux has it)
# A batch has a few small tensors, and each takes at least a page of shared memory.
_SMALL_TENSORS_BYTES = 16 * 4096
_LOGGER = logging.getLogger(__name__)


class TrainingLoader:
    """Shuffled batches of this rank: its places of global batches that do not depend on the number of ranks.

    Every sample is read at most once per epoch, and fewer samples than one global batch are left out. All
    ranks have `batches_per_epoch` full batches. Reader processes start with the first epoch and stay. See
    `TrainingPlan`.

    Args:
        location: folder that `cmvae pack` wrote, or its URL.
        split: name of the split.
        modalities: names of the modalities to read.
        batch_size: B, number of samples per batch on this rank.
        seed: seed of the order.
        rank: number of this rank.
        world_size: W, number of ranks.
        num_workers: number of reader processes; 0 reads in this process. It does not affect the order.
        shuffle_window: minimum number of samples in the windows that a global batch is drawn from.
        cache_bytes: if the decoded split is at most this large, each reader process keeps the samples that it
            decodes in memory.
        on_error: `error` raises an error for a damaged sample; `skip` replaces it, marked invalid, and
            reports it in `skipped`.

    Raises:
        UserError: the data set has no such split or modality, a shard is missing, or the split is smaller
            than one global batch. While reading: a shard is damaged.
    """

    def __init__(
        self,
        location: Location,
        *,
        modalities: Sequence[str],
        batch_size: int,
        split: str = "train",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        shuffle_window: int = 4096,
        cache_bytes: int = 0,
        on_error: OnError = "error",
    ) -> None:
        shards = SplitReader(location, split, modalities, on_error)
        plan = TrainingPlan(shards.sizes, batch_size * world_size, seed, shuffle_window)
        self.batches_per_epoch = plan.batches_per_epoch
        """Number of batches per epoch on each rank."""
        self._dataset = _PlannedDataset(
            shards,
            partial(plan.for_rank, rank=rank, world_size=world_size),
            keep_decoded=shards.num_bytes <= cache_bytes,
        )
        self._loader = _make_loader(self._dataset, num_workers, batch_size)

    def epoch_batches(self, epoch: int, skip_batches: int = 0) -> Iterator[Batch]:
        """Batches of one epoch after the first `skip_batches`, which are not decoded.

        Only one epoch can be read at a time; starting another one ends the first.
        """
        self._dataset.begin(epoch, skip_batches)
        yield from _raise_errors(self._loader)


class EvaluationLoader:
    """Batches of this rank in natural order; over all ranks every sample is valid exactly once.

    All ranks have `len(loader)` batches of B samples. Samples that fill up the last ones are marked invalid.

    Args:
        location: folder that `cmvae pack` wrote, or its URL.
        split: name of the split.
        modalities: names of the modalities to read.
        batch_size: B, number of samples per batch on this rank.
        rank: number of this rank.
        world_size: number of ranks.
        num_workers: number of reader processes; 0 reads in this process.
        num_samples: maximum number of samples, the first of the split. Packing has shuffled them.
        on_error: `error` raises an error for a damaged sample; `skip` replaces it, marked invalid, and
            reports it in `skipped`.

    Raises:
        UserError: the data set has no such split or modality, or a shard is missing. While reading: a shard
            is damaged.
    """

    def __init__(
        self,
        location: Location,
        *,
        split: str,
        modalities: Sequence[str],
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 0,
        num_samples: int | None = None,
        on_error: OnError = "error",
    ) -> None:
        shards = SplitReader(location, split, modalities, on_error)
        self._plan = EvaluationPlan(shards.sizes, batch_size, rank, world_size, num_samples)
        dataset = _PlannedDataset(shards, self._plan.for_epoch)
        self._loader = _make_loader(dataset, num_workers, batch_size)

    def __len__(self) -> int:
        return self._plan.num_batches

    def __iter__(self) -> Iterator[Batch]:
        yield from _raise_errors(self._loader)


class _PlannedDataset(IterableDataset):
    """The batches of one rank; DataLoader worker w of n yields every n-th batch, starting with number w.

    PyTorch takes the batches of an iterable dataset from its workers strictly in turn, so together they are
    in the order of the plan.
    """

    def __init__(
        self, shards: SplitReader, make_plan: Callable[[int], RankPlan], keep_decoded: bool = False
    ) -> None:
        self.shards = shards
        self.make_plan = make_plan
        self.keep_decoded = keep_decoded
        # Decoded samples by position, over all epochs; each reader process has its own.
        self._kept: dict[int, DecodedSample | UserError] = {}
        # Reader processes outlive an epoch; epoch and number of batches to skip reach them in shared memory.
        self._next = torch.zeros(2, dtype=torch.int64).share_memory_()

    def begin(self, epoch: int, skip_batches: int) -> None:
        """Set what the next iteration reads, in any process."""
        self._next.copy_(torch.tensor([epoch, skip_batches]))

    def __iter__(self) -> Iterator[Batch | str]:
        """Batches; the last item may be the message of an error."""
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        epoch, skip_batches = self._next.tolist()
        plan = self.make_plan(epoch)
        try:
            yield from self._read(plan, range(skip_batches + first, plan.num_batches, step))
        except UserError as error:
            # DataLoader would wrap the message of an exception in the worker's traceback.
            yield str(error)

    def _read(self, plan: RankPlan, numbers: range) -> Iterator[Batch]:
        """These batches. Undecoded samples are held from the loading of their window to their use."""
        loaded: dict[int, tuple[int, RawSample | UserError]] = {}
        current: tuple[int, int, DecodedSample | UserError] | None = None
        for number in numbers:
            slots, valid = plan.batch(number)
            samples: list[tuple[int, DecodedSample | UserError]] = []
            for slot in slots.tolist():
                # Only the last sample of a part is repeated, to fill up batches.
                if current is None or current[0] != slot:
                    if slot not in loaded:
                        loaded.update(self._load(plan, slot, numbers))
                    position, raw = loaded.pop(slot)
                    current = slot, position, self._kept.get(position) or self.shards.decode(raw)
                    if self.keep_decoded:
                        self._kept[position] = current[2]
                samples.append(current[1:])
            batch = self.shards.collate([sample for _, sample in samples], valid)
            batch["position"] = torch.tensor([position for position, _ in samples], dtype=torch.int64)
            yield batch

    def _load(
        self, plan: RankPlan, slot: int, numbers: range
    ) -> Iterator[tuple[int, tuple[int, RawSample | UserError]]]:
        """By slot, the position and the content of the samples of a window that are read in these batches."""
        slots, positions = plan.window(slot)
        is_read = plan.is_read(slots, numbers)
        slot_of = dict(zip(positions[is_read].tolist(), slots[is_read].tolist(), strict=True))
        for position in slot_of.keys() & self._kept.keys():
            yield slot_of.pop(position), (position, {})
        ends = self.shards.ends
        for shard in np.unique(np.searchsorted(ends, list(slot_of), side="right")).tolist():
            start = int(ends[shard]) - self.shards.shards[shard].num_samples
            for position, sample in enumerate(self.shards.read_shard(self.shards.shards[shard]), start):
                if position in slot_of:
                    yield slot_of[position], (position, sample)


@contextmanager
def explain_dead_readers() -> Iterator[None]:
    """Turn the error of a reader process that was killed into one that says what to do.

    PyTorch raises it from a signal handler, so in whatever the main thread does at that moment.

    Raises:
        UserError: a reader process died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise _dead_reader(error.__cause__ or error) from error


def _dead_reader(error: BaseException) -> UserError:
    reason = str(error).partition(". ")[0]
    return UserError(
        f"data.num_workers: a reader process died: {reason}. Memory or {_SHARED_MEMORY} is full: give "
        "more (docker run --shm-size=1g), or set data.num_workers=0; then continue with --resume"
    )


def _num_prefetched(batch_bytes: int, num_workers: int) -> int:
    """Number of batches per reader process that shared memory has room for; 0 if not even two."""
    if not _SHARED_MEMORY.is_dir():
        return PREFETCHED_BATCHES
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    room = shutil.disk_usage(_SHARED_MEMORY).free // (ranks * num_workers * batch_bytes)
    # One more batch is in use.
    return 0 if room < 3 else min(PREFETCHED_BATCHES, room - 1)


def _make_loader(dataset: _PlannedDataset, num_workers: int, batch_size: int) -> DataLoader:
    num_prefetched = None
    if num_workers > 0:
        shards = dataset.shards
        batch_bytes = batch_size * shards.num_bytes // int(shards.ends[-1]) + _SMALL_TENSORS_BYTES
        # A reader process that finds shared memory full dies.
        num_prefetched = _num_prefetched(batch_bytes, num_workers)
        if num_prefetched == 0:
            _LOGGER.warning(
                "data.num_workers=%d: not used, because %s has no room for batches of %.1f MB. The training "
                "process reads the data, which is slower: enlarge it (docker run --shm-size=1g), or set "
                "data.num_workers=0",
                num_workers,
                _SHARED_MEMORY,
                batch_bytes / 1e6,
            )
            num_workers, num_prefetched = 0, None
    return DataLoader(
        dataset,
        batch_size=None,  # the dataset makes batches
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        prefetch_factor=num_prefetched,
        # DataLoader draws a seed per iteration: not from torch's default stream, which is the caller's.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_parent,
    )


def _leave_signals_to_parent(worker_id: int) -> None:
    """Make a reader process survive signals that are sent to the whole process group.

    Ctrl-C and the SIGTERM of a launcher reach every process, but training needs its readers until it has
    saved: a dead reader raises an error in the middle of that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_parent_says, daemon=True).start()


def _exit_when_parent_says() -> None:
    """Obey a SIGTERM of the parent, with which multiprocessing ends its children when the parent exits."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _raise_errors(items: Iterable[Batch | str]) -> Iterator[Batch]:
    try:
        for item in items:
            if isinstance(item, str):
                raise UserError(item)
            yield item
    except ConnectionError as error:  # a reader process died while it handed over a batch
        raise _dead_reader(error) from error
