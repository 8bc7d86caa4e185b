"""Long outputs: constant memory, several ranks, and going on after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest
from commands import run_cmvae
from new_rows import make_rows, read
from packing import write_csv

from cmvae.commands import parts


@pytest.fixture
def long_table(trained, tmp_path):
    """`long_table(count)` is a table of many rows, without the images."""
    rows = make_rows(60, trained)

    def make(count):
        some = [{n: c for n, c in row.items() if n != "photo"} for row in rows]
        return write_csv(tmp_path / f"{count}.csv", [some[number % 60] for number in range(count)])

    return make


def peak_memory(call, *arguments):
    """Bytes that Python objects took at most while a command ran."""
    tracemalloc.start()
    try:
        code, _, err = call(*arguments)
        assert code == 0, err
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_depend_on_the_number_of_rows(run, call, long_table, tmp_path):
    def peak(command, count):
        flags = ("--draws", 1) if command == "impute" else ()
        out = tmp_path / f"{command}-{count}.csv"
        return peak_memory(call, command, run, long_table(count), "--out", out, *flags)

    for command in ("cluster", "impute"):
        peak(command, 10)  # imports
        assert peak(command, 6000) < 1.1 * peak(command, 2000)


def test_parts_are_merged_in_the_order_of_the_keys(make_run, call, digits_shards, tmp_path, monkeypatch):
    arguments = ("cluster", make_run("m0"), digits_shards, "--out")
    assert call(*arguments, tmp_path / "a.csv")[0] == 0
    # More parts than may be open at the same time: train, validation and test have one each.
    monkeypatch.setattr(parts, "MAX_OPEN_FILES", 2)
    assert call(*arguments, tmp_path / "b.csv")[0] == 0
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "a.csv").read_bytes()


def test_ranks_share_the_parts(run, call, long_table, tmp_path):
    path = long_table(2500)
    assert call("cluster", run, path, "--out", tmp_path / "one.csv")[0] == 0
    done = run_cmvae(
        "cluster", run, path, "--out", "two.csv", "--launch", "ddp", "--num-processes", 2, folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.csv").read_bytes() == (tmp_path / "one.csv").read_bytes()
    assert "2500 samples in" in done.stdout


def test_a_killed_command_goes_on_with_the_parts_that_are_there(run, call, long_table, tmp_path):
    path, out = long_table(20000), tmp_path / "clusters.csv"
    arguments = ["cluster", run, path, "--out", out]
    command = [sys.executable, "-m", "cmvae.commands", *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    first = tmp_path / ".clusters.csv.parts/000000000.csv"
    deadline = time.monotonic() + 240
    while not first.is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert first.is_file()
    assert not out.exists(), "killed before it was done"
    # If the first part is not computed again, what is changed in it stays.
    first.write_text(first.read_text().replace("row-000002", "kept-part", 1))
    code, _, err = call(*arguments)
    assert code == 0, err
    rows = read(out)
    assert [row["key"] for row in rows[:2]] == ["kept-part", "row-000003"]
    assert len(rows) == 20000
    assert not first.parent.exists()

    # Parts of another request are not used.
    first.parent.mkdir()
    (first.parent / "request.json").write_text("{}")
    first.write_text('"{""unknown"": {}}"\nother\n')
    code, _, err = call(*arguments, "--num-clusters", 2, "--overwrite")
    assert code == 0, err
    assert read(out)[0]["key"] == "row-000002"
