"""Jobs that a thread of every rank runs while the training continues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from accelerate import Accelerator

from cmvae.distributed import raise_on_all_ranks
from cmvae.utils.errors import UserError

Job = Callable[[], str | None]
"""Returns why it failed, or None."""


class BackgroundJobs:
    """Runs jobs in a thread; a job starts when all ranks have agreed that the one before has succeeded.

    The thread never communicates. The ranks agree in `advance`, which the loop calls between two steps, and
    in `finish`; both must be called on all ranks.

    Args:
        accelerator: the ranks.
        error: raised on all ranks alike when a job has failed on one of them.
    """

    def __init__(self, accelerator: Accelerator, error: type[UserError]) -> None:
        self._accelerator, self._error = accelerator, error
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._num_started = 0
        self._running: Future[str | None] | None = None
        self._remaining: list[Job] = []
        self._on_success: Callable[[], None] = lambda: None

    @property
    def num_finished(self) -> int:
        """Number of jobs that have finished on this rank since the start."""
        return self._num_started - (self._running is not None and not self._running.done())

    def start(self, jobs: Sequence[Job], on_success: Callable[[], None]) -> None:
        """Start the first of `jobs`; `on_success` is called when all have succeeded on all ranks."""
        self._remaining, self._on_success = list(jobs), on_success
        self._start_next()

    def advance(self, num_finished: int) -> None:
        """Start the next job if all ranks have finished the one that runs; does not wait.

        Args:
            num_finished: the smallest `num_finished` of all ranks, now or earlier.
        """
        if self._running is not None and num_finished == self._num_started:
            self._end(self._running)

    def finish(self) -> None:
        """Wait until all jobs have finished on all ranks."""
        while self._running is not None:
            self._end(self._running)

    def close(self) -> None:
        """Wait for the job that runs on this rank; need not be called on all ranks."""
        self._thread.shutdown()

    def _start_next(self) -> None:
        self._running = self._thread.submit(self._remaining.pop(0))
        self._num_started += 1

    def _end(self, running: Future[str | None]) -> None:
        failure = running.result()
        self._running = None
        raise_on_all_ranks(self._accelerator, failure, self._error)
        if self._remaining:
            self._start_next()
        else:
            self._on_success()
