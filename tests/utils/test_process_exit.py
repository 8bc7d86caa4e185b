"""Exit of a process, with one rank and with several."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys
from cmvae.utils.process_exit import exit_process
atexit.register(print, "registered")
print("written", end=" ")
{ending}
exit_process(3)
"""
# Runs at the end of Python's shutdown, where threads of gloo can abort the process.
AT_SHUTDOWN = """
class Last:
    def __del__(self, write=sys.stderr.write):
        write("shut down")
last = Last()
"""


@pytest.mark.parametrize(("world_size", "shuts_down"), [("1", True), ("2", False)])
def test_one_of_several_ranks_exits_without_a_shutdown(world_size, shuts_down):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(ending=AT_SHUTDOWN)],
        env={**os.environ, "WORLD_SIZE": world_size},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3
    assert done.stdout == "written registered\n"
    assert ("shut down" in done.stderr) == shuts_down
