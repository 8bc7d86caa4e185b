"""Pack a source into shards in several processes; files appear complete, a seed gives the same bytes."""

from __future__ import annotations

import hashlib
import io
import os
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import numpy as np
import webdataset

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
from cmvae.datasets.base import SPLIT_NUMBERS, DamagedSampleError, Sample, Source, random_stream
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole

SKIPPED_NAME = "skipped.txt"
"""Lists the damaged samples that were left out, one per line."""
MAX_LISTED_SHARDS = 10_000
"""The shards of a larger split are not in the index but in a file of their own."""
_OWN_FILE = re.compile(
    rf"{re.escape(SKIPPED_NAME)}|({'|'.join(SPLIT_NUMBERS)})(-\d{{6,}}\.tar|\.shards)|\..+\.partial"
)


@dataclass(frozen=True)
class _ShardTask:
    """One shard to write."""

    path: Path
    split: SplitName
    indices: np.ndarray
    """(n,) indices of the samples, in the order of the shard."""


@dataclass(frozen=True)
class _WrittenShard:
    """One written shard."""

    schema: ShardSchema | None
    """None if all of its samples were left out."""
    skipped: tuple[str, ...]
    """What is wrong with each sample that was left out."""
    groups: frozenset[str]
    """Names of the groups of its samples."""
    is_labelled: bool
    """Whether all samples have a label."""


def write_shards(
    source: Source,
    folder: str | Path,
    *,
    seed: int = 0,
    shard_size: int = 1000,
    num_workers: int = 1,
    limit: int | None = None,
    force: bool = False,
    table: TableSchema | None = None,
    on_error: OnError = "error",
    report: Callable[[int, int], None] = lambda done, total: None,
) -> ShardIndex:
    """Pack `source` into `folder`.

    The samples are shuffled. The index is written last, so a folder of an interrupted run does not look
    complete; the next run cleans it up.

    Args:
        source: the data set. It reaches the writer processes by fork or pickling.
        folder: output folder; created if missing.
        seed: seed of the order of the samples.
        shard_size: number of samples per shard. Each process holds one shard in memory.
        num_workers: number of writer processes; the bytes do not depend on it.
        limit: maximum number of train samples; the other splits are reduced by the same factor.
        force: replace a data set in `folder`.
        table: how the rows of the table that is packed are read; None for other sources.
        on_error: `skip` leaves out samples with a missing or damaged file, and lists them in `SKIPPED_NAME`.
        report: called after each shard with the number of samples written and in total.

    Returns:
        The index.

    Raises:
        UserError: the folder already holds a data set, the source is damaged, the disk is full, a writer
            process was killed, or two groups have the same number.
    """
    folder = Path(folder)
    _clear(folder, force)
    tasks = _deal(source, folder, seed, shard_size, limit)
    shards = _run(source, tasks, num_workers, on_error, report)
    check_group_names(sorted(frozenset().union(*(shard.groups for shard in shards))))
    splits = {}
    for split in source.split_sizes:
        of_split = [shard for task, shard in zip(tasks, shards, strict=True) if task.split == split]
        schemas = tuple(shard.schema for shard in of_split if shard.schema is not None)
        if not schemas:
            raise UserError(f"{folder}: all samples of the {split} split are damaged. Replace their files")
        splits[split] = SplitSchema(
            num_samples=sum(schema.num_samples for schema in schemas),
            **_list_shards(folder, split, schemas),
            num_groups=len(frozenset().union(*(shard.groups for shard in of_split))),
        )
    skipped = [problem for shard in shards for problem in shard.skipped]
    if skipped:
        write_whole(folder / SKIPPED_NAME, "".join(f"{problem}\n" for problem in skipped).encode())
    index = ShardIndex(
        name=source.name,
        source={**source.settings, "seed": seed, "shard_size": shard_size, "limit": limit},
        modalities=dict(source.modalities),
        class_names=source.class_names,
        partly_labelled=source.class_names is not None and not all(shard.is_labelled for shard in shards),
        splits=splits,
        table=table,
    )
    write_whole(folder / INDEX_NAME, index.model_dump_json(indent=2).encode())
    return index


def _list_shards(folder: Path, split: SplitName, shards: tuple[ShardSchema, ...]) -> dict[str, Any]:
    """The fields of a split that say which shards it has."""
    if len(shards) <= MAX_LISTED_SHARDS:
        return {"shards": shards}
    return {"shard_table": write_shard_table(folder / f"{split}.shards", shards)}


