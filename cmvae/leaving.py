"""How a process of a launch ends."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process; as one of several ranks, without taking Python down around the threads of gloo.

    A thread of gloo lets go of a tensor some time after the operation on it is over, and outlives
    `destroy_process_group` wherever something holds the group, as DDP and DeepSpeed do. Where it does so
    while Python shuts down, the process aborts ("terminate called without an active exception"), and the
    launcher calls a complete training failed (https://github.com/pytorch/pytorch/issues/190489; two of eight
    short runs with torch 2.13). So what is registered for the exit is done, and then there is no shutdown.

    Args:
        code: the exit code.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
