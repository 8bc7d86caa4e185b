"""What is packed, which of its shards are done, and the index made from them.

Processes on several machines may pack shards of one data set into one folder, or into folders that are copied
together. Each packed shard has a record, which is written after it, so nothing that is half written counts.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Set
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from cmvae.data.groups import check_group_names
from cmvae.data.index import (
    CLASSIFIERS_FOLDER,
    INDEX_NAME,
    OnError,
    ShardIndex,
    ShardSchema,
    SplitName,
    SplitSchema,
    TableSchema,
)
from cmvae.data.shard_table import write_shard_table
from cmvae.datasets.base import SPLIT_NUMBERS, Source
from cmvae.modalities import AnyModality, ModalityName
from cmvae.utils.errors import UserError, raise_all
from cmvae.utils.files import write_whole

SKIPPED_NAME = "skipped.txt"
"""Lists the damaged samples that were left out, one per line."""
PARTS_FOLDER = "parts"
"""Holds what was packed and the records of shards, until the index is made."""
MAX_LISTED_SHARDS = 10_000
"""The shards of a larger split are not in the index but in a file of their own."""
_OWN_FILE = re.compile(
    rf"{re.escape(SKIPPED_NAME)}|({'|'.join(SPLIT_NUMBERS)})(-\d{{6,}}\.tar|\.shards)|\..+\.partial"
)
_Model = TypeVar("_Model", bound=BaseModel)


class Part(NamedTuple):
    """One of `num_parts` parts of the shards: every `num_parts`-th."""

    number: int
    """From 1."""
    num_parts: int

    def __str__(self) -> str:
        return f"{self.number}/{self.num_parts}"


class ShardPlan(NamedTuple):
    """A shard before it is packed."""

    split: SplitName
    name: str
    start: int
    """Place of its first sample in the order of the split."""
    stop: int


class ShardRecord(BaseModel):
    """A packed shard."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    packing: str
    """`Packing.digest`."""
    part: tuple[int, int]
    shard: ShardSchema | None
    """None if all of its samples were left out."""
    skipped: tuple[str, ...]
    """What is wrong with each sample that was left out."""
    groups: tuple[str, ...]
    """Names of the groups of its samples, sorted."""
    is_labelled: bool
    """Whether all samples have a label."""


