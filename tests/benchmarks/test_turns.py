"""Turns, statistics and what goes wrong in a child."""

import shutil
import signal
import subprocess

import numpy as np
import pytest
from commands import ROOT
from turns import Measured, Variant, measure_in_turns

from cmvae.utils.errors import UserError

# A stand-in for the jobs: it tells in a file when it ran.
JOBS = """
from job import Job
from cmvae.utils.errors import UserError

def ceiling_job(precision):
    if precision == "refused":
        raise UserError("no such precision")
    if precision == "dies":
        raise SystemExit(3)
    def run():
        with open({log!r}, "a") as file:
            file.write(precision)
    return Job(run, 12, {{"flops": 6}})
"""


@pytest.fixture
def checkout(tmp_path):
    """A checkout with other jobs, and the file that they write to."""
    folder = tmp_path / "checkout"
    for part in ("cmvae", "tools"):
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    log = tmp_path / "log"
    (folder / "tools/benchmarks/training.py").write_text(JOBS.format(log=str(log)))
    return folder, log


def variant(precision, checkout):
    return Variant(precision, "ceiling", {"precision": precision}, checkout)


def test_variants_take_turns_in_the_checkout_that_they_name(checkout):
    folder, log = checkout
    measured = measure_in_turns([variant("a", folder), variant("b", folder)], repeats=3, warm_up=2)
    assert log.read_text() == "aabb" + "ababab"
    assert [len(m.seconds) for m in measured] == [3, 3]
    assert measured[0].peak_memory_bytes > 2**20
    log.unlink()
    measure_in_turns([variant("a", folder), variant("b", folder)], repeats=2, warm_up=0, alone=True)
    assert log.read_text() == "aabb"


def test_memory_is_that_of_the_child_whatever_its_parent_holds(checkout):
    held = np.ones(2**27)  # 1 GiB, more than Python with torch takes
    (measured,) = measure_in_turns([variant("a", checkout[0])], repeats=1)
    assert 2**20 < measured.peak_memory_bytes < held.nbytes


@pytest.mark.parametrize(("precision", "message"), [("refused", "refused: no such"), ("dies", "exit code 3")])
def test_what_a_child_dies_of_is_told_and_the_others_end(checkout, monkeypatch, precision, message):
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda *args, **kwargs: started.append(popen(*args, **kwargs)) or started[-1]
    )
    with pytest.raises(UserError, match=message):
        measure_in_turns([variant("a", checkout[0]), variant(precision, checkout[0])], repeats=1)
    assert len(started) == 2
    assert started[0].returncode == -signal.SIGKILL


def test_medians_by_hand():
    variant = Variant("a", "ceiling")
    measured = Measured(variant, 12, [1.0, 4.0, 2.0], {"flops": 6}, 0)
    assert measured.rates == [12, 3, 6]
    assert measured.median_rate == 6
    assert measured.median_flops == 3
