"""Warnings and errors of each rank, in a file per rank."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO


@contextmanager
def rank_log(folder: Path, rank: int) -> Iterator[TextIO]:
    """Append warnings and errors of this process to `folder/rank-N.log`; yields the file.

    The terminal shows the warnings and errors of rank 0, and the errors of the other ranks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stream = (folder / f"rank-{rank}.log").open("a", encoding="utf-8")
    file = logging.StreamHandler(stream)
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    file.setLevel(logging.WARNING)
    terminal = logging.StreamHandler(sys.stderr)
    terminal.setFormatter(logging.Formatter(f"%(levelname)s: rank {rank}: %(message)s"))
    terminal.setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    root = logging.getLogger()
    for handler in (file, terminal):
        root.addHandler(handler)
    try:
        yield stream
    except BaseException as error:
        # To the file alone: the terminal shows it when the process ends.
        trace = (type(error), error, error.__traceback__)
        file.handle(root.makeRecord("cmvae", logging.ERROR, __file__, 0, "the run ended", (), trace))
        raise
    finally:
        for handler in (file, terminal):
            root.removeHandler(handler)
            handler.close()
        stream.close()