class Packing(BaseModel):
    """All that the bytes of a packed data set depend on. Equal on all machines that pack parts of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    seed: int
    shard_size: int
    limit: int | None
    on_error: OnError
    experiment: str | None
    """The shipped experiment for the data; None: a starter config is made."""
    like: str | None
    """The trained run for which new rows are packed."""
    versions: dict[str, str]
    """By package: another version of Pillow may resize images to other pixels."""
    source: dict[str, str | int | float | bool | None]
    split_sizes: dict[SplitName, int]
    class_names: tuple[str, ...] | None
    table: TableSchema | None
    modalities: dict[ModalityName, AnyModality]
    data: str
    """Identifies the values and files that the source reads, see `fingerprint`."""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all fields."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()

    def shards(self) -> Iterator[ShardPlan]:
        """All shards in the order of the index."""
        sizes = self.split_sizes
        share = 1.0 if self.limit is None else min(1.0, self.limit / sizes.get("train", sum(sizes.values())))
        for split, size in sizes.items():
            kept = min(size, max(1, round(share * size)))
            for number, start in enumerate(range(0, kept, self.shard_size)):
                yield ShardPlan(split, f"{split}-{number:06d}.tar", start, min(start + self.shard_size, kept))


def describe_packing(
    source: Source,
    data: str,
    *,
    seed: int = 0,
    shard_size: int = 1000,
    limit: int | None = None,
    table: TableSchema | None = None,
    on_error: OnError = "error",
    experiment: str | None = None,
    like: str | None = None,
) -> Packing:
    """What is packed when `source` is; see `Packing` and `write_shards`."""
    return Packing(
        name=source.name,
        seed=seed,
        shard_size=shard_size,
        limit=limit,
        on_error=on_error,
        experiment=experiment,
        like=like,
        versions={name: version(name) for name in ("cmvae", "pillow", "regex")},
        source=dict(source.settings),
        split_sizes=dict(source.split_sizes),
        class_names=source.class_names,
        table=table,
        modalities=dict(source.modalities),
        data=data,
    )


def begin_packing(folder: Path, packing: Packing, *, force: bool = False) -> None:
    """Prepare the folder for a process that packs all shards.

    Shards of an interrupted packing of the same data are kept, all others are removed, and so are
    classifiers, which were trained on the data that is replaced.

    Raises:
        UserError: the folder cannot be prepared; or `force` is false and it already holds a data set, or
            parts of another one.
    """
    index = folder / INDEX_NAME
    is_replaced = index.exists()
    _refuse_packed(folder, force)
    try:
        # Several machines may have packed for days.
        if not force and any(record.part[1] > 1 for record in _all_records(folder)):
            _refuse_others(folder, packing)
        if is_replaced or [path.name for path in _packings(folder)] != [_packing_name(packing)]:
            folder.mkdir(parents=True, exist_ok=True)
            # The index is removed first: without it, the folder counts as incomplete.
            index.unlink(missing_ok=True)
            shutil.rmtree(folder / PARTS_FOLDER, ignore_errors=True)
            _remove_others(folder, keep=frozenset())
        _write_packing(folder, packing)
    except OSError as error:
        raise _explain(folder, error) from error


def begin_part(folder: Path, packing: Packing) -> None:
    """Prepare the folder for a process that packs some of the shards while others pack the rest.

    Raises:
        UserError: the folder already holds a data set or shards of another packing, or cannot be prepared.
    """
    _refuse_packed(folder, force=False)
    try:
        _refuse_others(folder, packing)
        _write_packing(folder, packing)
        # Another process may have begun at the same time: at least one of the two sees the other.
        _refuse_others(folder, packing)
    except OSError as error:
        raise _explain(folder, error) from error


def read_record(folder: Path, packing: Packing, plan: ShardPlan) -> ShardRecord | None:
    """The record of a shard; None if it is not packed, or not as `packing` says."""
    record = _read(_record_path(folder, plan.name), ShardRecord)
    if record is None or record.packing != packing.digest:
        return None
    if record.shard is not None:
        path = folder / record.shard.name
        if not path.is_file() or path.stat().st_size != record.shard.num_bytes:
            return None
    return record


def write_record(folder: Path, name: str, record: ShardRecord) -> None:
    """Note that the shard `name` is packed.

    Raises:
        OSError: it cannot be written.
    """
    path = _record_path(folder, name)
    # Not flushed: if a power failure takes it away, the shard is packed again.
    partial = path.with_name(f".{path.name}{writer_token()}.partial")
    partial.write_text(record.model_dump_json(), encoding="utf-8")
    partial.replace(path)


def writer_token() -> str:
    """A name of a writer of a file, that no other writer of the same file has."""
    return f".{secrets.token_hex(4)}"


def read_packing(folder: Path) -> Packing:
    """What the shards in a folder are of, before their index is made.

    Raises:
        UserError: no shards were packed in parts, or the shards are of different packings.
    """
    found = {path: _read(path, Packing) for path in _packings(folder)}
    if not found:
        if (folder / INDEX_NAME).is_file():
            raise UserError(f"{folder}: has an index already; there is nothing to join")
        raise UserError(
            f"{folder}: holds no parts. Pack them: cmvae pack SOURCE … --out {folder} --part 1/N, 2/N, …"
        )
    for path, packing in found.items():
        if packing is None:
            raise UserError(f"{path}: is damaged, or of another version of cmvae. Pack the parts again")
    first, *others = [packing for packing in found.values() if packing is not None]
    if others:
        parts = [", ".join(_parts_of(folder, packing)) or "none" for packing in (first, others[0])]
        raise UserError(
            f"{folder}: the parts do not fit together: {_difference(first, others[0])} (parts {parts[0]} and "
            f"{parts[1]}). Pack all parts of the same data with the same options, into an empty folder"
        )
    return first


def join_shards(folder: Path) -> ShardIndex:
    """Make the index from the shards that were packed into a folder, and delete their records.

    Shards are checked by their size; `cmvae inspect` verifies their SHA-256. What an interrupted call has
    left is finished.

    Raises:
        UserError: shards are missing or of different packings, all samples of a split are damaged, two
            groups have the same number, or the index cannot be written.
    """
    packing = read_packing(folder)
    if not (folder / INDEX_NAME).is_file():
        records = _read_records(folder, packing)
        skipped = [problem for record in records.values() for problem in record.skipped]
        try:
            index = _make_index(folder, packing, records)
            tables = {split.shard_table.name for split in index.splits.values() if split.shard_table}
            _remove_others(folder, {*(r.shard.name for r in records.values() if r.shard), *tables})
            if skipped:
                write_whole(folder / SKIPPED_NAME, "".join(f"{problem}\n" for problem in skipped).encode())
            write_whole(folder / INDEX_NAME, index.model_dump_json(indent=2).encode(), token=writer_token())
        except OSError as error:
            raise _explain(folder, error) from error
    shutil.rmtree(folder / PARTS_FOLDER, ignore_errors=True)
    return ShardIndex.load(folder)


def _make_index(folder: Path, packing: Packing, records: Mapping[ShardPlan, ShardRecord]) -> ShardIndex:
    check_group_names(sorted({group for record in records.values() for group in record.groups}))
    splits = {}
    for split in packing.split_sizes:
        of_split = [record for plan, record in records.items() if plan.split == split]
        shards = tuple(record.shard for record in of_split if record.shard is not None)
        if not shards:
            raise UserError(f"{folder}: all samples of the {split} split are damaged. Replace their files")
        splits[split] = SplitSchema(
            num_samples=sum(shard.num_samples for shard in shards),
            **_list_shards(folder, split, shards),
            num_groups=len({group for record in of_split for group in record.groups}),
        )
    options = {"seed": packing.seed, "shard_size": packing.shard_size, "limit": packing.limit}
    all_labelled = all(record.is_labelled for record in records.values())
    return ShardIndex(
        name=packing.name,
        source={**packing.source, **options},
        modalities=packing.modalities,
        class_names=packing.class_names,
        partly_labelled=packing.class_names is not None and not all_labelled,
        splits=splits,
        table=packing.table,
    )


def _list_shards(folder: Path, split: SplitName, shards: tuple[ShardSchema, ...]) -> dict[str, Any]:
    """The fields of a split that say which shards it has."""
    if len(shards) <= MAX_LISTED_SHARDS:
        return {"shards": shards}
    return {"shard_table": write_shard_table(folder / f"{split}.shards", shards)}


def _read_records(folder: Path, packing: Packing) -> dict[ShardPlan, ShardRecord]:
    """The records of all shards.

    Raises:
        UserError: shards are missing; the message names them and their parts.
    """
    plans = list(packing.shards())
    found = {plan: read_record(folder, packing, plan) for plan in plans}
    records = {plan: record for plan, record in found.items() if record is not None}
    missing = [number for number, plan in enumerate(plans) if plan not in records]
    if missing:
        counts = {record.part[1] for record in records.values()}
        count = counts.pop() if len(counts) == 1 else len(plans)
        parts = sorted({number % count + 1 for number in missing})
        raise_all(
            [
                f"{folder}: {len(missing):,} of {len(plans):,} shards are missing or damaged, the first is "
                f"{plans[missing[0]].name}. Pack them: the same command with --part {parts[0]}/{count}",
                *(f"... with --part {part}/{count}" for part in parts[1:]),
            ]
        )
    return records


def _parts_of(folder: Path, packing: Packing) -> list[str]:
    """The parts that packed shards of `packing`."""
    parts = {Part(*record.part) for record in _all_records(folder) if record.packing == packing.digest}
    return [str(part) for part in sorted(parts)]


def _all_records(folder: Path) -> Iterator[ShardRecord]:
    """The records in a folder, whatever they are of."""
    for path in (folder / PARTS_FOLDER).glob("*.tar.json"):
        record = _read(path, ShardRecord)
        if record is not None:
            yield record


def _difference(one: Packing, other: Packing) -> str:
    """What differs first."""
    values, others = one.model_dump(mode="json"), other.model_dump(mode="json")
    key = next(key for key in values if values[key] != others[key])
    value, another = values[key], others[key]
    while isinstance(value, dict) and isinstance(another, dict):
        name = next(name for name in {**value, **another} if value.get(name) != another.get(name))
        key, value, another = f"{key}.{name}", value.get(name), another.get(name)
    if key == "data":
        return "the values that were read, or sizes or times of files, differ"
    return f"{key} is {_shorten(value)} and {_shorten(another)}"


def _refuse_packed(folder: Path, force: bool) -> None:
    if (folder / INDEX_NAME).exists() and not force:
        raise UserError(
            f"{folder}: already holds a packed data set. Choose another --out, or add --force to replace it"
        )


def _refuse_others(folder: Path, packing: Packing) -> None:
    """Raise if the folder holds shards of another packing."""
    for path in _packings(folder):
        if path.name != _packing_name(packing):
            other = _read(path, Packing)
            what = "another version of cmvae packed it" if other is None else _difference(packing, other)
            raise UserError(
                f"{folder}: holds parts that do not fit: {what}. Give the same data and options as for them, "
                f"choose another --out, or delete {folder}"
            )


def _remove_others(folder: Path, keep: Set[str]) -> None:
    """Remove what earlier runs packed, except the files to keep."""
    for path in folder.iterdir():
        if _OWN_FILE.fullmatch(path.name) and path.name not in keep:
            path.unlink(missing_ok=True)
    # They were trained on the data that is replaced.
    for path in (folder / CLASSIFIERS_FOLDER).glob("*.safetensors"):
        path.unlink()


def _packings(folder: Path) -> list[Path]:
    """The files that say what is packed: one, unless different packings were mixed."""
    return sorted((folder / PARTS_FOLDER).glob("packing-*.json"))


def _packing_name(packing: Packing) -> str:
    return f"packing-{packing.digest[:16]}.json"


def _write_packing(folder: Path, packing: Packing) -> None:
    (folder / PARTS_FOLDER).mkdir(parents=True, exist_ok=True)
    path = folder / PARTS_FOLDER / _packing_name(packing)
    if _read(path, Packing) is None:
        write_whole(path, packing.model_dump_json(indent=1).encode(), token=writer_token())


def _record_path(folder: Path, name: str) -> Path:
    return folder / PARTS_FOLDER / f"{name}.json"


def _read(path: Path, model: type[_Model]) -> _Model | None:
    """The content of a file; None if it is missing or damaged."""
    try:
        return model.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _shorten(value: object) -> str:
    return textwrap.shorten(repr(value), 80, placeholder=" …")


def _explain(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: cannot be written: {error}. Free some space, or choose another --out")
