"""Atomic writes: files and folders are written under another name, flushed to disk and renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from cmvae.utils.errors import UserError


def write_whole(path: Path, content: bytes, *, token: str = "") -> None:
    """Write a file atomically: readers see the old or the new content, also after a crash.

    See `whole_file` for `token`.
    """
    with whole_file(path, token=token) as file:
        file.write(content)


@contextmanager
def whole_file(path: Path, *, token: str = "") -> Iterator[BinaryIO]:
    """Write a file atomically in pieces: it appears at `path` when the block ends without an error.

    Args:
        path: the file.
        token: differs between processes that may write the same file at the same time; the last one wins.

    Yields the file to write into.
    """
    partial = path.with_name(f".{path.name}{token}.partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Write a folder atomically: it appears at `path` when the block ends without an error.

    Yields the folder to write into. An existing folder at `path` is replaced. The next call removes what a
    killed process left behind.
    """
    partial, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    for leftover in (partial, old):
        shutil.rmtree(leftover, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    publish_folder(partial, path)


def holds_earlier_output(folder: Path, record_name: str) -> bool:
    """Whether a folder that would be replaced holds earlier output of the same command.

    Args:
        folder: the argument of `--out`.
        record_name: a file that this command always writes into the folder.

    Returns:
        True if it holds earlier output, False if it is empty or does not exist.

    Raises:
        UserError: it holds something else, which would be deleted.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / record_name).is_file():
        raise UserError(f"--out {folder}: exists and was not written by this command. Choose another folder")
    return True


def publish_folder(partial: Path, path: Path) -> None:
    """Flush everything in `partial` to disk and rename it to `path`, replacing an existing folder."""
    for entry in partial.rglob("*"):
        if entry.is_file():
            sync_file(entry)
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
    """Delete a folder atomically: it is renamed to `.NAME.deleted` first, which an interruption may leave."""
    doomed = path.with_name(f".{path.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    # Files that cannot be deleted now, for example because they are open elsewhere on NFS, are left.
    shutil.rmtree(doomed, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Flush the content of a file to disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder to disk, so that a rename in it survives a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
