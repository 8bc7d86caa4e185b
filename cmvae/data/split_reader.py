"""Read the samples of one split from its shards: undecoded, decoded, and as a batch.

Damage is found here. It is an error, or, if damage is to be skipped, stands in the place of the sample.
"""

from __future__ import annotations

import itertools
import logging
import math
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from cmvae.data.batch import stack_values
from cmvae.data.download import WrongContentError
from cmvae.data.groups import group_number
from cmvae.data.index import OnError, ShardIndex, ShardSchema
from cmvae.data.remote import Location, is_remote, open_file
from cmvae.data.shard_table import ShardTable, open_shards
from cmvae.data.tar import read_members
from cmvae.modalities import Modality
from cmvae.utils.errors import UserError

Batch = dict[str, Any]
"""A batch of B samples of M modalities.

The name of each modality: tensor (B, *shape) of stored values, zeros where a sample lacks it.
`mask`: (B, M) bool, whether a sample has each modality.
`label`: (B,) int64, -1 where there is none.
`key`: list of B str.
`position`: (B,) int64, place of each sample in the split.
`valid`: (B,) bool, False for a sample that only fills up the batch.
`skipped`: list of str, the errors of the damaged samples that were replaced.
`group`: (B,) int64, `cmvae.data.groups.group_number` of each sample's group, -1 where it has none; only if
the split has groups.
`group_name`: list of B str or None; only if the split has groups.
"""

RawSample = dict[str, Any]
"""The bytes of each member by suffix, and `__key__` and `__url__` (path of the shard)."""

_LOGGER = logging.getLogger(__name__)


class DecodedSample(NamedTuple):
    """One sample, ready to be put into a batch."""

    values: dict[str, np.ndarray]
    """Stored value of each modality that the sample has."""
    label: int
    key: str
    group: str | None = None
    """Name of its group; None if it has none."""


