"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

_QUIET: ContextVar[bool] = ContextVar("quiet", default=False)


def is_quiet() -> bool:
    """Whether progress is not to be shown, see `quiet`."""
    return _QUIET.get()


@contextmanager
def quiet(is_quiet: bool = True) -> Iterator[None]:
    """Show no progress within the block."""
    token = _QUIET.set(is_quiet)
    try:
        yield
    finally:
        _QUIET.reset(token)


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> tqdm:
    """A tqdm bar that is drawn twice per second in a terminal and four times per minute in a log file.

    Args:
        iterable: iterable to wrap; None to call `update` instead.
        settings: arguments of tqdm. Set `disable` on all ranks but rank 0.
    """
    if is_quiet():
        settings["disable"] = True
    return tqdm(iterable, mininterval=0.5 if sys.stderr.isatty() else 15, **settings)
