"""Jobs run in order, each after all ranks have finished the one before; a failure ends them."""

import threading
import time

import pytest
from accelerate import Accelerator

from cmvae.training.background import BackgroundJobs
from cmvae.utils.errors import UserError


class WriteError(UserError):
    pass


@pytest.fixture
def jobs():
    jobs = BackgroundJobs(Accelerator(cpu=True), WriteError)
    yield jobs
    jobs.close()


def wait_for(jobs, num_finished):
    deadline = time.monotonic() + 60
    while jobs.num_finished < num_finished:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_job_starts_when_all_ranks_have_finished_the_one_before(jobs):
    ran = []
    jobs.start([lambda: ran.append("write"), lambda: ran.append("rename")], lambda: ran.append("saved"))
    wait_for(jobs, 1)
    jobs.advance(0)  # another rank is slower
    assert ran == ["write"]
    jobs.advance(1)
    wait_for(jobs, 2)
    jobs.advance(1)  # what the ranks agreed on before the second job started
    assert ran == ["write", "rename"]
    jobs.advance(2)
    assert ran == ["write", "rename", "saved"]
    jobs.advance(2)
    jobs.finish()
    assert ran == ["write", "rename", "saved"]


def test_the_caller_does_not_wait_for_a_job_until_it_finishes_all(jobs):
    go_on, ran = threading.Event(), []
    jobs.start([lambda: None if go_on.wait(60) else "waited in vain"], lambda: ran.append("saved"))
    assert jobs.num_finished == 0
    jobs.advance(0)
    assert ran == []
    go_on.set()
    jobs.finish()
    assert (jobs.num_finished, ran) == (1, ["saved"])


@pytest.mark.parametrize("how", ["advance", "finish"])
def test_a_failure_is_raised_and_ends_the_rest(jobs, how):
    ran = []
    jobs.start([lambda: "no space", lambda: ran.append("rename")], lambda: ran.append("saved"))
    wait_for(jobs, 1)
    with pytest.raises(WriteError, match="rank 0: no space"):
        jobs.advance(1) if how == "advance" else jobs.finish()
    jobs.finish()
    assert ran == []
    jobs.start([lambda: None], lambda: ran.append("saved"))
    jobs.finish()
    assert ran == ["saved"]
