"""Time jobs in turns (A B A B), each in its own process."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from cmvae.utils.errors import UserError
from cmvae.utils.progress import progress_bar

OWN_CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Variant:
    """One of the variants to compare."""

    title: str
    job: str
    """Name of the job, see `child`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    checkout: Path = OWN_CHECKOUT
    """Checkout whose code runs the job."""
    compared_with: str | None = None
    """Title of the variant whose rate is the unit of `times_as_fast`."""


@dataclass(frozen=True)
class Measured:
    """Measurements of one variant."""

    variant: Variant
    num_items: int
    """Number of samples or images per run."""
    seconds: list[float]
    """Wall time of each run."""
    facts: dict[str, Any]
    peak_memory_bytes: int
    data_wait_share: float | None = None
    """Median share of a run that waited for data; None if none was read."""

    @property
    def rates(self) -> list[float]:
        """Items per second of each run."""
        return [self.num_items / seconds for seconds in self.seconds]

    @property
    def median_seconds(self) -> float:
        """Median wall time of a run."""
        return statistics.median(self.seconds)

    @property
    def median_rate(self) -> float:
        """Median items per second."""
        return statistics.median(self.rates)

    @property
    def median_flops(self) -> float | None:
        """Floating-point operations per second; None if they were not counted."""
        flops = self.facts.get("flops")
        return None if flops is None else flops / self.median_seconds


def measure_in_turns(
    variants: Sequence[Variant], repeats: int, warm_up: int = 1, alone: bool = False
) -> list[Measured]:
    """Time every variant `repeats` times: the first run of each, then the second run of each, and so on.

    So other load on the machine affects all variants alike.

    Args:
        variants: the variants.
        repeats: timed runs of each.
        warm_up: runs of each before the timed ones.
        alone: time one variant after the other instead, where memory or reader processes of several variants
            would interfere.

    Raises:
        UserError: a job cannot be run, or its process died.
    """
    total = len(variants) * repeats
    with progress_bar(total=total, desc="runs", unit="run", leave=False) as progress:
        groups = [[variant] for variant in variants] if alone else [list(variants)]
        measured: list[Measured] = []
        for group in groups:
            children: list[_Child] = []
            try:
                for variant in group:
                    children.append(_Child(variant, warm_up))
                for _ in range(repeats):
                    for child in children:
                        child.run()
                        progress.update()
                measured += [child.end() for child in children]
            finally:
                for child in children:
                    child.kill()
    return measured


class _Child:
    """The process of one variant."""

    def __init__(self, variant: Variant, warm_up: int) -> None:
        self._variant = variant
        script = variant.checkout / "tools/benchmarks/child.py"
        self._process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(variant.checkout)},
        )
        self._requests = cast(IO[str], self._process.stdin)
        self._answers = cast(IO[str], self._process.stdout)
        self._runs: list[dict[str, float]] = []
        request = {"job": variant.job, "arguments": variant.arguments, "warm_up": warm_up}
        self._ask(json.dumps(request))

    def _ask(self, line: str) -> dict[str, Any]:
        try:
            self._requests.write(f"{line}\n")
            self._requests.flush()
        except BrokenPipeError:
            pass  # `_answer` reports why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            raise UserError(
                f"{self._variant.title}: its process ended with exit code {code}; see its output above"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(f"{self._variant.title}: {answer['error']}")
        return answer

    def run(self) -> None:
        """Time it once."""
        self._runs.append(self._ask("run"))

    def end(self) -> Measured:
        """End the process after its last run, and return its measurements."""
        self._requests.close()
        about = self._answer()
        shares = [run["data_wait_share"] for run in self._runs if "data_wait_share" in run]
        return Measured(
            self._variant,
            about["num_items"],
            [run["seconds"] for run in self._runs],
            about["facts"],
            about["peak_memory_bytes"],
            statistics.median(shares) if shares else None,
        )

    def kill(self) -> None:
        """Kill the process, if it still runs."""
        self._process.kill()
        self._process.wait()
