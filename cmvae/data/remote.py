"""Location of a packed data set: a folder, or a URL whose files are downloaded once and cached here.

A cached file is named by its SHA-256 from the index, so it is verified and never of another version. Size and
place of the cache are settings of the machine, not of the experiment; see `Cache`.

This module imports neither torch nor webdataset.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Final

from cmvae.data.download import download
from cmvae.utils.errors import UserError

Location = str | Path
"""A folder that `cmvae pack` wrote, or the URL of a copy of it."""

CACHE_VARIABLE: Final = "CMVAE_CACHE"
CACHE_GIGABYTES_VARIABLE: Final = "CMVAE_CACHE_GIGABYTES"
DEFAULT_CACHE: Final = "~/.cache/cmvae"
DEFAULT_CACHE_GIGABYTES: Final = 50.0

_URL = re.compile(r"[a-z][a-z0-9+.-]*://.+", re.IGNORECASE)
_ROOM_WAIT = 0.2
"""Seconds between two checks for free space in the cache."""


def is_remote(location: Location) -> bool:
    """Whether files at this location must be downloaded.

    Raises:
        UserError: the location is a command (`pipe:`), which WebDataset would run.
    """
    text = str(location)
    if text.startswith("pipe:"):
        raise UserError(
            f"{text}: commands are not run to read data. Give a folder, or a URL such as https://… or s3://…"
        )
    return _URL.fullmatch(text) is not None


def read_file(location: Location, name: str) -> bytes:
    """Read a small file of a data set; from a URL it is downloaded every time.

    Args:
        location: location of the data set.
        name: name of the file.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file cannot be downloaded.
    """
    if not is_remote(location):
        return (Path(location) / name).read_bytes()
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        # A server may send a part of the file as if it were all. A truncated index is no valid JSON.
        download(_join(location, name), path)
        return path.read_bytes()


def open_file(location: Location, name: str, *, num_bytes: int | None, sha256: str) -> BinaryIO:
    """Open a file of a data set for reading; from a URL it is downloaded and verified unless it is cached.

    Args:
        location: location of the data set.
        name: name of the file.
        num_bytes: size of the file, for which the cache makes room; None for a small file.
        sha256: checksum from the index. Local files are not verified; `cmvae inspect` does that.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: the file cannot be downloaded, has another checksum, or does not fit on the disk.
    """
    if not is_remote(location):
        return (Path(location) / name).open("rb")
    return Cache.from_environment().open(_join(location, name), num_bytes or 0, sha256)


@dataclass(frozen=True)
class Cache:
    """Downloaded files in a folder of limited size, shared by all processes of this machine.

    The least recently opened files are deleted to make room. A process that has a deleted file open can read
    it to the end.
    """

    folder: Path
    max_bytes: int

    @classmethod
    def from_environment(cls) -> Cache:
        """The cache that `CMVAE_CACHE` (a folder) and `CMVAE_CACHE_GIGABYTES` define.

        Raises:
            UserError: `CMVAE_CACHE_GIGABYTES` is not a positive number.
        """
        text = os.environ.get(CACHE_GIGABYTES_VARIABLE, str(DEFAULT_CACHE_GIGABYTES))
        try:
            gigabytes = float(text)
        except ValueError:
            gigabytes = 0
        if not gigabytes > 0:
            raise UserError(f"{CACHE_GIGABYTES_VARIABLE}={text}: must be a number above 0")
        folder = Path(os.environ.get(CACHE_VARIABLE) or DEFAULT_CACHE).expanduser()
        return cls(folder, int(gigabytes * 1e9))

    def open(self, url: str, num_bytes: int, sha256: str) -> BinaryIO:
        """Open a file for reading; if it is not cached, one of the processes that ask for it downloads it.

        Args:
            url: URL of the file.
            num_bytes: its size.
            sha256: its checksum.

        Raises:
            FileNotFoundError: there is no such file.
            UserError: the file cannot be downloaded, has another checksum, or does not fit.
        """
        path = self.folder / sha256
        try:
            self._locks.mkdir(parents=True, exist_ok=True)
            with self._lock(sha256):
                if not path.is_file():
                    self._fetch(url, num_bytes, path)
                os.utime(path)
                return path.open("rb")
        except OSError as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise UserError(
                f"{self.folder}: cannot store {url}: {error.strerror or error}. Free some space there, or "
                f"set {CACHE_VARIABLE} to another folder"
            ) from error

    def _fetch(self, url: str, num_bytes: int, path: Path) -> None:
        if num_bytes > self.max_bytes:
            raise UserError(
                f"{url}: has {num_bytes:,} bytes, but the cache holds at most {self.max_bytes:,}. Set "
                f"{CACHE_GIGABYTES_VARIABLE} to more"
            )
        # The name reserves the space before the file has grown to its size.
        partial = path.with_name(f"{path.name}.{num_bytes}.partial")
        partial.unlink(missing_ok=True)  # left by a killed process
        while not self._reserve(partial, num_bytes):
            time.sleep(_ROOM_WAIT)
        try:
            download(url, partial, sha256=path.name)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _reserve(self, partial: Path, num_bytes: int) -> bool:
        """Delete files until there is room for `partial`, and create it.

        Returns:
            False if other processes are downloading or opening all files that remain.
        """
        with self._lock("room"):
            held = {path: _size_and_time(path) for path in self.folder.iterdir() if path.is_file()}
            total = sum(size for size, _ in held.values())
            for path, (size, _) in sorted(held.items(), key=lambda entry: entry[1][1]):
                if total + num_bytes <= self.max_bytes:
                    break
                total -= size if self._delete(path) else 0
            if total + num_bytes > self.max_bytes:
                return False
            partial.touch()
            return True

    def _delete(self, path: Path) -> bool:
        """Delete a file, or what a killed process left of it, unless another process holds its lock."""
        from filelock import Timeout

        try:
            with self._lock(path.name.partition(".")[0], timeout=0):
                path.unlink(missing_ok=True)
                return True
        except Timeout:
            return False

    @property
    def _locks(self) -> Path:
        return self.folder / "locks"

    def _lock(self, name: str, timeout: float = -1) -> Any:
        from filelock import FileLock

        # Not a singleton per process: the lock must exclude other threads and forks, too.
        return FileLock(self._locks / name, timeout=timeout, is_singleton=False)


def _size_and_time(path: Path) -> tuple[int, float]:
    """Number of bytes that a file takes or has reserved, and the time when it was last opened."""
    try:
        status = path.stat()
    except FileNotFoundError:  # renamed or deleted meanwhile
        return 0, 0.0
    reserved = int(path.name.split(".")[1]) if path.suffix == ".partial" else 0
    return max(reserved, status.st_size), status.st_mtime


def _join(location: Location, name: str) -> str:
    return f"{str(location).rstrip('/')}/{name}"