def _clear(folder: Path, force: bool) -> None:
    """Create the folder, and remove index, shards and classifiers of an earlier run."""
    index = folder / INDEX_NAME
    if index.exists() and not force:
        raise UserError(
            f"{folder}: already holds a packed data set. Choose another --out, or add --force to replace it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # The index is removed first: without it, the folder counts as incomplete.
        index.unlink(missing_ok=True)
        for path in folder.iterdir():
            if _OWN_FILE.fullmatch(path.name):
                path.unlink()
        # They were trained on the data that is replaced.
        for path in (folder / CLASSIFIERS_FOLDER).glob("*.safetensors"):
            path.unlink()
    except OSError as error:
        raise UserError(f"{folder}: cannot be prepared: {error}. Choose another --out") from error


def _deal(source: Source, folder: Path, seed: int, shard_size: int, limit: int | None) -> list[_ShardTask]:
    """Divide the shuffled samples of every split into shards."""
    sizes = source.split_sizes
    part = 1.0 if limit is None else min(1.0, limit / sizes.get("train", sum(sizes.values())))
    tasks = []
    for split, size in sizes.items():
        order = random_stream(seed, SPLIT_NUMBERS[split]).permutation(size)[: max(1, round(part * size))]
        for number, start in enumerate(range(0, len(order), shard_size)):
            path = folder / f"{split}-{number:06d}.tar"
            tasks.append(_ShardTask(path, split, order[start : start + shard_size]))
    return tasks


def _run(
    source: Source,
    tasks: list[_ShardTask],
    num_workers: int,
    on_error: OnError,
    report: Callable[[int, int], None],
) -> list[_WrittenShard]:
    """Write all shards; the first failure cancels those that have not started."""
    pool = ProcessPoolExecutor(num_workers, initializer=_start_worker, initargs=(source, on_error))
    try:
        futures: dict[Future[_WrittenShard], _ShardTask] = {
            pool.submit(_write_shard, task): task for task in tasks
        }
        done, total = 0, sum(len(task.indices) for task in tasks)
        for future in as_completed(futures):
            future.result()
            done += len(futures[future].indices)
            report(done, total)
        return [future.result() for future in futures]
    except BrokenProcessPool as error:
        raise UserError(
            f"{tasks[0].path.parent}: a writer process was killed, most likely because memory ran out. "
            "Run again with fewer --workers or a smaller --shard-size"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_source: Source
"""The data set of this writer process; set once by `_start_worker`, so it is not part of every task."""
_on_error: OnError


def _start_worker(source: Source, on_error: OnError) -> None:
    global _source, _on_error
    _source, _on_error = source, on_error
    # Ctrl-C reaches every process of the terminal; the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Exit with the parent: if it is killed, it cannot stop its pool, whose processes would wait for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_shard(task: _ShardTask) -> _WrittenShard:
    buffer = io.BytesIO()
    groups, skipped = set(), []
    is_labelled = True
    # Owner, mode and time are constant, so equal samples make equal bytes.
    with webdataset.TarWriter(buffer, user="", group="", mode=0o444, mtime=0, encoder=False) as tar:
        for index in task.indices.tolist():
            try:
                sample = _source.sample(task.split, index)
            except DamagedSampleError as error:
                if _on_error == "error":
                    raise
                skipped.append(str(error))
                continue
            key = sample.key if sample.key is not None else f"{task.split}-{index:06d}"
            tar.write({"__key__": key, **_encode(_source, sample)})
            is_labelled &= sample.label is not None
            if sample.group is not None:
                groups.add(sample.group)
    if len(skipped) == len(task.indices):
        return _WrittenShard(None, tuple(skipped), frozenset(), is_labelled)
    content = buffer.getvalue()
    try:
        write_whole(task.path, content)
    except OSError as error:
        raise UserError(
            f"{task.path}: cannot be written: {error}. Free some space, or choose another --out"
        ) from error
    schema = ShardSchema(
        name=task.path.name,
        num_samples=len(task.indices) - len(skipped),
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )
    return _WrittenShard(schema, tuple(skipped), frozenset(groups), is_labelled)


def _encode(source: Source, sample: Sample) -> dict[str, bytes]:
    """Content of the members of one sample, by suffix."""
    members = {}
    for modality, stored in sample.values.items():
        kind = source.modalities[modality]
        members[f"{modality}.{kind.suffix}"] = kind.encode(stored)
    if sample.label is not None:
        members["cls"] = b"%d" % sample.label
    if sample.group is not None:
        members["group"] = sample.group.encode()
    return members