class SplitReader:
    """Raw and decoded samples of one split.

    Args:
        location: folder that `cmvae pack` wrote, or its URL.
        split: name of the split.
        modalities: names of the modalities to read.
        on_error: `error` raises an error for a damaged sample; `skip` returns the error in its place.

    Raises:
        UserError: the data set has no such split or modality. In a folder also: a shard is missing, or (with
            `on_error` error) its size is not that of the index.
    """

    def __init__(
        self, location: Location, split: str, modalities: Sequence[str], on_error: OnError = "error"
    ) -> None:
        self.location = location
        self.on_error = on_error
        self.index = ShardIndex.load(location)
        of_split = self.index.split(split, location)
        self.shards, self.has_groups = open_shards(of_split, location), of_split.num_groups > 0
        for name in modalities:
            if name not in self.index.modalities:
                raise UserError(
                    f"{location}: no modality {name!r}; it has {', '.join(self.index.modalities)}. Choose "
                    "one of these, or pack a data set that has it"
                )
        self.modalities = {name: self.index.modalities[name] for name in modalities}
        suffixes = {name: member_suffix(name, modality) for name, modality in self.index.modalities.items()}
        labels = set() if self.index.class_names is None else {"cls"}
        required_labels = set() if self.index.partly_labelled else labels
        # Suffixes of members: those that may occur, those that are read, those that every sample must have.
        self._known = {*suffixes.values(), "cls", "group"}
        self._wanted = {suffixes[name] for name in modalities} | labels
        if self.has_groups:
            self._wanted.add("group")
        self._required = {suffixes[n] for n in modalities if not self.modalities[n].optional}
        self._required |= required_labels
        self.sizes = (
            self.shards.num_samples
            if isinstance(self.shards, ShardTable)
            else np.array([shard.num_samples for shard in self.shards])
        )
        """Number of samples of each shard, (num_shards,) integers."""
        self.ends = np.cumsum(self.sizes, dtype=np.int64)
        """Position after the last sample of each shard, (num_shards,) int64."""
        self.num_bytes = of_split.num_samples * sum(
            math.prod(modality.shape) * np.dtype(modality.dtype).itemsize
            for modality in self.modalities.values()
        )
        """Number of bytes of the whole split, decoded."""
        if not is_remote(location):
            # A million files are not looked at in the first second: a missing one is found when it is opened.
            for shard in of_split.shards:
                _check_size(Path(location), shard, on_error)

    def read_shard(self, shard: ShardSchema) -> Iterator[RawSample | UserError]:
        """The samples of a shard in its order, undecoded, with the members that are read.

        Yields:
            As many samples as the index says; with `on_error` skip an error in place of each damaged one.

        Raises:
            UserError: the tar cannot be downloaded or read. With `on_error` error also: it is damaged, has
                members that the index does not mention, a key twice, or another number of samples.
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
                    excess = _damaged(path, f"has more samples than the {count} of its index")
                    problem = sample if isinstance(sample, UserError) else excess
                    _LOGGER.warning("not read: %s", self._raise_or_keep(problem))
                    return
                yield self._raise_or_keep(sample) if isinstance(sample, UserError) else sample
                count += 1
        for _ in range(count, shard.num_samples):
            short = _damaged(path, f"has {count} samples, but its index says {shard.num_samples}")
            yield self._raise_or_keep(short)

    def decode(self, sample: RawSample | UserError) -> DecodedSample | UserError:
        """Decode the modalities, the label and the group of a sample; an error is returned as it is.

        Returns:
            The sample; with `on_error` skip an error if it is damaged.

        Raises:
            UserError: with `on_error` error, a member is damaged or does not fit the index.
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
        """The class of a sample, -1 if it has no label.

        Raises:
            UserError: the member is not the number of a class.
        """
        if self.index.class_names is None or "cls" not in sample:
            return -1
        text = sample["cls"]
        if not text.isdigit() or int(text) >= len(self.index.class_names):
            raise _damaged(
                sample["__url__"],
                f"{sample['__key__']}.cls: {text[:20]!r} is not a class 0..{len(self.index.class_names) - 1}",
            )
        return int(text)

    def collate(self, samples: Sequence[DecodedSample | UserError], valid: np.ndarray) -> Batch:
        """Make a batch of B samples, in which an intact sample, marked invalid, replaces each damaged one.

        The replacement is a sample of the same batch, or zeros: samples that were read before depend on the
        number of processes.

        Args:
            samples: decoded samples, or the errors of damaged ones.
            valid: (B,) bool, False for samples that only fill up the batch.

        Returns:
            The batch without `position`.
        """
        intact = [sample for sample in samples if not isinstance(sample, UserError)]
        replacement = intact[0] if intact else self._zeros()
        complete = [replacement if isinstance(sample, UserError) else sample for sample in samples]
        is_intact = np.array([not isinstance(sample, UserError) for sample in samples])
        batch: Batch = {**stack_values([sample.values for sample in complete], self.modalities)}
        batch["label"] = torch.tensor([sample.label for sample in complete], dtype=torch.int64)
        batch["key"] = [sample.key for sample in complete]
        if self.has_groups:
            batch["group_name"] = [sample.group for sample in complete]
            numbers = [group_number(name) for name in batch["group_name"]]
            batch["group"] = torch.tensor(numbers, dtype=torch.int64)
        batch["valid"] = torch.from_numpy(valid & is_intact)
        batch["skipped"] = [
            str(sample)
            for sample, counts in zip(samples, valid, strict=True)
            if counts and isinstance(sample, UserError)
        ]
        return batch

    def _zeros(self) -> DecodedSample:
        zeros = {name: np.zeros(modality.shape, modality.dtype) for name, modality in self.modalities.items()}
        return DecodedSample(zeros, -1, "")

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
        """The samples of a tar: consecutive members whose names have the same key."""
        seen: set[str] = set()
        try:
            for key, group in itertools.groupby(read_members(stream), key=lambda member: _key_of(member[0])):
                sample = self._assemble(key, list(group), path)
                if key in seen and not isinstance(sample, UserError):
                    sample = _damaged(path, f"sample {key} occurs twice")
                seen.add(key)
                yield sample
        except (tarfile.TarError, OSError, EOFError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                # A failing disk is no damage of the data: all ranks must skip the same samples, and others
                # may be able to read this one.
                raise UserError(
                    f"{path}: cannot be read: {error.strerror}. Check the disk, then continue a training "
                    "with --resume"
                ) from error
            what = f"after {len(seen)} samples: {error.args[0] if error.args else error}"
            problem = _damaged(path, what)
            problem.__cause__ = error
            yield problem

    def _assemble(self, key: str, members: Sequence[tuple[str, bytes]], path: str) -> RawSample | UserError:
        """A sample of its members; only members that the index mentions are accepted, so no pickle is."""
        sample: RawSample = {"__key__": key, "__url__": path}
        found = set()
        for name, content in members:
            suffix = name.removeprefix(f"{key}.")
            if not key or suffix not in self._known:
                return _damaged(
                    path,
                    f"member {name!r} is none of KEY.{', KEY.'.join(sorted(self._known))}, and others are "
                    "not read",
                )
            if suffix in found:
                return _damaged(path, f"member {name!r} occurs twice")
            found.add(suffix)
            if suffix in self._wanted:
                sample[suffix] = content
        lacking = sorted(self._required - sample.keys())
        if lacking:
            return _damaged(path, f"sample {key} has no member .{lacking[0]}")
        return sample


def member_suffix(name: str, modality: Modality) -> str:
    """Suffix of a modality's members in a tar, after the key, such as `m0.png`."""
    return f"{name}.{modality.suffix}"


def _group_of(sample: RawSample) -> str | None:
    """Name of the group of a sample; None if it has none, or if groups are not read.

    Raises:
        UserError: the member is not a name.
    """
    content = sample.get("group")
    if content is None:
        return None
    try:
        name: str = content.decode()
    except UnicodeDecodeError:
        name = ""
    if not name:
        raise _damaged(
            sample["__url__"], f"{sample['__key__']}.group: {content[:20]!r} is not a name in UTF-8"
        )
    return name


def _key_of(member: str) -> str:
    """Key of the sample that a member belongs to; a member with a path damages the sample that it names."""
    return member.rpartition("/")[2].partition(".")[0]


def _check_size(folder: Path, shard: ShardSchema, on_error: OnError) -> None:
    """The fast part of verification, which finds an incomplete copy of a data set in the first second."""
    path = folder / shard.name
    if not path.is_file():
        raise _missing(str(path))
    size = path.stat().st_size
    # Reading will find the intact samples in a shard of another size.
    if size != shard.num_bytes and on_error == "error":
        raise _damaged(str(path), f"has {size} bytes, but its index says {shard.num_bytes}")


def _missing(path: str) -> UserError:
    return UserError(f"{path}: missing, but the index lists it. Copy it there, or pack the data set again")


def _damaged(path: str, what: str) -> UserError:
    return UserError(
        f"{path}: {what}. The shard is damaged, or its index belongs to another packing: run cmvae inspect "
        f"{path.rpartition('/')[0]}, or pack the data set again"
    )
