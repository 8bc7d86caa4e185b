"""Errors that the user can fix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

MAX_PROBLEMS = 20
"""Number of problems that are named at once."""


class UserError(Exception):
    """An error that the user can fix. The message says what is wrong, where, and what to do.

    Commands print the message without a traceback and exit with code 2.
    """

    problems: Sequence[str] = ()
    """All problems, if the message is about several."""


class Problems:
    """Collects errors, so that all of them are reported at once."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Keep an error of the block instead of raising it."""
        try:
            yield
        except UserError as error:
            self._messages += error.problems or [str(error)]

    def raise_all(self) -> None:
        """See `raise_all`."""
        raise_all(dict.fromkeys(self._messages))


def raise_all(problems: Iterable[str]) -> None:
    """Raise one error for several problems, one per line; nothing happens if there are none.

    Raises:
        UserError: there are problems. The first `MAX_PROBLEMS` are named.
    """
    found = list(problems)
    if found:
        more = len(found) - MAX_PROBLEMS
        error = UserError("\n".join(found[:MAX_PROBLEMS] + ([f"... and {more:,} more"] if more > 0 else [])))
        error.problems = found
        raise error
