"""How a process of a launch ends."""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from cmvae.utils.errors import UserError


def run_main(main: Callable[[], int]) -> NoReturn:
    """Run the `main` of a command and end the process with its exit code.

    A `UserError` is printed without a traceback, exit code 2; Ctrl-C is 130.
    """
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _report_to_torchrun(str(error))
        code = 2
    except KeyboardInterrupt:
        code = 130
    leave(code)


def stopped_code(stopped_by: signal.Signals) -> int:
    """The exit code after a signal and a checkpoint.

    Returns:
        EX_TEMPFAIL of sysexits.h, 75, for SIGTERM, so that a scheduler queues the run again; else 128 + N.
    """
    return os.EX_TEMPFAIL if stopped_by == signal.SIGTERM else 128 + stopped_by


def _report_to_torchrun(message: str) -> None:
    """Write the file from which torchrun and accelerate take what their report calls the root cause.

    See https://docs.pytorch.org/docs/stable/elastic/errors.html. It is not written by torch's own handler,
    because most errors are raised before torch is imported.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        Path(path).write_text(json.dumps({"message": message, "timestamp": str(int(time.time()))}))


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
