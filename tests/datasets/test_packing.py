"""Parts of a packing: the bytes of a whole one, whatever is killed, repeated or mixed."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from packing import NumberSource, contents, write_csv
from PIL import Image

from cmvae.data.index import ShardIndex
from cmvae.datasets import SOURCES
from cmvae.datasets.fingerprint import fingerprint
from cmvae.datasets.packing import (
    SKIPPED_NAME,
    Part,
    begin_packing,
    begin_part,
    describe_packing,
    join_shards,
)
from cmvae.datasets.writer import write_part, write_shards
from cmvae.utils.errors import UserError


def write_part_of(source, folder: Path, part: Part, data: str = "numbers", **options) -> None:
    options = {"shard_size": 7, **options}
    packing = describe_packing(source, data, **options)
    begin_part(folder, packing)
    write_part(source, folder, packing, part)


@pytest.fixture
def data(tmp_path) -> Path:
    """A table whose rows have groups, and a folder with images, one of them damaged."""
    rows = [
        {
            "x": n / 3,
            "note": f"word{n % 5} and word{n % 7}",
            "colour": ("red", "blue")[n % 2],
            "label": ("odd", "even", "")[n % 3],
            "group": f"g{n // 2}",
        }
        for n in range(60)
    ]
    write_csv(tmp_path / "t.csv", rows)
    for name in ("photos", "notes"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for n in range(40):
        Image.new("RGB", (20, 30), (6 * n, 0, 0)).save(tmp_path / "data" / "photos" / f"s{n}.png")
        (tmp_path / "data" / "notes" / f"s{n}.txt").write_text(f"number {n % 6}")
    (tmp_path / "data" / "photos" / "s7.png").write_bytes(b"damaged")
    return tmp_path


COMMANDS = {
    "table": "t.csv --vector x --text note --categorical colour --label label --group group",
    "folder": "data --image-size 16 --on-error skip",
    "digits": "--pairings 1 --held-out-pairings 1 --missing 0.3",
}


def open_source(name: str):
    """The source of one of the `COMMANDS`, as another process would open it, and its options."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"))
    SOURCES[name].add_arguments(parser)
    arguments = parser.parse_args(COMMANDS[name].split())
    source = SOURCES[name].from_arguments(arguments)
    options = {"table": getattr(source, "table", None), "on_error": getattr(arguments, "on_error", "error")}
    return source, {**options, "shard_size": 7 if name != "digits" else 60, "limit": 300}


@pytest.mark.parametrize("name", COMMANDS)
def test_parts_in_any_order_and_place_make_the_bytes_of_one_packing(data, monkeypatch, name):
    monkeypatch.chdir(data)
    source, options = open_source(name)
    write_shards(source, "whole", **options)
    for number in (3, 1, 2):
        source, options = open_source(name)
        place = data / ("elsewhere" if number == 1 else "parts")
        write_part_of(source, place, Part(number, 3), fingerprint(source), **options)
    shutil.copytree("elsewhere", "parts", dirs_exist_ok=True)
    index = join_shards(data / "parts")
    assert contents(data / "parts") == contents(data / "whole")
    assert index == ShardIndex.load("whole")
    assert (data / "parts" / SKIPPED_NAME).exists() == (name == "folder")
    with pytest.raises(UserError, match="nothing to join"):
        join_shards(data / "parts")


def test_more_parts_than_shards_leave_some_parts_without_work(tmp_path):
    for number in range(1, 16):
        write_part_of(NumberSource(), tmp_path / "parts", Part(number, 15))
    join_shards(tmp_path / "parts")
    write_shards(NumberSource(), tmp_path / "whole", shard_size=7)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def write_slowly(folder: Path, begin, part: Part) -> None:
    source = NumberSource(seconds=0.03)
    packing = describe_packing(source, "numbers", shard_size=7)
    begin(folder, packing)
    write_part(source, folder, packing, part)


def start(folder: Path, begin, part: Part):
    process = multiprocessing.get_context("fork").Process(target=write_slowly, args=(folder, begin, part))
    process.start()
    return process


