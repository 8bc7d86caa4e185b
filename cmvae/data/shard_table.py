"""The shards of a large split, one file of columns that is mapped into memory instead of parsed.

`index.json` lists the shards of small splits. A million shards would take seconds and a gigabyte there; here
a process touches the column of sample counts, 4 bytes per shard, and the rows of the shards that it opens.

This module imports neither torch nor webdataset.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from pydantic import ValidationError

from cmvae.data.index import ShardSchema, ShardTableSchema, SplitSchema
from cmvae.data.remote import Location, open_file
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole

# Bytes per shard of the columns before that of the names.
_FIXED_WIDTH = 4 + 8 + 32


class ShardTable(Sequence[ShardSchema]):
    """The shards of a split, each made when it is asked for.

    Args:
        schema: entry of the file in the index.
        location: location of the data set.

    Raises:
        UserError: the file is missing, cannot be downloaded, or is not the one of the index.
    """

    def __init__(self, schema: ShardTableSchema, location: Location) -> None:
        self._path = f"{location}/{schema.name}"
        try:
            with open_file(location, schema.name, num_bytes=schema.num_bytes, sha256=schema.sha256) as file:
                self._columns = np.memmap(file, _columns(schema), mode="r", shape=(1,))[0]
        except FileNotFoundError as error:
            raise self._damaged("missing, but the index mentions it") from error
        except ValueError as error:
            raise self._damaged(f"has not the {schema.num_bytes} bytes of its index") from error
        self.num_samples: np.ndarray = self._columns["num_samples"]
        """Number of samples of each shard, (num_shards,) uint32."""
        if not self.num_samples.all():
            raise self._damaged("has a shard without samples")

    def __len__(self) -> int:
        return len(self.num_samples)

    @overload
    def __getitem__(self, number: int) -> ShardSchema: ...
    @overload
    def __getitem__(self, number: slice) -> list[ShardSchema]: ...
    def __getitem__(self, number: int | slice) -> ShardSchema | list[ShardSchema]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        row = {name: self._columns[name][number] for name in self._columns.dtype.names}
        try:
            return ShardSchema(
                name=row["name"].decode("ascii", "replace"),
                num_samples=int(row["num_samples"]),
                num_bytes=int(row["num_bytes"]),
                sha256=row["sha256"].tobytes().hex(),
            )
        except ValidationError as error:
            raise self._damaged(f"shard {number}: {error.errors()[0]['msg']}") from error

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self._path}: {what}. Copy it again, or pack the data set again")


def open_shards(split: SplitSchema, location: Location) -> Sequence[ShardSchema]:
    """The shards of a split, from the index or from the file that it mentions.

    Raises:
        UserError: the file is missing, damaged, or has another number of samples.
    """
    if split.shard_table is None:
        return split.shards
    table = ShardTable(split.shard_table, location)
    if (total := int(table.num_samples.sum(dtype=np.int64))) != split.num_samples:
        raise UserError(
            f"{location}/{split.shard_table.name}: its shards have {total} samples, but the index says "
            f"{split.num_samples}. Copy both again, or pack the data set again"
        )
    return table


def write_shard_table(path: Path, shards: Sequence[ShardSchema]) -> ShardTableSchema:
    """Write the shards of a split to a file.

    Args:
        path: path of the file, in the folder of the index.
        shards: the shards, in order.

    Returns:
        Its entry in the index.
    """
    names = np.array([shard.name.encode() for shard in shards])
    columns = [
        np.array([shard.num_samples for shard in shards], "<u4"),
        np.array([shard.num_bytes for shard in shards], "<u8"),
        np.frombuffer(bytes.fromhex("".join(shard.sha256 for shard in shards)), np.uint8),
        names,
    ]
    content = b"".join(column.tobytes() for column in columns)
    write_whole(path, content)
    return ShardTableSchema(
        name=path.name,
        num_shards=len(shards),
        shard_bytes=sum(shard.num_bytes for shard in shards),
        num_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _columns(schema: ShardTableSchema) -> np.dtype:
    """All columns as one record; the names are as long as the rest of the file allows."""
    count = schema.num_shards
    name_width, rest = divmod(schema.num_bytes - _FIXED_WIDTH * count, count)
    if rest or name_width < 1:
        raise ValueError(f"{schema.num_bytes} bytes are no table of {count} shards")
    return np.dtype(
        [
            ("num_samples", "<u4", (count,)),
            ("num_bytes", "<u8", (count,)),
            ("sha256", "u1", (count, 32)),
            ("name", f"S{name_width}", (count,)),
        ]
    )
