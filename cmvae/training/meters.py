"""What is measured between two points of the training curves, and the damaged samples that were skipped."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from cmvae.utils.errors import UserError

_LOGGER = logging.getLogger(__name__)


class Meter:
    """Means of the report, throughput, and the share of the time spent waiting for data."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._sums: Tensor | float = 0.0
        self._names: list[str] = []
        self._batches = 0
        self._samples = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time that the block takes as time spent waiting for data."""
        started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - started

    def add(self, report: Mapping[str, Tensor], num_samples: int) -> None:
        """Count one batch.

        Args:
            report: the terms of the task, (B,) each.
            num_samples: number of samples in the batch, over all ranks.
        """
        if self._names != list(report):
            # A phase with other terms began: the means start again.
            self._sums, self._names, self._batches = 0.0, list(report), 0
        self._sums = self._sums + torch.stack([values.mean() for values in report.values()])
        self._batches += 1
        self._samples += num_samples

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the means over all ranks since the last call and reset; must be called on all ranks."""
        seconds = time.perf_counter() - self._started
        means = accelerator.reduce(self._sums / self._batches, "mean").tolist()
        readings = dict(zip(self._names, means, strict=True))
        readings["samples_per_second"] = self._samples / seconds
        readings["data_wait_share"] = self._waited / seconds
        if accelerator.device.type == "cuda":
            readings["gpu_memory_gib"] = self._peak_memory(accelerator)
        self._restart()
        return readings

    @staticmethod
    def _peak_memory(accelerator: Accelerator) -> float:
        """Peak memory of tensors in GiB on the GPU that used most; resets the peak."""
        peak = torch.tensor([torch.cuda.max_memory_allocated()], device=accelerator.device)
        torch.cuda.reset_peak_memory_stats()
        return float(accelerator.gather(peak).max()) / 2**30


class SkippedSamples:
    """Counts the damaged samples that all ranks skipped in one pass over a split.

    Args:
        limit: more than this many are an error.
    """

    def __init__(self, limit: int) -> None:
        self.count = 0
        self._limit = limit
        self._logged: set[str] = set()

    def begin_epoch(self) -> None:
        """Reset the count: every epoch skips the same samples again."""
        self.count = 0

    def add(self, accelerator: Accelerator, problems: Sequence[str]) -> None:
        """Count the samples that were skipped in a batch; must be called on all ranks.

        Args:
            accelerator: the ranks.
            problems: what is wrong with each skipped sample of this rank; each is logged once.

        Raises:
            UserError: on all ranks, if there are more than the limit.
        """
        self._log(problems)
        number = torch.tensor(len(problems), device=accelerator.device)
        self._count(int(accelerator.reduce(number, "sum")))

    def _log(self, problems: Sequence[str]) -> None:
        for problem in problems:
            if problem not in self._logged:
                _LOGGER.warning("skipped a sample: %s", problem)
            self._logged.add(problem)

    def _count(self, number: int) -> None:
        self.count += number
        if self.count > self._limit:
            raise UserError(
                f"data.max_skipped: {self.count} damaged samples were skipped, at most {self._limit} are "
                "allowed. The log names them. Copy or pack the data set again, or increase "
                "data.max_skipped, then continue with --resume"
            )
