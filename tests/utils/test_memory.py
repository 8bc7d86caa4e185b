"""Freed memory is kept: tensors that are allocated again cause no page faults."""

import subprocess
import sys

import pytest

from cmvae.utils import memory

SCRIPT = """
import resource
import torch
from cmvae.utils.memory import keep_freed_memory
{call}
def touch():
    for _ in range(10):
        torch.zeros(64 * 2**20, dtype=torch.uint8).fill_(1)
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(call):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(call=call)], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(memory.platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again():
    # 64 MiB are 16,384 pages of 4 KiB, or 32 of 2 MiB.
    assert page_faults("keep_freed_memory()") < 10 <= page_faults("")


def test_nothing_is_done_without_glibc(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: pytest.fail("was loaded"))
    memory.keep_freed_memory()
