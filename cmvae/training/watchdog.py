"""A heartbeat per rank, and an end to a run in which a rank hangs."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

EXIT_HUNG = 70
"""Exit code of a rank when the run hangs."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankStatus:
    """What a rank does right now: the content of its `rank-N.json`."""

    count: int
    """Number of heartbeats so far; all ranks beat in the same order."""
    activity: str
    host: str
    pid: int


class Heartbeat:
    """Reports the progress of this rank in a file and ends the process when the run hangs.

    One rank that hangs blocks all others in a collective operation, whose timeout would not name that rank.
    So every rank counts its heartbeats, and a thread writes the count to `folder/rank-N.json`. A rank without
    a heartbeat for `timeout` seconds compares the counts of all ranks, logs which one is behind, dumps the
    stacks of its own threads, and exits.

    Args:
        folder: shared by all ranks.
        rank: index of this rank.
        world_size: number of ranks.
        timeout: seconds without a heartbeat after which the run counts as hung.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, timeout: float) -> None:
        self._folder, self._rank, self._world_size, self._timeout = folder, rank, world_size, timeout
        self._count = 0
        self._activity = "starting"
        self._moved = time.monotonic()
        self._done = threading.Event()

    def beat(self, activity: str) -> None:
        """Record progress and what comes next; must be called in the same order on all ranks."""
        self._count += 1
        self._activity = activity
        self._moved = time.monotonic()

    @contextmanager
    def watching(self, traceback_file: TextIO) -> Iterator[None]:
        """Watch for a hang while the block runs.

        Args:
            traceback_file: where the stacks of this process's threads are written on a hang.
        """
        self.beat("starting")
        self._write()
        thread = threading.Thread(target=self._watch, args=(traceback_file,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join()
            self._write()

    def _watch(self, traceback_file: TextIO) -> None:
        while not self._done.wait(min(10.0, self._timeout / 4)):
            self._write()
            if time.monotonic() - self._moved > self._timeout:
                _LOGGER.error("%s", self._describe_hang())
                faulthandler.dump_traceback(traceback_file)
                # The main thread is stuck, in C perhaps, where no exception reaches it.
                os._exit(EXIT_HUNG)

    def _write(self) -> None:
        path = _status_path(self._folder, self._rank)
        status = RankStatus(self._count, self._activity, platform.node(), os.getpid())
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(json.dumps(asdict(status)), encoding="utf-8")
            partial.replace(path)
        except OSError:
            # A full disk is no hang; the other ranks see an old status.
            return

    def _describe_hang(self) -> str:
        statuses = {rank: _read_status(self._folder, rank) for rank in range(self._world_size)}
        # By the clock of the file system, as those of the machines may differ.
        now = _status_path(self._folder, self._rank).stat().st_mtime
        missing = [rank for rank, status in statuses.items() if status is None]
        known = {rank: status for rank, status in statuses.items() if status is not None}
        least = min(status.count for status in known.values())
        lines = [f"no progress for {self._timeout:.0f} s (train.hang_timeout)."]
        lines += [f"Rank {rank} never reported." for rank in missing]
        for rank, status in known.items():
            if status.count == least:
                age = max(0.0, now - _status_path(self._folder, rank).stat().st_mtime)
                # The thread keeps writing if only the training hangs.
                state = f"silent for {age:.0f} s" if age > self._timeout / 2 else "alive"
                who = f"Rank {rank} ({status.host}, process {status.pid}, {state})"
                lines.append(f"{who} is behind: it is {status.activity}.")
        lines.append(
            f"This is rank {self._rank}, {self._activity}. The status of every rank is in {self._folder}/. "
            "Continue from the last checkpoint with --resume"
        )
        return " ".join(lines)


def _status_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def _read_status(folder: Path, rank: int) -> RankStatus | None:
    try:
        return RankStatus(**json.loads(_status_path(folder, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
