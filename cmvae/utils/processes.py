"""Run commands as child processes, several at a time. They do not outlive this process."""

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
# On Linux, the kernel can signal a process when its parent dies. Loaded here, because few functions are safe
# in a child between fork and exec.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_POLL_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """A command to run."""

    name: str
    command: Sequence[str]
    log: Path
    """File that its output is appended to."""


class Watcher(Protocol):
    """Receives what happens to the jobs."""

    def started(self, job: Job) -> None:
        """The process of the job has started."""

    def running(self, jobs: Sequence[Job]) -> None:
        """These jobs are running. Called several times per second."""

    def ended(self, job: Job, exit_code: int) -> None:
        """The process of the job has ended. The exit code is −N after signal N."""


def run_jobs(
    jobs: Sequence[Job], slots: Sequence[Mapping[str, str]], stopped: Callable[[], bool], watcher: Watcher
) -> dict[str, int]:
    """Run commands, one per slot at a time, until all have ended. A job that fails does not stop the others.

    Each process has a session of its own, so that Ctrl-C does not reach it directly. When `stopped` becomes
    true, each process gets one SIGTERM and may take its time to save, and no other is started. An exception,
    such as a second Ctrl-C, kills them. On Linux they also get SIGTERM if this process is killed.

    Args:
        jobs: jobs in the order in which they are started.
        slots: environment variables of each slot, added to those of this process.
        stopped: whether to stop early.
        watcher: notified of starts and ends.

    Returns:
        Exit code of each job that was started, by name; −N after signal N.
    """
    waiting, free = deque(jobs), deque(slots)
    running: list[tuple[Job, Mapping[str, str], subprocess.Popen[bytes]]] = []
    exit_codes: dict[str, int] = {}
    terminated = False
    try:
        while running or (waiting and not stopped()):
            while waiting and free and not stopped():
                job, slot = waiting.popleft(), free.popleft()
                running.append((job, slot, _start(job, slot)))
                watcher.started(job)
            if stopped() and not terminated:
                terminated = True
                for _, _, process in running:
                    process.terminate()
            for entry in list(running):
                job, slot, process = entry
                exit_code = process.poll()
                if exit_code is not None:
                    running.remove(entry)
                    free.append(slot)
                    exit_codes[job.name] = exit_code
                    watcher.ended(job, exit_code)
            watcher.running([job for job, _, _ in running])
            time.sleep(_POLL_SECONDS)
    finally:
        for _, _, process in running:
            # Each process leads a session, so this includes its children.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return exit_codes


def _start(job: Job, slot: Mapping[str, str]) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def end_with_parent() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:  # the parent died before prctl
                os._exit(1)

    with job.log.open("ab") as log:
        # Arguments come from the caller and are not interpreted by a shell.
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
    """Environment variables that divide the GPUs or cores of this machine among processes.

    Args:
        num_jobs: number of jobs.
        parallel: number of jobs at a time; None is one per GPU, or one per core if there is no GPU.
        num_devices: number of GPUs that this process sees. If there are more processes, they share GPUs.

    Returns:
        Variables of each slot: `OMP_NUM_THREADS`, unless the environment sets it, and with GPUs
        `CUDA_VISIBLE_DEVICES`.
    """
    num_cores = count_cores()
    num_slots = min(num_jobs, parallel or num_devices or num_cores)
    slots: list[dict[str, str]] = [{} for _ in range(num_slots)]
    if "OMP_NUM_THREADS" not in os.environ:
        for slot in slots:
            slot["OMP_NUM_THREADS"] = str(max(1, num_cores // num_slots))
    if num_devices:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        devices = visible.split(",") if visible else [str(device) for device in range(num_devices)]
        for number, slot in enumerate(slots):
            slot["CUDA_VISIBLE_DEVICES"] = devices[number % num_devices]
    return slots


def count_cores() -> int:
    """Number of cores that this process may use, which may be fewer than the machine has."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
