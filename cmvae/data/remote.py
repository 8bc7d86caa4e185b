"""Where a packed data set lies: a folder, or a URL, whose files are fetched once and kept on this machine.

A URL is what fsspec reads: `http(s)://`, `s3://`, `gs://` and others, never a command. A fetched file is
called by its SHA-256, which the index says: what is kept has been verified, and can never be the wrong
version. How much is kept, and where, is a matter of the machine, not of the experiment: see `Cache`.

Imports neither torch nor webdataset, and fsspec only for a URL.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Final

from cmvae.utils.errors import UserError
from cmvae.utils.files import sha256_of

Location = str | Path
"""A folder that `cmvae pack` wrote, or the URL of a copy of it."""

CACHE_VARIABLE: Final = "CMVAE_CACHE"
CACHE_GIGABYTES_VARIABLE: Final = "CMVAE_CACHE_GIGABYTES"
DEFAULT_CACHE: Final = "~/.cache/cmvae"
DEFAULT_CACHE_GIGABYTES: Final = 50.0

ATTEMPTS = 10
"""How often a file is asked for, three to four minutes in all, before a server counts as gone."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds between attempts: twice as many after each, with a random share on top."""
STALL_SECONDS = 60.0
"""A connection that brings nothing for so long is given up."""
MIN_BYTES_PER_SECOND = 10_000
"""So is one that, after `STALL_SECONDS`, has brought less than this on average."""
_ROOM_WAIT = 0.2

_URL = re.compile(r"[a-z][a-z0-9+.-]*://.+", re.IGNORECASE)
# HTTP answers in 4xx that may be others the next time: the request timed out, or there were too many.
_PASSING_REFUSALS = frozenset({408, 425, 429})
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EROFS, errno.EDQUOT})
_LOGGER = logging.getLogger(__name__)


class WrongContentError(UserError):
    """A server goes on sending something other than the index says."""

    def __init__(self, url: str, summary: str) -> None:
        super().__init__(f"{url}: cannot be used: {summary}. Copy the data set there again")
        self.summary = summary
        """Without the address and the advice."""


def is_remote(location: Location) -> bool:
    """Whether files of this location have to be fetched.

    Raises:
        UserError: it is a command.
    """
    text = str(location)
    if text.startswith("pipe:"):
        raise UserError(
            f"{text}: commands are not run for data. Give a folder, or a URL such as https://… or s3://…"
        )
    return _URL.fullmatch(text) is not None


def read_file(location: Location, name: str) -> bytes:
    """The content of a small file of a data set, fetched anew from a URL.

    Args:
        location: of the data set.
        name: of the file in it.

    Raises:
        FileNotFoundError: there is none.
        UserError: it cannot be fetched.
    """
    if not is_remote(location):
        return (Path(location) / name).read_bytes()
    url = _join(location, name)
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        # Servers may answer a whole request in part: an index that is cut is no JSON, which its reader tells.
        _persist(url, lambda: _transfer(url, path))
        return path.read_bytes()


def open_file(location: Location, name: str, *, num_bytes: int | None, sha256: str) -> BinaryIO:
    """A file of a data set, open for reading; from a URL it is fetched and verified, unless it is kept here.

    Args:
        location: of the data set.
        name: of the file in it.
        num_bytes: its size, for which room is made; None if it is small.
        sha256: what the index says. Of a local file it is not verified: `cmvae inspect` does that.

    Raises:
        FileNotFoundError: there is none.
        UserError: it cannot be fetched, is other than the index says, or does not fit on the disk.
    """
    if not is_remote(location):
        return (Path(location) / name).open("rb")
    return Cache.from_environment().open(_join(location, name), num_bytes or 0, sha256)


@dataclass(frozen=True)
class Cache:
    """Fetched files on this machine, shared by all processes, in a folder that never outgrows its bound.

    To make room, what was opened longest ago goes first. A process that has a file open keeps it to the end.
    """

    folder: Path
    max_bytes: int

    @classmethod
    def from_environment(cls) -> Cache:
        """As `CMVAE_CACHE` (a folder) and `CMVAE_CACHE_GIGABYTES` say.

        Raises:
            UserError: the second is no number above 0.
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
        """A file, open for reading; fetched and verified, if it is not here. Of many that ask, one fetches.

        Raises:
            FileNotFoundError: there is none.
            UserError: it cannot be fetched, has another checksum, or does not fit.
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
                f"{self.folder}: cannot keep {url}: {error.strerror or error}. Free some space there, or set "
                f"{CACHE_VARIABLE} to another folder"
            ) from error

    def _fetch(self, url: str, num_bytes: int, path: Path) -> None:
        if num_bytes > self.max_bytes:
            raise UserError(
                f"{url}: has {num_bytes:,} bytes, but the cache holds at most {self.max_bytes:,}. Set "
                f"{CACHE_GIGABYTES_VARIABLE} to more"
            )
        # The name says how much room is taken, before the file has grown to it.
        partial = path.with_name(f"{path.name}.{num_bytes}.partial")
        partial.unlink(missing_ok=True)  # of a process that was killed
        while not self._take_room(partial, num_bytes):
            time.sleep(_ROOM_WAIT)
        try:
            _persist(url, lambda: _download(url, partial, expected=path.name))
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _take_room(self, partial: Path, num_bytes: int) -> bool:
        """Delete files until there is room for `partial`, and let it stand for that room.

        Returns:
            False if all that is left belongs to processes that fetch or open it at this moment.
        """
        with self._lock("room"):
            held = {path: _room_of(path) for path in self.folder.iterdir() if path.is_file()}
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
        """Delete a file, unless a process has its lock. What a killed process left of one goes, too."""
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

        # Not one object a process: a thread or a fork that has it must not let another one in.
        return FileLock(self._locks / name, timeout=timeout, is_singleton=False)


