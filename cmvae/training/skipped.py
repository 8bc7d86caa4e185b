"""Damaged samples that a training does without: told, counted, and not more than so many."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from accelerate import Accelerator

from cmvae.utils.errors import UserError

_LOGGER = logging.getLogger(__name__)


class SkippedSamples:
    """The samples that all ranks left out of a pass so far.

    Args:
        limit: how many may be.
    """

    def __init__(self, limit: int) -> None:
        self.count = 0
        self._limit = limit
        self._told: set[str] = set()

    def begin_epoch(self) -> None:
        """Count from zero: every epoch meets the same samples again."""
        self.count = 0

    def add(self, accelerator: Accelerator, problems: Sequence[str]) -> None:
        """Count what all ranks left out of a batch, and log each of this one the first time; on all ranks.

        Raises:
            UserError: on all ranks together, when there are more than the limit.
        """
        self._log(problems)
        number = torch.tensor(len(problems), device=accelerator.device)
        self._count(int(accelerator.reduce(number, "sum")))

    def _log(self, problems: Sequence[str]) -> None:
        for problem in problems:
            if problem not in self._told:
                _LOGGER.warning("skipped a sample: %s", problem)
            self._told.add(problem)

    def _count(self, number: int) -> None:
        self.count += number
        if self.count > self._limit:
            raise UserError(
                f"data.max_skipped: {self.count} damaged samples, where at most {self._limit} may be left "
                "out. The log names them: copy or pack the data set again, or set data.max_skipped higher, "
                "and go on with --resume"
            )
