"""A sign of life of every rank, and an end to a run in which one of them stands still."""

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
"""Exit code of a rank whose run stood still."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sign:
    """Where a rank stands: what its file says."""

    count: int
    """Things done so far; all ranks do the same things in the same order."""
    activity: str
    host: str
    pid: int


class Heartbeat:
    """Tells where this rank stands, in a file that the others can read, and watches that it gets on.

    A rank that hangs holds up all others, each in some collective operation that would wait for as long as
    its process group allows and then not say for whom. So every rank counts what it does, a thread writes
    the count down, and a rank that has not moved for too long looks up who is behind all others, says so,
    writes where its own threads stand, and ends.

    Args:
        folder: that all ranks share.
        rank: which of the ranks this is.
        world_size: number of ranks.
        timeout: seconds without anything done after which the run counts as hung.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, timeout: float) -> None:
        self._folder, self._rank, self._world_size, self._timeout = folder, rank, world_size, timeout
        self._count = 0
        self._activity = "starting"
        self._moved = time.monotonic()
        self._done = threading.Event()

    def beat(self, activity: str) -> None:
        """Something was done, and this is what comes next; to be called in the same order on all ranks."""
        self._count += 1
        self._activity = activity
        self._moved = time.monotonic()

    @contextmanager
    def watching(self, traceback_file: TextIO) -> Iterator[None]:
        """End the process if nothing moves, while the block lasts.

        Args:
            traceback_file: where to write what every thread of this process is doing then.
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
        path = _sign_path(self._folder, self._rank)
        sign = Sign(self._count, self._activity, platform.node(), os.getpid())
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(json.dumps(asdict(sign)), encoding="utf-8")
            partial.replace(path)
        except OSError:
            # A full disk is no hang; the others will see an old sign.
            return

    def _describe_hang(self) -> str:
        signs = {rank: _read_sign(self._folder, rank) for rank in range(self._world_size)}
        # By the clock of the file system, not by those of the machines, which may differ.
        now = _sign_path(self._folder, self._rank).stat().st_mtime
        missing = [rank for rank, sign in signs.items() if sign is None]
        known = {rank: sign for rank, sign in signs.items() if sign is not None}
        least = min(sign.count for sign in known.values())
        lines = [f"nothing has moved for {self._timeout:.0f} s (train.hang_timeout)."]
        lines += [f"Rank {rank} has given no sign of life at all." for rank in missing]
        for rank, sign in known.items():
            if sign.count == least:
                age = max(0.0, now - _sign_path(self._folder, rank).stat().st_mtime)
                # Its thread goes on writing where only the training is stuck.
                state = f"silent for {age:.0f} s" if age > self._timeout / 2 else "alive"
                who = f"Rank {rank} ({sign.host}, process {sign.pid}, {state})"
                lines.append(f"{who} is behind: it is {sign.activity}.")
        lines.append(
            f"This is rank {self._rank}, {self._activity}. Where each rank stands is in {self._folder}/. Go "
            "on from the last checkpoint with --resume"
        )
        return " ".join(lines)


def _sign_path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.json"


def _read_sign(folder: Path, rank: int) -> Sign | None:
    try:
        return Sign(**json.loads(_sign_path(folder, rank).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
