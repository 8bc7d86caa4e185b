"""Commands as processes of their own, several at a time; none outlives the process that started them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

_PR_SET_PDEATHSIG = 1
# Of Linux: asks the kernel to signal a process when its parent dies. Loaded here and not in the child, where
# only few things are safe between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """A command to run."""

    name: str
    command: Sequence[str]
    log: Path
    """Where its output goes, after what is there already."""


class Watcher(Protocol):
    """Who is told what becomes of the jobs."""

    def started(self, job: Job) -> None:
        """The job's process runs."""

    def running(self, jobs: Sequence[Job]) -> None:
        """These run; called several times a second."""

    def ended(self, job: Job, exit_code: int) -> None:
        """The job's process has ended; the exit code is −N after signal N."""


def run_jobs(
    jobs: Sequence[Job], slots: Sequence[Mapping[str, str]], stopped: Callable[[], bool], watcher: Watcher
) -> dict[str, int]:
    """Run commands, as many at a time as there are slots, until all have ended, however they did.

    Every process has a session of its own, so that Ctrl-C does not reach it at once: when `stopped` turns
    true each gets one SIGTERM and the time that it takes to save, and no other is started. An exception, such
    as a second Ctrl-C, kills them. On Linux they also get a SIGTERM when this process is killed.

    Args:
        jobs: what to run, in this order.
        slots: for each place what its process has in its environment besides that of this process.
        stopped: whether to end early.
        watcher: is told of every start and end.

    Returns:
        By name the exit code of each job that was started, −N after signal N.
    """
    waiting, free = deque(jobs), deque(slots)
    running: list[tuple[Job, Mapping[str, str], subprocess.Popen[bytes]]] = []
    exit_codes: dict[str, int] = {}
    asked = False
    try:
        while running or (waiting and not stopped()):
            while waiting and free and not stopped():
                job, slot = waiting.popleft(), free.popleft()
                running.append((job, slot, _start(job, slot)))
                watcher.started(job)
            if stopped() and not asked:
                asked = True
                for _, _, process in running:
                    process.terminate()
            for place in list(running):
                job, slot, process = place
                exit_code = process.poll()
                if exit_code is not None:
                    running.remove(place)
                    free.append(slot)
                    exit_codes[job.name] = exit_code
                    watcher.ended(job, exit_code)
            watcher.running([job for job, _, _ in running])
            time.sleep(_POLL_SECONDS)
    finally:
        for _, _, process in running:
            # With its own children: each process leads a session.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return exit_codes


def _start(job: Job, slot: Mapping[str, str]) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def end_with_parent() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # it died before the kernel knew
                os._exit(1)

    with job.log.open("ab") as log:
        # The caller's own program and arguments, never a shell's string.
        return subprocess.Popen(  # noqa: S603
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **slot},
            start_new_session=True,
            preexec_fn=end_with_parent,
        )


def divide_machine(num_jobs: int, parallel: int | None, num_devices: int) -> list[dict[str, str]]:
    """The environments of processes that share a machine: a GPU each, or their part of the cores.

    Args:
        num_jobs: how many there are to run.
        parallel: how many to run at a time; None is one for each GPU, without GPUs one for each core.
        num_devices: GPUs that this process sees; more processes than that share them in turn.

    Returns:
        For each process that runs at a time `OMP_NUM_THREADS`, unless the environment has it, and with GPUs
        `CUDA_VISIBLE_DEVICES`.
    """
    num_cores = _count_cores()
    places = min(num_jobs, parallel or num_devices or num_cores)
    slots: list[dict[str, str]] = [{} for _ in range(places)]
    if "OMP_NUM_THREADS" not in os.environ:
        for slot in slots:
            slot["OMP_NUM_THREADS"] = str(max(1, num_cores // places))
    if num_devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(device) for device in range(num_devices)]
        for place, slot in enumerate(slots):
            slot["CUDA_VISIBLE_DEVICES"] = devices[place % num_devices]
    return slots


def _count_cores() -> int:
    """Cores that this process may use: on a shared machine fewer than there are."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
