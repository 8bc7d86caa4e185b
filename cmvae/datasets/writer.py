"""Write the shards of a source in several processes; files appear complete, a seed gives the same bytes."""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import parent_process
from pathlib import Path
from typing import NamedTuple

import numpy as np
import webdataset

from cmvae.data.index import OnError, ShardIndex, ShardSchema, TableSchema
from cmvae.datasets.base import SPLIT_NUMBERS, DamagedSampleError, Sample, Source, random_stream
from cmvae.datasets.packing import (
    Packing,
    Part,
    ShardPlan,
    ShardRecord,
    begin_packing,
    describe_packing,
    join_shards,
    read_record,
    write_record,
    writer_token,
)
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole


@dataclass(frozen=True)
class _ShardTask:
    """One shard to write."""

    plan: ShardPlan
    indices: np.ndarray
    """(n,) indices of the samples, in the order of the shard."""


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
    complete; the next run begins again.

    Args:
        source: the data set. It reaches the writer processes by fork or pickling.
        folder: output folder; created if missing.
        seed: seed of the order of the samples.
        shard_size: number of samples per shard. Each process holds one shard in memory.
        num_workers: number of writer processes; the bytes do not depend on it.
        limit: maximum number of train samples; the other splits are reduced by the same factor.
        force: replace a data set in `folder`.
        table: how the rows of the table that is packed are read; None for other sources.
        on_error: `skip` leaves out samples with a missing or damaged file, and lists them in skipped.txt.
        report: called after each shard with the number of samples written and in total.

    Returns:
        The index.

    Raises:
        UserError: the folder already holds a data set, the source is damaged, the disk is full, a writer
            process was killed, or two groups have the same number.
    """
    packing = describe_packing(
        source,
        secrets.token_hex(),  # No other call goes on with what this one leaves.
        seed=seed,
        shard_size=shard_size,
        limit=limit,
        table=table,
        on_error=on_error,
    )
    begin_packing(Path(folder), packing, force=force)
    write_part(source, Path(folder), packing, num_workers=num_workers, report=report)
    return join_shards(Path(folder))


def write_part(
    source: Source,
    folder: Path,
    packing: Packing,
    part: Part = Part(1, 1),  # noqa: B008 (immutable)
    *,
    num_workers: int = 1,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the shards of a part that are not in the folder yet, each with its record.

    Another process may write the same part at the same time: both write the same bytes.

    Args:
        source: see `write_shards`.
        folder: as `begin_packing` or `begin_part` left it.
        packing: what `describe_packing` returned for the source.
        part: the part.
        num_workers: see `write_shards`.
        report: see `write_shards`.

    Raises:
        UserError: the source is damaged, the disk is full, or a writer process was killed.
    """
    tasks = list(_deal(packing, part))
    missing = [task for task in tasks if read_record(folder, packing, task.plan) is None]
    total = sum(len(task.indices) for task in tasks)
    done = total - sum(len(task.indices) for task in missing)
    report(done, total)
    if not missing:
        return
    writer = _Writer(source, folder, packing, part)
    pool = ProcessPoolExecutor(num_workers, initializer=_start_worker, initargs=(writer,))
    try:
        futures = {pool.submit(_write_shard, task): task for task in missing}
        for future in as_completed(futures):
            future.result()
            done += len(futures[future].indices)
            report(done, total)
    except BrokenProcessPool as error:
        raise UserError(
            f"{folder}: a writer process was killed, most likely because memory ran out. "
            "Run again with fewer --workers or a smaller --shard-size"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _deal(packing: Packing, part: Part) -> Iterator[_ShardTask]:
    """The shards of a part, and which samples each of them has."""
    orders = {
        split: random_stream(packing.seed, SPLIT_NUMBERS[split]).permutation(size)
        for split, size in packing.split_sizes.items()
    }
    for plan in islice(packing.shards(), part.number - 1, None, part.num_parts):
        yield _ShardTask(plan, orders[plan.split][plan.start : plan.stop])


class _Writer(NamedTuple):
    """What all tasks of a writer process have in common."""

    source: Source
    folder: Path
    packing: Packing
    part: Part


_writer: _Writer
"""Set once per process by `_start_worker`, so it is not part of every task."""


def _start_worker(writer: _Writer) -> None:
    global _writer
    _writer = writer
    # Ctrl-C reaches every process of the terminal; the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """Exit with the parent: if it is killed, it cannot stop its pool, whose processes would wait for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _write_shard(task: _ShardTask) -> None:
    source, folder, packing, part = _writer
    buffer = io.BytesIO()
    groups, skipped = set(), []
    is_labelled = True
    # Owner, mode and time are constant, so equal samples make equal bytes.
    with webdataset.TarWriter(buffer, user="", group="", mode=0o444, mtime=0, encoder=False) as tar:
        for index in task.indices.tolist():
            try:
                sample = source.sample(task.plan.split, index)
            except DamagedSampleError as error:
                if packing.on_error == "error":
                    raise
                skipped.append(str(error))
                continue
            key = sample.key if sample.key is not None else f"{task.plan.split}-{index:06d}"
            tar.write({"__key__": key, **_encode(source, sample)})
            is_labelled &= sample.label is not None
            if sample.group is not None:
                groups.add(sample.group)
    shard = None
    path = folder / task.plan.name
    try:
        if len(skipped) < len(task.indices):
            content = buffer.getvalue()
            write_whole(path, content, token=writer_token())
            shard = ShardSchema(
                name=path.name,
                num_samples=len(task.indices) - len(skipped),
                num_bytes=len(content),
                sha256=hashlib.sha256(content).hexdigest(),
            )
        record = ShardRecord(
            packing=packing.digest,
            part=part,
            shard=shard,
            skipped=tuple(skipped),
            groups=tuple(sorted(groups)),
            is_labelled=is_labelled,
        )
        write_record(folder, path.name, record)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error}. Free some space, or choose another --out"
        ) from error


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
