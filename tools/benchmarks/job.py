"""What can be timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Job:
    """Something that is done again and again, and timed each time."""

    run: Callable[[], None]
    """Do it once; it need not wait for a GPU."""
    num_items: int
    """How many samples or images one run is about."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else is worth knowing, when all runs are done; `flops` are the operations of one run."""
    waited: Callable[[], float] | None = None
    """Seconds that the last run waited for data, if it reads any."""
    afterwards: Callable[[], dict[str, Any]] | None = None
    """More facts, from what would take time and memory itself: asked for once, when both are measured."""

    def measure(self) -> dict[str, float]:
        """Run once: `seconds` of wall time, and `data_wait_share` if data is read."""
        started = now()
        self.run()
        seconds = now() - started
        measured = {"seconds": seconds}
        if self.waited is not None:
            measured["data_wait_share"] = self.waited() / seconds
        return measured


def now() -> float:
    """Seconds, when all that was asked of a GPU is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
