"""Download a file from a URL, with retries, a limit on stalls and a checksum.

A URL is anything that fsspec reads: `http(s)://`, `s3://`, `gs://` and others. fsspec is imported when the
first file is downloaded.
"""

from __future__ import annotations

import errno
import logging
import time
from pathlib import Path
from typing import Any

from cmvae.utils.errors import UserError
from cmvae.utils.files import sha256_of

ATTEMPTS = 10
"""Attempts per file; with the waits between them, three to four minutes."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds between attempts: doubled after each attempt, plus a random part."""
STALL_SECONDS = 60.0
"""An attempt ends if no byte arrives for this long."""
MIN_BYTES_PER_SECOND = 10_000
"""An attempt also ends if, after `STALL_SECONDS`, the average rate is lower."""

# HTTP 4xx answers that are worth another attempt: timeout, too early, too many requests.
_RETRIED_STATUS = frozenset({408, 425, 429})
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EROFS, errno.EDQUOT})
_LOGGER = logging.getLogger(__name__)


class DownloadError(UserError):
    """A file cannot be downloaded, after all attempts or because another attempt would not help."""

    remedy = "Check that the server is available and grants access; to continue a training, add --resume"

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(f"{url}: cannot be fetched: {reason}. {self.remedy}")
        self.reason = reason
        """The message without URL and remedy."""


class WrongContentError(DownloadError):
    """The server has another content than the index says."""

    remedy = "Copy the data set there again"


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    attempts: int | None = None,
    show_progress: bool = False,
) -> None:
    """Download a file; an interrupted call leaves an incomplete file at `path`.

    Args:
        url: URL of the file.
        path: local path; an existing file is overwritten.
        sha256: expected checksum; None accepts any content.
        attempts: maximum number of attempts; None is `ATTEMPTS`.
        show_progress: show a progress bar.

    Raises:
        FileNotFoundError: the server has no such file.
        DownloadError: the file cannot be downloaded.
        WrongContentError: it has another checksum in every attempt.
        UserError: fsspec does not support the URL, or needs a package that is not installed.
        OSError: `path` cannot be written.
    """
    from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential_jitter

    def attempt() -> None:
        _transfer(url, path, show_progress)
        if sha256 is not None and (found := sha256_of(path)) != sha256:
            size = path.stat().st_size
            raise WrongContentError(
                url, f"received {size:,} bytes with SHA-256 {found}, but the index says {sha256}"
            )

    def log(state: Any) -> None:
        reason = _reason(state.outcome.exception())
        _LOGGER.warning("%s: %s; next attempt in %.0f s", url, reason, state.next_action.sleep)

    retrying = Retrying(
        retry=retry_if_exception(_is_worth_a_retry),
        stop=stop_after_attempt(attempts if attempts is not None else ATTEMPTS),
        wait=wait_exponential_jitter(initial=FIRST_WAIT, max=LONGEST_WAIT),
        before_sleep=log,
        reraise=True,
    )
    try:
        retrying(attempt)
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # libraries of object stores have their own exceptions
        if _is_local(error):
            raise
        raise DownloadError(url, _reason(error)) from error


class _SlowError(Exception):
    """An attempt is so slow that another one is worth more."""


def _transfer(url: str, path: Path, show_progress: bool) -> None:
    """Copy a file to this machine in one attempt."""
    from fsspec.callbacks import TqdmCallback

    class Watch(TqdmCallback):
        """Ends a transfer that trickles, which no timeout between two bytes does."""

        began = time.monotonic()

        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            seconds = time.monotonic() - self.began
            if seconds > STALL_SECONDS and self.value < MIN_BYTES_PER_SECOND * seconds:
                raise _SlowError(f"received only {self.value:,} bytes in {seconds:.0f} s")

    bar = {"desc": path.name, "unit": "B", "unit_scale": True, "disable": not show_progress}
    with Watch(tqdm_kwargs=bar) as watch:
        _filesystem(url).get_file(url, str(path), callback=watch)


def _filesystem(url: str) -> Any:
    """The fsspec file system of a URL."""
    from fsspec.core import url_to_fs

    protocol = url.partition("://")[0].lower()
    options: dict[str, Any] = {}
    if protocol in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=STALL_SECONDS, sock_read=STALL_SECONDS)
        # Proxies and passwords are taken from HTTPS_PROXY and ~/.netrc, as by other programs.
        options = {"client_kwargs": {"timeout": timeout, "trust_env": True}}
    elif protocol in ("s3", "s3a"):
        # s3fs retries by itself, so botocore need not.
        timeouts = {"connect_timeout": STALL_SECONDS, "read_timeout": STALL_SECONDS}
        options = {"config_kwargs": {**timeouts, "retries": {"max_attempts": 0}}}
    try:
        # fsspec would reuse connections. A forked process that inherits one closes it for its parent, too,
        # and the next request then waits until STALL_SECONDS have passed.
        return url_to_fs(url, skip_instance_cache=True, **options)[0]
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {error}. Correct the URL, or install the missing package") from error


def _is_worth_a_retry(error: BaseException) -> bool:
    if isinstance(error, WrongContentError):
        return True  # for example, a proxy truncated the file
    if isinstance(error, UserError | FileNotFoundError | PermissionError) or _is_local(error):
        return False
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in _RETRIED_STATUS
    return isinstance(error, Exception) and not refused


def _is_local(error: BaseException) -> bool:
    """Whether the error is about the disk of this machine: only such errors name a file."""
    return isinstance(error, OSError) and (error.filename is not None or error.errno in _DISK_ERRORS)


def _reason(error: BaseException) -> str:
    if isinstance(error, DownloadError):
        return error.reason
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
