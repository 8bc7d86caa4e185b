"""The end of a process."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import atexit, sys
from cmvae.utils.process_exit import leave
atexit.register(print, "registered")
print("written", end=" ")
{ending}
leave(3)
"""
# Something of Python's that runs at the very end, where threads of gloo abort the process.
AT_SHUTDOWN = """
class Last:
    def __del__(self, write=sys.stderr.write):
        write("shut down")
last = Last()
"""


@pytest.mark.parametrize(("world_size", "shuts_down"), [("1", True), ("2", False)])
def test_a_rank_leaves_in_order_but_without_a_shutdown(world_size, shuts_down):
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