def _room_of(path: Path) -> tuple[int, float]:
    """Bytes that a file takes or will take, and when it was opened last."""
    try:
        status = path.stat()
    except FileNotFoundError:  # renamed or deleted meanwhile
        return 0, 0.0
    reserved = int(path.name.split(".")[1]) if path.suffix == ".partial" else 0
    return max(reserved, status.st_size), status.st_mtime


class _SlowError(Exception):
    """So little arrives that another attempt is worth more."""


def _join(location: Location, name: str) -> str:
    return f"{str(location).rstrip('/')}/{name}"


def _filesystem(url: str) -> Any:
    """What fsspec reads a URL with.

    Raises:
        UserError: it has nothing for it, or not all that it takes is installed.
    """
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0].lower()
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
        # Proxies and passwords as other programs find them: HTTPS_PROXY, ~/.netrc.
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    elif protocol in ("s3", "s3a"):
        # s3fs tries again by itself, so that botocore need not.
        timeouts = {"connect_timeout": STALL_SECONDS, "read_timeout": STALL_SECONDS}
        options = {"config_kwargs": {**timeouts, "retries": {"max_attempts": 0}}}
    try:
        # fsspec would keep connections for later. A fork that inherits one closes it for its parent, too, and
        # who asks next waits for an answer until STALL_SECONDS are over.
        return url_to_fs(url, skip_instance_cache=True, **options)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}. Mend the URL, or install what is missing") from error


def _transfer(url: str, path: Path) -> None:
    """Copy a file to this machine.

    Raises:
        _SlowError: it came too slowly.
    """
    from fsspec.callbacks import Callback

    class Watch(Callback):
        """Gives up what trickles: no timeout between two bytes ever ends that."""

        began = time.monotonic()

        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            seconds = time.monotonic() - self.began
            if seconds > STALL_SECONDS and self.value < MIN_BYTES_PER_SECOND * seconds:
                raise _SlowError(f"only {self.value:,} bytes came in {seconds:.0f} s")

    _filesystem(url).get_file(url, str(path), callback=Watch())


def _download(url: str, partial: Path, expected: str) -> None:
    """Fetch a file and compare it with its checksum.

    Raises:
        WrongContentError: it is another.
        _SlowError: it came too slowly.
    """
    _transfer(url, partial)
    found = sha256_of(partial)
    if found != expected:
        raise WrongContentError(
            url,
            f"{partial.stat().st_size:,} bytes came, whose SHA-256 is {found}, where the index says "
            f"{expected}",
        )


def _persist(url: str, attempt: Callable[[], None]) -> None:
    """Try until it succeeds, waiting longer and longer.

    Raises:
        FileNotFoundError: the server says that there is no such file.
        UserError: it never did, or the server says that it never will.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

    def log(state: Any) -> None:
        wait, error = state.next_action.sleep, state.outcome.exception()
        reason = error.summary if isinstance(error, WrongContentError) else _words(error)
        _LOGGER.warning("%s: %s; next attempt in %.0f s", url, reason, wait)

    retrying = Retrying(
        retry=retry_if_exception(_is_passing),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential_jitter(initial=FIRST_WAIT, max=LONGEST_WAIT),
        before_sleep=log,
        reraise=True,
    )
    try:
        retrying(attempt)
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:
        if _is_local(error):
            raise
        raise UserError(
            f"{url}: cannot be fetched: {_words(error)}. Look whether the server is there and lets you in; "
            "a training goes on with --resume"
        ) from error


def _is_passing(error: BaseException) -> bool:
    """Whether another attempt may succeed. Libraries of object stores have errors of their own kinds."""
    if isinstance(error, WrongContentError):
        return True  # a proxy, say, that cuts what it hands on
    if isinstance(error, UserError | FileNotFoundError | PermissionError) or _is_local(error):
        return False
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _PASSING_REFUSALS
    return isinstance(error, Exception) and not refused


def _is_local(error: BaseException) -> bool:
    """Whether it is about this machine's disk: only such errors name a file."""
    return isinstance(error, OSError) and (error.filename is not None or error.errno in _DISK_ERRORS)


def _words(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
