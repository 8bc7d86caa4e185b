"""Documented commands, run as a user would run them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_command(
    arguments: Sequence[object], cwd: Path, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a documented command as a user would, with this interpreter's folder first on the path.

    A user has no PYTHONPATH: without it a tool must find the library by itself.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # Two ranks of two threads each on two cores wait for each other more than they work.
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **environment}
    env.pop("PYTHONPATH", None)
    return subprocess.run(
        [str(argument) for argument in arguments],
        cwd=cwd,
        env=env,
        timeout=timeout,
        text=True,
        capture_output=True,
        check=False,
    )


def run_cmvae(command: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `cmvae COMMAND` in a folder."""
    return run_command([sys.executable, "-m", "cmvae.commands", command, *arguments], folder)


def run_without_torch(command: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `cmvae COMMAND` where importing torch is an error."""
    program = "import sys; sys.modules['torch'] = None; from cmvae.commands.__main__ import main; main()"
    return run_command([sys.executable, "-c", program, command, *arguments], folder)


def run_tool(tool: str, *arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run `tools/TOOL` from another folder than the checkout."""
    return run_command([sys.executable, ROOT / "tools" / tool, *arguments], folder)
