"""Files and folders that are whole or absent: written beside, flushed to the disk, renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmvae.utils.errors import UserError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Fill a folder that appears under `path` only when the block ends without an error.

    Yields the folder to write into. A folder that is already at `path` is replaced. What a killed process
    left behind is removed by the next call.
    """
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    publish_folder(partial, path)


def holds_earlier(folder: Path, record_name: str, contents: str) -> bool:
    """Whether a folder to be replaced whole holds an earlier one of its kind; false if it is empty.

    Args:
        folder: what the user named as `--out`.
        record_name: the file that only a folder of this kind has.
        contents: what such a folder holds, for the message.

    Raises:
        UserError: it holds something else, which replacing would delete.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / record_name).is_file():
        raise UserError(f"--out {folder}: holds other things than {contents}. Give another folder")
    return True


def publish_folder(partial: Path, path: Path) -> None:
    """Flush everything in `partial` to the disk and give it the name `path`."""
    for entry in partial.rglob("*"):
        if entry.is_file():
            with entry.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(entry)
    sync_folder(partial)
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        path.rename(old)
    partial.rename(path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder that, should the deletion be interrupted, is gone all the same, and not half there.

    What an interrupted deletion leaves has the name `.NAME.deleted`.
    """
    doomed = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    # What cannot be deleted now, as a file open elsewhere on NFS, is no reason to stop.
    shutil.rmtree(doomed, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """The checksum of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Flush a folder's entries, so that a rename in it outlasts a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
