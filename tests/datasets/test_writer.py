import json
import multiprocessing
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from packing import NumberSource, contents

from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.data.shard_table import open_shards
from cmvae.datasets import packing as packing_module
from cmvae.datasets.writer import write_shards
from cmvae.utils.errors import UserError


def test_the_bytes_depend_on_the_seed_and_not_on_the_number_of_processes(tmp_path):
    for name, seed, num_workers in [("a", 3, 1), ("b", 3, 2), ("c", 4, 2)]:
        write_shards(NumberSource(), tmp_path / name, seed=seed, shard_size=7, num_workers=num_workers)
    one, two, other = (contents(tmp_path / name) for name in "abc")
    assert one == two
    assert len(one) == 9 + 2 + 1
    assert one["train-000000.tar"] != other["train-000000.tar"]


def test_every_sample_comes_back_once_in_shuffled_order(tmp_path):
    index = write_shards(NumberSource(), tmp_path, shard_size=7)
    assert index == ShardIndex.load(tmp_path)
    assert [shard.num_samples for shard in index.splits["train"].shards] == [7] * 8 + [4]
    (batch,) = EvaluationLoader(tmp_path, split="train", modalities=["m0"], batch_size=60)
    numbers = batch["label"].tolist()
    assert sorted(numbers) == list(range(60)) != numbers
    assert batch["key"] == [f"train-{number:06d}" for number in numbers]
    assert (batch["m0"] == batch["label"].reshape(60, 1, 1, 1)).all()


def test_shards_are_plain_ustar_without_traces_of_the_machine(tmp_path):
    write_shards(NumberSource(), tmp_path, shard_size=7)
    path = tmp_path / "train-000000.tar"
    assert path.read_bytes()[257:263] == b"ustar\0"
    with tarfile.open(path) as tar:
        members = tar.getmembers()
        assert [member.name.split(".", 1)[1] for member in members] == ["cls", "m0.png"] * 7
        for member in members:
            assert member.type == tarfile.REGTYPE
            assert not member.pax_headers
            origin = (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode)
            assert origin == (0, 0, 0, "", "", 0o444)


def test_the_index_has_the_checksums_that_other_tools_compute(tmp_path):
    index = write_shards(NumberSource(), tmp_path, shard_size=30)
    for split in index.splits.values():
        for shard in split.shards:
            output = subprocess.run(["sha256sum", tmp_path / shard.name], capture_output=True, text=True)
            assert output.stdout.split()[0] == shard.sha256
            assert (tmp_path / shard.name).stat().st_size == shard.num_bytes


def test_a_finished_data_set_is_replaced_only_by_force(tmp_path):
    write_shards(NumberSource(), tmp_path, shard_size=7)
    before = contents(tmp_path)
    with pytest.raises(UserError, match="--force"):
        write_shards(NumberSource(), tmp_path, shard_size=30)
    assert contents(tmp_path) == before
    (tmp_path / "notes.txt").write_text("mine")
    write_shards(NumberSource(), tmp_path, shard_size=30, force=True)
    # Neither old shards stay, nor is anything else touched.
    assert sorted(contents(tmp_path)) == [
        "index.json", "notes.txt", "test-000000.tar", "train-000000.tar", "train-000001.tar"
    ]  # fmt: skip


def test_many_shards_are_listed_in_a_file_of_their_own(tmp_path, monkeypatch):
    listed = write_shards(NumberSource(), tmp_path / "listed", shard_size=7)
    monkeypatch.setattr(packing_module, "MAX_LISTED_SHARDS", 2)
    index = write_shards(NumberSource(), tmp_path / "tabled", shard_size=7)
    assert index == ShardIndex.load(tmp_path / "tabled")
    train = index.splits["train"]
    assert train.shards == ()
    assert tuple(open_shards(train, tmp_path / "tabled")) == listed.splits["train"].shards
    assert len(index.splits["test"].shards) == 2, "a small split stays in the index"
    write_shards(NumberSource(), tmp_path / "tabled", shard_size=30, force=True)
    assert not (tmp_path / "tabled/train.shards").exists()


def test_a_limit_takes_as_large_a_part_of_every_split(tmp_path):
    index = write_shards(NumberSource(), tmp_path, limit=12)
    assert {name: split.num_samples for name, split in index.splits.items()} == {"train": 12, "test": 2}


def raise_user_error():
    raise UserError("image 20 is damaged")


def raise_defect():
    raise ZeroDivisionError("a defect")


def kill_this_process():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("action", "error", "message"),
    [
        (raise_user_error, UserError, "image 20 is damaged"),
        (raise_defect, ZeroDivisionError, "a defect"),
        (kill_this_process, UserError, "a writer process was killed"),
    ],
)
def test_a_failing_writer_is_reported_and_leaves_no_index(tmp_path, action, error, message):
    with pytest.raises(error, match=message):
        write_shards(NumberSource(20, action), tmp_path, shard_size=7, num_workers=2)
    assert not (tmp_path / "index.json").exists()
    write_shards(NumberSource(), tmp_path, shard_size=7)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/out"):
        write_shards(NumberSource(), tmp_path / "file" / "out")


def pack_in_a_new_session(folder):
    os.setsid()
    write_shards(NumberSource(seconds=0.05), folder, shard_size=7, num_workers=2)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_run_leaves_no_index_and_no_process_and_the_next_one_cleans_up(tmp_path, number):
    folder = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=pack_in_a_new_session, args=(folder,))
    process.start()
    wait_for(lambda: folder.is_dir() and any(folder.glob("*.tar")))
    # Ctrl-C reaches the whole group; a kill only the parent.
    os.killpg(process.pid, number) if number == signal.SIGINT else os.kill(process.pid, number)
    process.join(20)
    assert process.exitcode not in (None, 0)
    try:
        wait_for(lambda: not any(is_in_session(pid, process.pid) for pid in Path("/proc").glob("[0-9]*")))
    except AssertionError:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert not (folder / "index.json").exists()
    with pytest.raises(UserError, match="interrupted"):
        ShardIndex.load(folder)
    (folder / ".train-000099.tar.partial").write_bytes(b"half")
    (folder / "train-000099.tar").write_bytes(b"stale")
    write_shards(NumberSource(), folder, shard_size=7)
    write_shards(NumberSource(), tmp_path / "whole", shard_size=7)
    assert contents(folder) == contents(tmp_path / "whole")


def wait_for(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_in_session(process: Path, session: int) -> bool:
    try:
        state, _, _, its_session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z" and int(its_session) == session


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"shape": [2, 4]}, "channels"),
        ({"dtype": "object"}, "dtype"),
        ({"kind": "pickle"}, "kind"),
        ({"loader": "os.system"}, "loader"),
    ],
)
def test_an_index_that_says_what_is_not_known_is_refused(tmp_path, change, word):
    write_shards(NumberSource(), tmp_path, shard_size=30)
    path = tmp_path / "index.json"
    index = json.loads(path.read_text())
    index["modalities"]["m0"].update(change)
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"index\.json: modalities\.m0.*{word}"):
        ShardIndex.load(tmp_path)
