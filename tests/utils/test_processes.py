"""Child processes that run in parallel and do not outlive their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from cmvae.utils.processes import Job, divide_machine, run_jobs


class Record:
    """A watcher that records the calls."""

    def __init__(self):
        self.most, self.start_order, self.ends = 0, [], []

    def started(self, job):
        self.start_order.append(job.name)

    def running(self, jobs):
        self.most = max(self.most, len(jobs))

    def ended(self, job, exit_code):
        self.ends.append((job.name, exit_code))


def make_job(folder, name, program):
    return Job(name, [sys.executable, "-c", program], folder / f"{name}.log")


def test_jobs_run_one_per_slot_and_a_failure_does_not_stop_the_others(tmp_path):
    jobs = [make_job(tmp_path, name, "import time; time.sleep(0.5); print('done')") for name in "abd"]
    jobs.insert(2, make_job(tmp_path, "c", "import sys; sys.exit('broken')"))
    record = Record()
    assert run_jobs(jobs, [{}, {}], lambda: False, record) == {"a": 0, "b": 0, "c": 1, "d": 0}
    assert record.most == 2
    assert record.start_order == ["a", "b", "c", "d"]
    assert sorted(record.ends) == [("a", 0), ("b", 0), ("c", 1), ("d", 0)]
    assert (tmp_path / "a.log").read_text() == "done\n"
    assert (tmp_path / "c.log").read_text() == "broken\n"


def test_each_slot_has_its_environment_and_logs_are_appended_to(tmp_path):
    program = "import os; print(os.environ['PLACE'], flush=True)"
    jobs = [make_job(tmp_path, name, program) for name in "ab"]
    (tmp_path / "a.log").write_text("earlier\n")
    run_jobs(jobs, [{"PLACE": "0"}, {"PLACE": "1"}], lambda: False, Record())
    assert (tmp_path / "a.log").read_text() == "earlier\n0\n"
    assert (tmp_path / "b.log").read_text() == "1\n"


POLITE = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(75)))
print("ready", flush=True)
time.sleep(60)
"""


def test_a_stop_lets_running_jobs_save_and_starts_no_others(tmp_path):
    jobs = [make_job(tmp_path, name, POLITE) for name in "ab"]
    log = tmp_path / "a.log"
    exit_codes = run_jobs(jobs, [{}], lambda: log.exists() and "ready" in log.read_text(), Record())
    assert exit_codes == {"a": 75}
    assert log.read_text() == "ready\nsaved\n"


def test_an_exception_kills_running_jobs(tmp_path):
    class Broken(Record):
        def running(self, jobs):
            pids.extend(int(path.read_text()) for path in tmp_path.glob("a.log") if path.read_text())
            if pids:
                raise KeyboardInterrupt

    pids: list[int] = []
    job = make_job(tmp_path, "a", "import os, time; print(os.getpid(), flush=True); time.sleep(60)")
    with pytest.raises(KeyboardInterrupt):
        run_jobs([job], [{}], lambda: False, Broken())
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals a process when its parent dies")
def test_killing_the_parent_terminates_running_jobs(tmp_path):
    parent = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(os.path.dirname(__file__))!r})
from test_processes import POLITE, Record, make_job
from cmvae.utils.processes import run_jobs
run_jobs([make_job(Path({str(tmp_path)!r}), "a", POLITE)], [{{}}], lambda: False, Record())
"""
    process = subprocess.Popen([sys.executable, "-c", parent])
    log = tmp_path / "a.log"

    def wait_for(text):
        deadline = time.monotonic() + 60
        while not (log.exists() and text in log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    wait_for("ready")
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_for("saved")


def test_cores_and_gpus_are_divided(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("cmvae.utils.processes.count_cores", lambda: 16)
    assert divide_machine(5, None, num_devices=0) == [{"OMP_NUM_THREADS": "3"}] * 5
    assert divide_machine(40, None, num_devices=0) == [{"OMP_NUM_THREADS": "1"}] * 16
    assert divide_machine(5, 2, num_devices=0) == [{"OMP_NUM_THREADS": "8"}] * 2
    assert divide_machine(0, None, num_devices=0) == []
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert divide_machine(5, 2, num_devices=0) == [{}, {}]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in divide_machine(5, None, num_devices=2)] == ["0", "1"]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in divide_machine(5, 3, num_devices=2)] == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in divide_machine(5, None, num_devices=2)] == ["4", "7"]
