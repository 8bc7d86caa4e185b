"""A task that can be timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Job:
    """A task that is run and timed repeatedly."""

    run: Callable[[], None]
    """Run it once; need not wait for a GPU."""
    num_items: int
    """Number of samples or images per run."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further results, read after all runs; `flops` is the number of operations per run."""
    waited: Callable[[], float] | None = None
    """Seconds that the last run waited for data; None if it reads none."""
    afterwards: Callable[[], dict[str, Any]] | None = None
    """Further facts that take time and memory to compute: called once, after all measurements."""

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
    """Seconds, after a GPU has finished all its work."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()
