"""Outputs that a run can do without: a failure is a warning."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_LOGGER = logging.getLogger(__name__)


def attempt(what: str, make: Callable[[], T], *, raised: tuple[type[Exception], ...] = ()) -> T | None:
    """What `make` returns; None, and a warning that names `what`, if it fails.

    For figures and texts: neither the names in the data nor a font or a library may end a training or an
    evaluation.

    Args:
        what: what is made, for the warning.
        make: makes it.
        raised: exceptions that are raised all the same.
    """
    try:
        return make()
    except raised:
        raise
    except Exception as error:
        message = str(error).partition("\n")[0]
        _LOGGER.warning("%s: failed (%s: %s); left out", what, type(error).__name__, message)
        return None
