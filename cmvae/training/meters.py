"""What is measured between two points of the training curves."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from torch import Tensor


class Meter:
    """Means of the report, throughput and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._sums: Tensor | float = 0.0
        self._names: list[str] = []
        self._batches = 0
        self._samples = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def add(self, report: Mapping[str, Tensor], num_samples: int, waited: float) -> None:
        """Count one batch.

        Args:
            report: the task's terms, (B,) each.
            num_samples: samples of the batch over all ranks.
            waited: seconds that this rank waited for the batch.
        """
        if self._names != list(report):
            # A phase with other terms began: what came before is no part of its means.
            self._sums, self._names, self._batches = 0.0, list(report), 0
        self._sums = self._sums + torch.stack([values.mean() for values in report.values()])
        self._batches += 1
        self._samples += num_samples
        self._waited += waited

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over all ranks since the last reading, then start anew; to be called on all ranks."""
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
        """GiB that tensors took at most on the fullest of all GPUs; then the peak is forgotten."""
        peak = torch.tensor([torch.cuda.max_memory_allocated()], device=accelerator.device)
        torch.cuda.reset_peak_memory_stats()
        return float(accelerator.gather(peak).max()) / 2**30