@pytest.mark.parametrize(("begin", "part"), [(begin_part, Part(1, 2)), (begin_packing, Part(1, 1))])
def test_a_packing_that_was_killed_goes_on_with_the_shards_that_are_missing(tmp_path, begin, part):
    folder = tmp_path / "out"
    process = start(folder, begin, part)
    deadline = time.monotonic() + 60
    while not (done := {path.name: path.stat().st_ino for path in folder.glob("parts/*.tar.json")}):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    # What a kill while a shard was written leaves, and a shard that is cut off.
    (folder / ".train-000008.tar.1234.partial").write_bytes(b"half")
    (folder / "train-000008.tar").write_bytes(b"half")
    write_slowly(folder, begin, part)
    assert {path.name: path.stat().st_ino for path in folder.glob("parts/*.tar.json")}.items() >= done.items()
    if part.num_parts == 2:
        write_slowly(folder, begin, Part(2, 2))
    join_shards(folder)
    write_shards(NumberSource(), tmp_path / "whole", shard_size=7)
    assert contents(folder) == contents(tmp_path / "whole")


def test_the_same_parts_twice_at_once_end_in_the_same_bytes(tmp_path):
    folder = tmp_path / "out"
    processes = [start(folder, begin_part, Part(number, 2)) for number in (1, 2, 1, 2)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    join_shards(folder)
    write_shards(NumberSource(), tmp_path / "whole", shard_size=7)
    assert contents(folder) == contents(tmp_path / "whole")


def test_joining_names_the_parts_that_are_missing_and_changes_nothing(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(UserError, match="holds no parts"):
        join_shards(folder)
    for number in (1, 3, 4):
        write_part_of(NumberSource(), folder, Part(number, 5))
    before = contents(folder / "parts")
    with pytest.raises(UserError, match=r"4 of 11 shards.*train-000001\.tar.*--part 2/5\n.*--part 5/5"):
        join_shards(folder)
    assert contents(folder / "parts") == before
    for number in (2, 5):
        write_part_of(NumberSource(), folder, Part(number, 5))
    shard = folder / "train-000003.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"1 of 11 shards.*train-000003\.tar.*--part 4/5$"):
        join_shards(folder)
    assert not (folder / "index.json").exists()
    write_part_of(NumberSource(), folder, Part(4, 5))
    join_shards(folder)
    assert shard.read_bytes() == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shard_size": 9}, r"shard_size is [79] and [79]"),
        ({"seed": 1}, r"seed is [01] and [01]"),
        ({"on_error": "skip"}, r"on_error is '\w+' and '\w+'"),
        ({"data": "other numbers"}, r"sizes or times of files, differ"),
    ],
)
def test_parts_of_other_options_or_data_are_refused(tmp_path, change, message):
    write_part_of(NumberSource(), tmp_path / "out", Part(1, 2))
    before = contents(tmp_path / "out" / "parts")
    with pytest.raises(UserError, match=f"out: holds parts that do not fit: .*{message}"):
        write_part_of(NumberSource(), tmp_path / "out", Part(2, 2), **change)
    assert contents(tmp_path / "out" / "parts") == before
    # Folders of two machines that are copied together.
    write_part_of(NumberSource(), tmp_path / "other", Part(2, 2), **change)
    shutil.copytree(tmp_path / "other", tmp_path / "out", dirs_exist_ok=True)
    with pytest.raises(UserError, match=rf"do not fit together: .*{message} \(parts [12]/2 and [12]/2\)"):
        join_shards(tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_an_image_that_changed_between_two_parts_is_noticed(data, monkeypatch):
    monkeypatch.chdir(data)
    source, options = open_source("folder")
    write_part_of(source, data / "out", Part(1, 2), fingerprint(source), **options)
    path = data / "data" / "photos" / "s3.png"
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 10))
    source, options = open_source("folder")
    with pytest.raises(UserError, match="times of files, differ"):
        write_part_of(source, data / "out", Part(2, 2), fingerprint(source), **options)


def test_parts_are_replaced_by_another_packing_only_by_force(tmp_path):
    write_part_of(NumberSource(), tmp_path / "out", Part(1, 2))
    before = contents(tmp_path / "out" / "parts")
    with pytest.raises(UserError, match="holds parts that do not fit: shard_size is 9 and 7"):
        write_shards(NumberSource(), tmp_path / "out", shard_size=9)
    assert contents(tmp_path / "out" / "parts") == before
    write_shards(NumberSource(), tmp_path / "out", shard_size=9, force=True)
    write_shards(NumberSource(), tmp_path / "whole", shard_size=9)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_that_holds_a_data_set_gets_no_parts(tmp_path):
    write_shards(NumberSource(), tmp_path, shard_size=7)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="already holds a packed data set"):
        write_part_of(NumberSource(), tmp_path, Part(1, 2))
    assert contents(tmp_path) == before
