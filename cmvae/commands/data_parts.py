"""Data of any size in parts that fit into memory: the shards of packed data, or rows of a table."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from cmvae.data.batch import stack_values
from cmvae.data.index import ShardIndex, TableSchema
from cmvae.data.remote import Location
from cmvae.data.split_reader import Batch, SplitReader
from cmvae.datasets.columns import read_row
from cmvae.datasets.table_file import Table, read_table_parts
from cmvae.datasets.table_rows import read_rows, row_keys
from cmvae.datasets.values import Unknown, count_unknown, make_column
from cmvae.modalities import Modality

PART_ROWS = 1000
"""Rows of a table in a part; shards usually have as many."""


class LoadedPart(NamedTuple):
    """A part in memory."""

    batches: Iterator[Batch]
    """Stored values by modality, `mask`, `key`, and `group_name` if there are groups."""
    unknown: Mapping[str, Unknown]
    """By modality the words and categories that it does not know; empty for packed data."""
    table: Table | None = None
    """The rows of a table."""


@dataclass(frozen=True)
class DataPart:
    """Consecutive samples."""

    number: int
    split: str
    """Split of all of them; empty for a table."""
    num_samples: int
    load: Callable[[], LoadedPart]


class DataParts(Protocol):
    """Data that is read in parts, which do not depend on the number of ranks."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What identifies the data and its parts, as JSON."""

    @property
    def num_samples(self) -> int | None:
        """Number of samples; None if it is not known before reading."""

    @property
    def is_table(self) -> bool:
        """Whether it is a table and not packed data."""

    @property
    def has_groups(self) -> bool:
        """Whether samples have groups."""

    def __iter__(self) -> Iterator[DataPart]:
        """The parts in order."""


def index_sha256(index: ShardIndex) -> str:
    """What identifies packed data: a hash of its index, which has those of all shards."""
    return hashlib.sha256(index.model_dump_json().encode()).hexdigest()


class ShardParts:
    """Packed data; every shard is a part.

    Args:
        location: folder that `cmvae pack` wrote, or its URL.
        splits: splits to read.
        modalities: names of the modalities to read.
        batch_size: maximum number of samples per batch.

    Raises:
        UserError: a split, a modality or a shard is missing. While loading: a shard is damaged.
    """

    is_table = False

    def __init__(
        self, location: Location, splits: Sequence[str], modalities: Sequence[str], batch_size: int
    ) -> None:
        self._batch_size = batch_size
        self._readers = {split: SplitReader(location, split, modalities) for split in splits}
        index = ShardIndex.load(location)
        self.identity = {
            "index": index_sha256(index),
            "splits": list(splits),
            "modalities": list(modalities),
            "batch_size": batch_size,
        }
        self.num_samples: int | None = sum(index.split(split, location).num_samples for split in splits)

    @property
    def has_groups(self) -> bool:
        """Whether samples of any of the splits have groups."""
        return any(reader.has_groups for reader in self._readers.values())

    def __iter__(self) -> Iterator[DataPart]:
        numbers = itertools.count()
        for split, reader in self._readers.items():
            for shard in reader.shards:

                def load(reader: SplitReader = reader, shard: Any = shard) -> LoadedPart:
                    return LoadedPart(self._read(reader, shard), {})

                yield DataPart(next(numbers), split, shard.num_samples, load)

    def _read(self, reader: SplitReader, shard: Any) -> Iterator[Batch]:
        samples = map(reader.decode, reader.read_shard(shard))
        while batch := list(itertools.islice(samples, self._batch_size)):
            yield reader.collate(batch, np.ones(len(batch), dtype=bool))


class TableParts:
    """A table, CSV or Parquet; a part has `PART_ROWS` rows.

    Args:
        path: the table.
        schema: how its rows are read; columns of keys and groups are there.
        modalities: those to read; their columns are there.
        batch_size: maximum number of samples per batch.

    Raises:
        UserError: while reading: the file is damaged, or a cell cannot be read.
    """

    is_table = True
    num_samples: int | None = None

    def __init__(
        self, path: Path, schema: TableSchema, modalities: Mapping[str, Modality], batch_size: int
    ) -> None:
        self._path, self._schema, self._modalities, self._batch_size = path, schema, modalities, batch_size
        status = path.stat()
        self.identity = {
            "table": str(path.resolve()),
            "size": status.st_size,
            "modified": status.st_mtime_ns,
            "schema": schema.model_dump(mode="json"),
            "modalities": list(modalities),
            "part_rows": PART_ROWS,
            "batch_size": batch_size,
        }
        self.has_groups = schema.group is not None

    def __iter__(self) -> Iterator[DataPart]:
        empty = frozenset(["", *self._schema.na])
        tables = read_table_parts(self._path, self._schema.separator, empty, PART_ROWS)
        for number, table in enumerate(tables):

            def load(table: Table = table) -> LoadedPart:
                return self._load(table)

            yield DataPart(number, "", len(table.rows), load)

    def _load(self, table: Table) -> LoadedPart:
        values = read_rows(table, self._schema, self._modalities)
        unknown = {name: count_unknown(values[name], modality) for name, modality in self._modalities.items()}
        columns = {name: make_column(name, values[name], m) for name, m in self._modalities.items()}
        keys = row_keys(table, self._schema.key)
        groups = None if self._schema.group is None else table.column(self._schema.group)

        def batches() -> Iterator[Batch]:
            for start in range(0, len(keys), self._batch_size):
                rows = range(start, min(start + self._batch_size, len(keys)))
                stacked = stack_values([read_row(columns, row) for row in rows], self._modalities)
                batch: Batch = {**stacked, "key": keys[start : rows.stop]}
                if groups is not None:
                    batch["group_name"] = groups[start : rows.stop]
                yield batch

        return LoadedPart(batches(), unknown, table)
