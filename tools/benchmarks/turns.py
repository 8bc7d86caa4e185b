"""Jobs that are timed in turns, A B A B, each in a process of its own."""

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
    """One of the things to be compared."""

    title: str
    job: str
    """Its name, see `child`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    checkout: Path = OWN_CHECKOUT
    """Whose `cmvae` does it."""
    compared_with: str | None = None
    """Title of the variant whose rate its own is told in multiples of."""


@dataclass(frozen=True)
class Measured:
    """What became of one variant."""

    variant: Variant
    num_items: int
    """Samples or images of one run."""
    seconds: list[float]
    """Of each run."""
    facts: dict[str, Any]
    peak_memory_bytes: int
    data_wait_share: float | None = None
    """Median share of a run that waited for data, where any was read."""

    @property
    def rates(self) -> list[float]:
        """Items a second, of each run."""
        return [self.num_items / seconds for seconds in self.seconds]

    @property
    def median_seconds(self) -> float:
        """Of a run."""
        return statistics.median(self.seconds)

    @property
    def median_rate(self) -> float:
        """Items a second."""
        return statistics.median(self.rates)

    @property
    def median_flops(self) -> float | None:
        """Floating-point operations a second, if they were counted."""
        flops = self.facts.get("flops")
        return None if flops is None else flops / self.median_seconds


def measure_in_turns(
    variants: Sequence[Variant], repeats: int, warm_up: int = 1, alone: bool = False
) -> list[Measured]:
    """Time every variant `repeats` times: the first of each, then the second of each, and so on.

    Whatever else the machine does then falls on all of them alike.

    Args:
        variants: what to time.
        repeats: runs of each.
        warm_up: runs before the first that counts.
        alone: one variant after the other instead: where memory or reader processes of several would be in
            each other's way.

    Raises:
        UserError: a job cannot be done, or its process died.
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
            pass  # the answer, or that there is none, says why
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self._answers.readline()
        if not line:
            code = self._process.wait()
            raise UserError(f"{self._variant.title}: its process ended with code {code}; see above")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(f"{self._variant.title}: {answer['error']}")
        return answer

    def run(self) -> None:
        """Time it once."""
        self._runs.append(self._ask("run"))

    def end(self) -> Measured:
        """What it measured, when all is done."""
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
        """End it, whatever it is doing."""
        self._process.kill()
        self._process.wait()
