"""Progress bars: samples a second and time left, on one rank only."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(iterable: Iterable[Any] | None = None, **settings: Any) -> tqdm:
    """A tqdm bar; in a log file, which has no use for ten lines a second, it draws four times a minute.

    Args:
        iterable: what it goes along, or None to be told by `update`.
        settings: of tqdm; `disable` on all ranks but the first.
    """
    return tqdm(iterable, mininterval=0.5 if sys.stderr.isatty() else 15, **settings)
