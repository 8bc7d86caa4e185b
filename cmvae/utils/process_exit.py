"""Run the main function of a command and exit with its code."""

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
    """Run the `main` of a command and exit with its code.

    A `UserError` is printed without a traceback and gives exit code 2. Ctrl-C gives 130.
    """
    try:
        code = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        _report_to_torchrun(str(error))
        code = 2
    except KeyboardInterrupt:
        code = 130
    exit_process(code)


def stopped_code(stopped_by: signal.Signals) -> int:
    """Exit code of a training that a signal stopped after a checkpoint.

    Returns:
        75 (EX_TEMPFAIL of sysexits.h) for SIGTERM, so that a scheduler queues the run again; else 128 + N.
    """
    return os.EX_TEMPFAIL if stopped_by == signal.SIGTERM else 128 + stopped_by


def _report_to_torchrun(message: str) -> None:
    """Write the file from which torchrun and accelerate take the root cause of a failure.

    See https://docs.pytorch.org/docs/stable/elastic/errors.html. torch has its own handler, but most
    errors here are raised before torch is imported.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        Path(path).write_text(json.dumps({"message": message, "timestamp": str(int(time.time()))}))


def exit_process(code: int) -> NoReturn:
    """Exit the process. One of several ranks runs its exit handlers but skips the shutdown of Python.

    A thread of gloo releases a tensor some time after the operation on it has ended. It outlives
    `destroy_process_group` if something holds the group, as DDP and DeepSpeed do. If it releases the tensor
    while Python shuts down, the process aborts ("terminate called without an active exception"), and the
    launcher reports a complete training as failed (https://github.com/pytorch/pytorch/issues/190489; two of
    eight short runs with torch 2.13).

    Args:
        code: exit code.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
