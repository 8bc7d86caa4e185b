"""A fixture for folders of shards that the reader's own writer had no hand in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from handmade_shards import members_of, write_index, write_tar


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of shards; sample number i has key `k{i:05d}` and the pixels `picture(i, …)`.

    `change` may replace the members of a shard, a list of (name, content), before they are written.
    """

    def make(sizes: Sequence[int], split: str = "train", change: Callable | None = None) -> Path:
        first = 0
        for number, size in enumerate(sizes):
            members = [
                (f"k{i:05d}.{suffix}", content)
                for i in range(first, first + size)
                for suffix, content in members_of(i).items()
            ]
            first += size
            if change is not None:
                members = change(members)
            write_tar(tmp_path / f"{split}-{number}.tar", members)
        write_index(tmp_path, split, sizes)
        return tmp_path

    return make
