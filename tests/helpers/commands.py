"""Run commands as a user would."""

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
    """Run a command as a user would, with the folder of this interpreter first on the path.

    PYTHONPATH is removed, because users do not set it: a tool must find the package without it.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # One thread: two ranks with two threads each are slow on two cores.
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
    """Run `tools/TOOL` in `folder`, outside the checkout."""
    return run_command([sys.executable, ROOT / "tools" / tool, *arguments], folder)
