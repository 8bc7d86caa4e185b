"""Progress bars."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> tqdm:
    """A tqdm bar that is drawn twice per second in a terminal and four times per minute in a log file.

    Args:
        iterable: iterable to wrap; None to call `update` instead.
        settings: arguments of tqdm. Set `disable` on all ranks but rank 0.
    """
    return tqdm(iterable, mininterval=0.5 if sys.stderr.isatty() else 15, **settings)
