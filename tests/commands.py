"""Documented commands, run as a user would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_command(
    arguments: Sequence[str | Path], cwd: Path, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a documented command as a user would, with this interpreter's folder first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Two ranks of two threads each on two cores wait for each other more than they work.
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env=env,
        timeout=timeout,
        text=True,
        capture_output=True,
        check=False,
    )
