"""Read shards as batches, under a plan that says which samples and in which order.

What is read of the tars stays undecoded until its batch is due, so that what a plan leaves out or a resume
skips is never decoded.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import signal
import tarfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from cmvae.data.download import WrongContentError
from cmvae.data.groups import group_number
from cmvae.data.index import OnError, ShardIndex, ShardSchema
from cmvae.data.plan import EvaluationPlan, Plan, RankPlan, TrainingPlan, WorldSizeChange
from cmvae.data.remote import Location, is_remote, open_file
from cmvae.data.tar import read_members
from cmvae.modalities import Modality
from cmvae.utils.errors import UserError

Batch = dict[str, Any]
"""Modality to tensor (B, *shape) as it is stored, images uint8, zeros where a sample lacks it; `mask`: (B, M)
bool, whether a sample has each modality; `label`: (B,) int64, −1 where there is none; `key`: list of B str;
`position`: (B,) int64, place of each sample in the split; `valid`: (B,) bool, False where a sample only fills
up the batch; `skipped`: list of str, what is wrong with each sample that another one stands in for.

Where the split has groups also `group`: (B,) int64, the number of each sample's group by
`cmvae.data.groups.group_number`, −1 where it has none; `group_name`: list of B str or None."""

RawSample = dict[str, Any]
"""Suffix of each member to its bytes, and `__key__` and `__url__` (the shard's path)."""


class DecodedSample(NamedTuple):
    """One sample, ready to be put into a batch."""

    values: dict[str, np.ndarray]
    """Modality to what is stored, without those that the sample lacks."""
    label: int
    key: str
    group: str | None = None
    """Name of its group; None where it has none."""


_LOGGER = logging.getLogger(__name__)

PREFETCHED_BATCHES = 8
"""Batches that a reader process is ahead, to bridge the time in which it loads a window."""


class TrainingLoader:
    """Shuffled batches of this rank, in an order that is a function of (seed, epoch) on `world_size` ranks.

    Every sample is read at most once an epoch, and fewer than one global batch of them is left out; all ranks
    have `batches_per_epoch` full batches. Reader processes start with the first epoch and stay.

    Args:
        location: what `cmvae pack` wrote, a folder or a URL.
        split: which split.
        modalities: the modalities to read.
        batch_size: B, samples of a batch on this rank.
        seed: seed of the order.
        rank: which of the ranks this is.
        world_size: number of ranks.
        num_workers: reader processes; 0 reads in this process. The order does not depend on it.
        shuffle_window: samples that are shuffled together, at least.
        cache_bytes: decoded samples stay in the memory of each reader process, and are read and decoded
            once, if the whole split takes at most so much.
        on_error: whether a damaged sample is an error, or is told in `skipped` and not valid.
        world_size_changes: where the number of ranks changed within the run; W·B did not.

    Raises:
        UserError: the folder lacks the split, a modality or a shard, or the split is smaller than one global
            batch. While reading: a shard is damaged.
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
        world_size_changes: Sequence[WorldSizeChange] = (),
    ) -> None:
        shards = SplitReader(location, split, modalities, on_error)
        self._plan = TrainingPlan(
            shards.sizes, batch_size, world_size, seed, shuffle_window, world_size_changes
        )
        self._dataset = _PlannedDataset(
            shards, self._plan, rank, keep_decoded=shards.num_bytes <= cache_bytes
        )
        self._loader = _make_loader(self._dataset, num_workers)

    @property
    def batches_per_epoch(self) -> int:
        """Batches of this rank, and of every other, in one epoch."""
        return self._plan.batches_per_epoch

    def epoch_batches(self, epoch: int, skip_batches: int = 0) -> Iterator[Batch]:
        """Batches of one epoch, after the first `skip_batches`, which are not decoded.

        Only one epoch can be read at a time; beginning another ends the first.
        """
        self._dataset.begin(epoch, skip_batches)
        yield from _raise_errors(self._loader)


class EvaluationLoader:
    """Batches of this rank in natural order; over all ranks every sample is valid exactly once.

    All ranks have `len(loader)` batches of B samples. What fills up the last ones has `valid` False.

    Args:
        location: what `cmvae pack` wrote, a folder or a URL.
        split: which split.
        modalities: the modalities to read.
        batch_size: B, samples of a batch on this rank.
        rank: which of the ranks this is.
        world_size: number of ranks.
        num_workers: reader processes; 0 reads in this process.
        num_samples: only the first so many samples, if the split has more. Samples were shuffled when they
            were packed.
        on_error: as `TrainingLoader`.

    Raises:
        UserError: the folder lacks the split, a modality or a shard. While reading: a shard is damaged.
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
        self._plan = EvaluationPlan(shards.sizes, batch_size, world_size, num_samples)
        self._loader = _make_loader(_PlannedDataset(shards, self._plan, rank), num_workers)

    def __len__(self) -> int:
        return self._plan.batches_per_epoch

    def __iter__(self) -> Iterator[Batch]:
        yield from _raise_errors(self._loader)


class SplitReader:
    """Raw and decoded samples of one split.

    Args:
        location: what `cmvae pack` wrote, a folder or a URL.
        split: which split.
        modalities: the modalities to read.
        on_error: `error` raises all that is wrong; `skip` returns what is wrong with samples.

    Raises:
        UserError: the data set lacks the split or a modality, or, in a folder, a shard is missing or, unless
            damage is to be skipped, has another size than the index says.
    """

    def __init__(
        self, location: Location, split: str, modalities: Sequence[str], on_error: OnError = "error"
    ) -> None:
        self.location = location
        self.on_error = on_error
        self.index = ShardIndex.load(location)
        of_split = self.index.split(split, location)
        self.shards, self.has_groups = of_split.shards, of_split.num_groups > 0
        for name in modalities:
            if name not in self.index.modalities:
                raise UserError(
                    f"{location}: no modality {name!r}; it has {', '.join(self.index.modalities)}. Ask for "
                    "those, or pack a data set that has it"
                )
        self.modalities = {name: self.index.modalities[name] for name in modalities}
        suffixes = {name: member_suffix(name, modality) for name, modality in self.index.modalities.items()}
        labels = set() if self.index.class_names is None else {"cls"}
        # Of members: what may be there, what is read, and what every sample must have.
        self._known = {*suffixes.values(), "cls", "group"}
        self._wanted = {suffixes[name] for name in modalities} | labels
        if self.has_groups:
            self._wanted.add("group")
        self._required = {suffixes[n] for n in modalities if not self.modalities[n].optional} | labels
        self.sizes = [shard.num_samples for shard in self.shards]
        self.num_bytes = sum(self.sizes) * sum(
            math.prod(modality.shape) * np.dtype(modality.dtype).itemsize
            for modality in self.modalities.values()
        )
        """Bytes of the whole split, decoded."""
        if not is_remote(location):
            for shard in self.shards:
                _check_size(Path(location), shard, on_error)

    def read_shard(self, shard: ShardSchema) -> Iterator[RawSample | UserError]:
        """All samples of a shard in its order, undecoded, only the members that are asked for.

        Yields:
            As many as the index says; with `on_error` skip, what is wrong in the place of each damaged one.

        Raises:
            UserError: the tar cannot be fetched or read; or it is damaged, on its server or here, holds
                members of a kind that is not in the index, a key twice, or another number of samples.
        """
        path = f"{self.location}/{shard.name}"
        count = 0
        try:
            stream = self._open(shard)
        except WrongContentError as error:
            for _ in range(shard.num_samples):
                yield self._raise_or_keep(error)
            return
        with stream:
            for sample in self._scan(stream, path):
                if count == shard.num_samples:
                    excess = _damaged(path, f"holds more samples than the {count} that its index says")
                    problem = sample if isinstance(sample, UserError) else excess
                    _LOGGER.warning("not read: %s", self._raise_or_keep(problem))
                    return
                yield self._raise_or_keep(sample) if isinstance(sample, UserError) else sample
                count += 1
        for _ in range(count, shard.num_samples):
            short = _damaged(path, f"holds {count} samples, its index says {shard.num_samples}")
            yield self._raise_or_keep(short)

    def decode(self, sample: RawSample | UserError) -> DecodedSample | UserError:
        """All modalities of a sample, its label, key and group; with `on_error` skip, or what is wrong.

        Raises:
            UserError: a member is damaged or not what the index says.
        """
        if isinstance(sample, UserError):
            return sample
        values = {}
        for name, modality in self.modalities.items():
            suffix = member_suffix(name, modality)
            if suffix not in sample:
                continue
            try:
                values[name] = modality.decode(sample[suffix])
            except ValueError as error:
                problem = _damaged(sample["__url__"], f"{sample['__key__']}.{suffix}: {error}")
                problem.__cause__ = error
                return self._raise_or_keep(problem)
        try:
            return DecodedSample(values, self.label(sample), sample["__key__"], _group_of(sample))
        except UserError as error:
            return self._raise_or_keep(error)

    def label(self, sample: RawSample) -> int:
        """The class of a sample, −1 where the data has no labels.

        Raises:
            UserError: the member is no number of a class.
        """
        if self.index.class_names is None:
            return -1
        text = sample["cls"]
        if not text.isdigit() or int(text) >= len(self.index.class_names):
            raise _damaged(
                sample["__url__"],
                f"{sample['__key__']}.cls: {text[:20]!r} is no class 0..{len(self.index.class_names) - 1}",
            )
        return int(text)

    def stand_in(self) -> DecodedSample:
        """A sample of zeros, which has every modality."""
        zeros = {name: np.zeros(modality.shape, modality.dtype) for name, modality in self.modalities.items()}
        return DecodedSample(zeros, -1, "")

    def collate(self, samples: Sequence[DecodedSample], valid: np.ndarray) -> Batch:
        """One batch of decoded samples."""
        batch: Batch = {}
        for name, modality in self.modalities.items():
            missing = np.zeros(modality.shape, modality.dtype)
            batch[name] = torch.from_numpy(np.stack([sample.values.get(name, missing) for sample in samples]))
        batch["mask"] = torch.tensor(
            [[name in sample.values for name in self.modalities] for sample in samples]
        )
        batch["label"] = torch.tensor([sample.label for sample in samples], dtype=torch.int64)
        batch["key"] = [sample.key for sample in samples]
        if self.has_groups:
            batch["group_name"] = [sample.group for sample in samples]
            batch["group"] = torch.tensor(
                [group_number(name) for name in batch["group_name"]], dtype=torch.int64
            )
        batch["valid"] = torch.from_numpy(valid.copy())
        return batch

    def _open(self, shard: ShardSchema) -> BinaryIO:
        try:
            return open_file(self.location, shard.name, num_bytes=shard.num_bytes, sha256=shard.sha256)
        except FileNotFoundError as error:
            raise _missing(f"{self.location}/{shard.name}") from error

    def _raise_or_keep(self, problem: UserError) -> UserError:
        if self.on_error == "error":
            raise problem
        return problem

    def _scan(self, stream: BinaryIO, path: str) -> Iterator[RawSample | UserError]:
        """What a tar holds, sample after sample: members side by side whose names begin alike."""
        seen: set[str] = set()
        try:
            for key, group in itertools.groupby(read_members(stream), key=lambda member: _key_of(member[0])):
                sample = self._assemble(key, list(group), path)
                if key in seen and not isinstance(sample, UserError):
                    sample = _damaged(path, f"sample {key} is there twice")
                seen.add(key)
                yield sample
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                # The disk, not the data: what one rank cannot read another one may, and all skip alike.
                raise UserError(
                    f"{path}: cannot be read: {error.strerror}. Look after the disk; a training goes on with "
                    "--resume"
                ) from error
            what = f"after {len(seen)} samples: {error.args[0] if error.args else error}"
            problem = _damaged(path, what)
            problem.__cause__ = error
            yield problem

    def _assemble(self, key: str, members: Sequence[tuple[str, bytes]], path: str) -> RawSample | UserError:
        """One sample of its members, or what is wrong: only what the index speaks of passes, no pickle."""
        sample: RawSample = {"__key__": key, "__url__": path}
        found = set()
        for name, content in members:
            suffix = name.removeprefix(f"{key}.")
            if not key or suffix not in self._known:
                return _damaged(
                    path,
                    f"member {name!r} is none of KEY.{', KEY.'.join(sorted(self._known))}, and no other "
                    "kind is read",
                )
            if suffix in found:
                return _damaged(path, f"member {name!r} is there twice")
            found.add(suffix)
            if suffix in self._wanted:
                sample[suffix] = content
        lacking = sorted(self._required - sample.keys())
        if lacking:
            return _damaged(path, f"sample {key} has no member .{lacking[0]}")
        return sample


def _group_of(sample: RawSample) -> str | None:
    """Name of the group of a sample; None where it has none, or where groups are not read.

    Raises:
        UserError: the member is no name.
    """
    content = sample.get("group")
    if content is None:
        return None
    try:
        name: str = content.decode()
    except UnicodeDecodeError:
        name = ""
    if not name:
        raise _damaged(sample["__url__"], f"{sample['__key__']}.group: {content[:20]!r} is no name in UTF-8")
    return name


def _key_of(member: str) -> str:
    """The sample that a member belongs to. A member with a path spoils the one that it claims to be of."""
    return member.rpartition("/")[2].partition(".")[0]


def _check_size(folder: Path, shard: ShardSchema, on_error: OnError) -> None:
    """The cheap part of verification, so that a half-copied data set is noticed in the first second."""
    path = folder / shard.name
    if not path.is_file():
        raise _missing(str(path))
    size = path.stat().st_size
    # What a shard of another size still holds is found out when it is read.
    if size != shard.num_bytes and on_error == "error":
        raise _damaged(str(path), f"has {size} bytes, its index says {shard.num_bytes}")


def member_suffix(name: str, modality: Modality) -> str:
    """What follows the key in the name of a modality's member of a tar, such as `m0.png`."""
    return f"{name}.{modality.suffix}"


class _PlannedDataset(IterableDataset):
    """The batches of one rank; DataLoader worker w of n yields every n-th of them, from number w.

    PyTorch takes the batches of an iterable dataset from its workers strictly in turn, so that together they
    come in the order of the plan.
    """

    def __init__(self, shards: SplitReader, plan: Plan, rank: int, keep_decoded: bool = False) -> None:
        self.shards = shards
        self.plan = plan
        self.rank = rank
        self.keep_decoded = keep_decoded
        # By position, over all epochs; each reader process has its own.
        self._kept: dict[int, DecodedSample | UserError] = {}
        # Worker processes outlive an epoch; shared memory tells them which one is next.
        self._next = torch.zeros(2, dtype=torch.int64).share_memory_()

    def begin(self, epoch: int, skip_batches: int) -> None:
        """What the next iteration reads, in whatever process it runs."""
        self._next.copy_(torch.tensor([epoch, skip_batches]))

    def __iter__(self) -> Iterator[Batch | str]:
        """Batches; or, as the last item, what the user must mend."""
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        epoch, skip_batches = self._next.tolist()
        plan = self.plan.for_rank(epoch, self.rank)
        mine = slice(skip_batches + first, None, step)
        try:
            yield from self._read(RankPlan(plan.batches[mine], plan.valid[mine], plan.window_of_shard))
        except UserError as error:
            # As an exception DataLoader would wrap the message in the worker's traceback.
            yield str(error)

    def _read(self, plan: RankPlan) -> Iterator[Batch]:
        """The batches of `plan`. Samples are held undecoded from when their window is loaded to their use."""
        sizes = np.asarray(self.shards.sizes)
        starts = np.cumsum(sizes) - sizes
        window_of_position = np.repeat(plan.window_of_shard, sizes)
        uses = np.bincount(plan.batches.ravel(), minlength=sizes.sum())
        uses[list(self._kept)] = 0
        loaded: dict[int, RawSample | UserError] = {}
        for positions, valid in zip(plan.batches.tolist(), plan.valid, strict=True):
            samples: list[DecodedSample | UserError] = []
            for position in positions:
                if position in self._kept:
                    samples.append(self._kept[position])
                    continue
                if position not in loaded:
                    shards = np.flatnonzero(plan.window_of_shard == window_of_position[position])
                    for shard in shards.tolist():
                        loaded.update(self._load(shard, int(starts[shard]), uses))
                samples.append(self.shards.decode(loaded[position]))
                uses[position] -= 1
                if uses[position] == 0:
                    del loaded[position]
                if self.keep_decoded:
                    self._kept[position] = samples[-1]
            batch = self._complete(samples, valid)
            batch["position"] = torch.tensor(positions, dtype=torch.int64)
            yield batch

    def _complete(self, samples: Sequence[DecodedSample | UserError], valid: np.ndarray) -> Batch:
        """A batch of B samples, in which a sound one, not valid, stands in for each that is damaged.

        It is of the same batch, or made up: what was read before depends on the number of processes.
        """
        sound = [sample for sample in samples if not isinstance(sample, UserError)]
        stand_in = sound[0] if sound else self.shards.stand_in()
        complete = [stand_in if isinstance(sample, UserError) else sample for sample in samples]
        is_sound = np.array([not isinstance(sample, UserError) for sample in samples])
        batch = self.shards.collate(complete, valid & is_sound)
        batch["skipped"] = [
            str(sample)
            for sample, counts in zip(samples, valid, strict=True)
            if counts and isinstance(sample, UserError)
        ]
        return batch

    def _load(self, shard: int, start: int, uses: np.ndarray) -> Mapping[int, RawSample | UserError]:
        """The samples of a shard that are still to be used, by position."""
        if not uses[start : start + self.shards.sizes[shard]].any():
            return {}
        samples = self.shards.read_shard(self.shards.shards[shard])
        return {position: sample for position, sample in enumerate(samples, start) if uses[position] > 0}


def _make_loader(dataset: _PlannedDataset, num_workers: int) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=None,  # the dataset makes batches
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        prefetch_factor=PREFETCHED_BATCHES if num_workers > 0 else None,
        # DataLoader draws a seed per iteration: not from torch's default stream, which is the caller's.
        generator=torch.Generator(),
        worker_init_fn=_leave_signals_to_parent,
    )


def _leave_signals_to_parent(worker_id: int) -> None:
    """Set up a worker process to outlive signals that are sent to the whole process group.

    Ctrl-C and a launcher's SIGTERM reach every process, but training needs its readers until it has saved:
    a dead reader raises an error in the middle of that.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says() -> None:
    """Obey a SIGTERM of the parent, with which multiprocessing ends its children when the parent exits."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _raise_errors(items: Iterable[Batch | str]) -> Iterator[Batch]:
    for item in items:
        if isinstance(item, str):
            raise UserError(item)
        yield item


def _missing(path: str) -> UserError:
    return UserError(f"{path}: missing, though the index lists it. Copy it there or pack the data again")


def _damaged(path: str, what: str) -> UserError:
    return UserError(
        f"{path}: {what}. The shard is damaged or of another packing than its index: "
        f"see cmvae inspect {path.rpartition('/')[0]}, or pack the data set again"
    )
