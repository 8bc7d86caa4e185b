"""Progress bars: samples a second and time left, on one rank only."""

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
    """A tqdm bar; in a log file, which has no use for ten lines a second, it draws four times a minute.

    Args:
        iterable: what it goes along, or None to be told by `update`.
        settings: of tqdm; `disable` on all ranks but the first.
    """
    if is_quiet():
        settings["disable"] = True
    return tqdm(iterable, mininterval=0.5 if sys.stderr.isatty() else 15, **settings)
