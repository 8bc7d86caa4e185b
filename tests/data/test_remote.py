import errno
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import botocore.session
import faulty_s3
import pytest
import urllib3
from faulty_server import changed, cut, forbidden, serve, silent, trickling, truncated, unavailable

from cmvae.data import download, remote
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader, TrainingLoader
from cmvae.data.remote import Cache, is_remote, open_file
from cmvae.utils.errors import UserError

SIZES = [7, 11, 3, 9, 13, 5]
MODALITIES = ["m0", "m1"]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no long waits."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("CMVAE_CACHE", str(folder))
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(download, "LONGEST_WAIT", 0.02)
    return folder


@pytest.fixture
def folder(make_folder):
    return make_folder(SIZES)


@pytest.fixture
def server(folder):
    with serve(folder) as server:
        yield server


def kept(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.is_file()}


def sums(folder: Path) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def training_keys(location, **changes) -> list[list[str]]:
    settings = {"modalities": MODALITIES, "batch_size": 3, "seed": 5, "shuffle_window": 12}
    loader = TrainingLoader(location, **{**settings, **changes})
    return [batch["key"] for epoch in (0, 1) for batch in loader.epoch_batches(epoch)]


def fetch(location, shard: int = 0) -> bytes:
    entry = ShardIndex.load(location).splits["train"].shards[shard]
    with open_file(location, entry.name, num_bytes=entry.num_bytes, sha256=entry.sha256) as file:
        return file.read()


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_what_is_read_from_a_server_is_what_is_read_from_a_folder(cache, folder, server, num_workers):
    began = time.monotonic()
    for rank in range(2):
        settings = {"rank": rank, "world_size": 2, "num_workers": num_workers}
        assert training_keys(server.url, **settings) == training_keys(folder, **settings)
    assert time.monotonic() - began < download.STALL_SECONDS / 2, "a fork took a connection away"
    assert kept(cache) == sums(folder)
    shards = {name: count for name, count in server.requests.items() if name.endswith(".tar")}
    assert set(shards.values()) == {1}, "two ranks, their processes and two epochs fetch a shard once"
    batches = EvaluationLoader(server.url, split="train", modalities=MODALITIES, batch_size=16)
    expected = EvaluationLoader(folder, split="train", modalities=MODALITIES, batch_size=16)
    for batch, other in zip(batches, expected, strict=True):
        assert batch["key"] == other["key"]
        assert all((batch[name] == other[name]).all() for name in MODALITIES)


@pytest.mark.parametrize("fault", [unavailable, cut, truncated, changed, silent, trickling])
def test_a_server_that_fails_for_a_while_costs_nothing(cache, folder, server, fault, monkeypatch, caplog):
    monkeypatch.setattr(download, "STALL_SECONDS", 0.3)
    server.faults["train-0.tar"] = [fault, fault]
    assert fetch(server.url) == (folder / "train-0.tar").read_bytes()
    assert server.requests["train-0.tar"] == 3
    assert caplog.text.count(f"{server.url}/train-0.tar: ") == 2
    assert "next attempt in" in caplog.text
    assert kept(cache) == {hashlib.sha256((folder / "train-0.tar").read_bytes()).hexdigest()}


def test_an_index_is_asked_for_again_as_well(cache, server):
    server.faults["index.json"] = [unavailable, cut]
    assert ShardIndex.load(server.url).splits["train"].num_samples == sum(SIZES)


@pytest.mark.parametrize(
    ("fault", "message"),
    [(unavailable, "503"), (truncated, "SHA-256"), (changed, "SHA-256"), (cut, "ayload|onnection")],
)
def test_a_server_that_goes_on_failing_is_an_error_and_nothing_is_kept(
    cache, server, fault, message, monkeypatch
):
    monkeypatch.setattr(download, "ATTEMPTS", 3)
    server.faults["train-0.tar"] = [fault] * 9
    with pytest.raises(UserError, match=f"(?s){re.escape(server.url)}/train-0.tar: cannot be .*({message})"):
        fetch(server.url)
    assert server.requests["train-0.tar"] == 3
    assert kept(cache) == set()


@pytest.mark.parametrize(("fault", "message"), [(truncated, None), (unavailable, "503")])
def test_a_shard_that_is_damaged_on_its_server_is_skipped_but_a_server_that_fails_is_not(
    cache, server, fault, message, monkeypatch
):
    monkeypatch.setattr(download, "ATTEMPTS", 3)
    server.faults["train-0.tar"] = [fault] * 9
    loader = EvaluationLoader(server.url, split="train", modalities=MODALITIES, batch_size=6, on_error="skip")
    if message is not None:
        with pytest.raises(UserError, match=message):
            list(loader)
        return
    batches = list(loader)
    valid = [key for b in batches for key, counts in zip(b["key"], b["valid"], strict=True) if counts]
    assert valid == [f"k{number:05d}" for number in range(SIZES[0], sum(SIZES))]
    reported = [problem for batch in batches for problem in batch["skipped"]]
    assert len(reported) == SIZES[0]
    assert all("train-0.tar" in problem and "SHA-256" in problem for problem in reported)


def test_a_refusal_is_not_asked_again(cache, server):
    server.faults["train-0.tar"] = [forbidden] * 9
    with pytest.raises(UserError, match="403"):
        fetch(server.url)
    assert server.requests["train-0.tar"] == 1


def test_a_reader_says_which_shard_a_server_lacks(cache, folder, server):
    loader = EvaluationLoader(server.url, split="train", modalities=MODALITIES, batch_size=16)
    (folder / "train-1.tar").unlink()
    with pytest.raises(UserError, match=f"{re.escape(server.url)}/train-1.tar: missing, but the index"):
        list(loader)


def test_an_address_without_a_data_set_is_reported(cache, server):
    with pytest.raises(UserError, match=r"/elsewhere: has no index.json"):
        ShardIndex.load(f"{server.url}/elsewhere")


def test_nobody_there_is_an_error_after_the_attempts(cache, server, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"cannot be fetched: Client.*to continue a training, add --resume"):
        ShardIndex.load(url)


@pytest.mark.parametrize("location", ["pipe:cat shards/digits", "pipe:curl http://x/"])
def test_commands_are_refused(location):
    with pytest.raises(UserError, match="commands are not run to read data"):
        ShardIndex.load(location)


@pytest.mark.parametrize(
    "name", ["../train-0.tar", "pipe:cat x.tar", "http://x/y.tar", "/etc/x.tar", "a/b.tar"]
)
def test_an_index_leads_nowhere_but_to_its_own_files(cache, folder, server, name):
    index = json.loads((folder / "index.json").read_text())
    index["splits"]["train"]["shards"][0]["name"] = name
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="must be a plain file name"):
        ShardIndex.load(server.url)


@pytest.mark.parametrize("location", ["foo://bar/x", "s3x://bucket/y"])
def test_an_unknown_kind_of_address_is_reported(cache, location):
    with pytest.raises(UserError, match=f"{location}/index.json: .*rotocol"):
        ShardIndex.load(location)


def test_what_counts_as_remote():
    assert is_remote("https://host/x")
    assert is_remote("s3://bucket/prefix")
    assert not is_remote("shards/digits")
    assert not is_remote(Path("shards/digits"))
    assert not is_remote("C:/shards")


def test_the_cache_stays_within_its_bound_and_drops_what_was_used_longest_ago(
    cache, folder, server, monkeypatch
):
    sizes = [(folder / f"train-{n}.tar").stat().st_size for n in range(len(SIZES))]
    names = [hashlib.sha256((folder / f"train-{n}.tar").read_bytes()).hexdigest() for n in range(len(SIZES))]
    monkeypatch.setenv("CMVAE_CACHE_GIGABYTES", str((sizes[0] + sizes[1] + sizes[2] + 10) / 1e9))
    for shard in (0, 1, 2):
        fetch(server.url, shard)
        os.utime(cache / names[shard], (shard, shard))
    fetch(server.url, 0)  # used again, so that 1 has not been used for longest
    fetch(server.url, 5)
    assert kept(cache) == {names[0], names[2], names[5]}
    assert server.requests["train-0.tar"] == 1
    for _ in range(2):
        for shard in range(len(SIZES)):
            if sizes[shard] <= sizes[0] + sizes[1] + sizes[2]:
                assert fetch(server.url, shard) == (folder / f"train-{shard}.tar").read_bytes()
                assert sum((cache / name).stat().st_size for name in kept(cache)) <= sum(sizes[:3]) + 10


def test_a_file_that_is_open_outlives_its_place_in_the_cache(cache, folder, server, monkeypatch):
    sizes = [(folder / f"train-{n}.tar").stat().st_size for n in (0, 1)]
    monkeypatch.setenv("CMVAE_CACHE_GIGABYTES", str(max(sizes) / 1e9))
    entry = ShardIndex.load(server.url).splits["train"].shards[0]
    with open_file(server.url, entry.name, num_bytes=entry.num_bytes, sha256=entry.sha256) as file:
        fetch(server.url, 1)
        assert entry.sha256 not in kept(cache)
        assert file.read() == (folder / "train-0.tar").read_bytes()


def test_a_shard_that_is_bigger_than_the_cache_is_reported(cache, server, monkeypatch):
    monkeypatch.setenv("CMVAE_CACHE_GIGABYTES", "1e-6")
    with pytest.raises(UserError, match=r"holds at most 1,000\. Set CMVAE_CACHE_GIGABYTES to more"):
        fetch(server.url)


@pytest.mark.parametrize("text", ["0", "-1", "much", "nan"])
def test_a_bound_that_is_none_is_reported(monkeypatch, text):
    monkeypatch.setenv("CMVAE_CACHE_GIGABYTES", text)
    with pytest.raises(UserError, match=f"CMVAE_CACHE_GIGABYTES={text}: must be a number above 0"):
        Cache.from_environment()


def test_what_a_killed_process_left_is_overwritten_and_makes_room(cache, folder, server, monkeypatch):
    entries = ShardIndex.load(server.url).splits["train"].shards
    bound = max(entry.num_bytes for entry in entries)
    monkeypatch.setenv("CMVAE_CACHE_GIGABYTES", str(bound / 1e9))
    cache.mkdir()
    for entry in entries[:2]:
        (cache / f"{entry.sha256}.{entry.num_bytes}.partial").write_bytes(b"half a ta")
    assert fetch(server.url, 0) == (folder / "train-0.tar").read_bytes()
    assert kept(cache) == {entries[0].sha256}


def test_a_full_disk_is_reported_with_the_folder_of_the_cache(cache, server, monkeypatch):
    entry = ShardIndex.load(server.url).splits["train"].shards[0]

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(remote, "download", full)
    with pytest.raises(UserError, match=r"cache: cannot store http.*No space left.*CMVAE_CACHE"):
        open_file(server.url, entry.name, num_bytes=entry.num_bytes, sha256=entry.sha256)
    assert kept(cache) == set()


def _fetch_in_a_process(url: str, results) -> None:
    results.put(hashlib.sha256(fetch(url)).hexdigest())


def test_many_processes_fetch_a_file_once(cache, folder, server):
    processes = multiprocessing.get_context("fork")
    results = processes.Queue()
    started = [processes.Process(target=_fetch_in_a_process, args=(server.url, results)) for _ in range(6)]
    for process in started:
        process.start()
    expected = hashlib.sha256((folder / "train-0.tar").read_bytes()).hexdigest()
    assert [results.get(timeout=60) for _ in started] == [expected] * 6
    for process in started:
        process.join(60)
    assert server.requests["train-0.tar"] == 1


def test_a_process_that_is_killed_while_it_fetches_holds_nobody_up(cache, folder, server):
    server.faults["train-0.tar"] = [trickling]
    child = multiprocessing.get_context("fork").Process(target=fetch, args=(server.url,))
    child.start()
    deadline = time.monotonic() + 30
    while not server.requests["train-0.tar"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    waiting = threading.Timer(0.5, child.kill)
    waiting.start()
    assert fetch(server.url) == (folder / "train-0.tar").read_bytes()
    child.join(30)
    assert child.exitcode == -9


@pytest.fixture(scope="module")
def s3_url():
    """Address of a real S3-compatible server, which takes seconds to start."""
    with subprocess.Popen([sys.executable, faulty_s3.__file__], stdout=subprocess.PIPE, text=True) as server:
        try:
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()


@pytest.fixture
def start_s3(s3_url, monkeypatch, folder):
    """`start_s3(*faults)` is the address of a copy of `folder` in a new bucket of the server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_url)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    def start(*faults: str) -> str:
        bucket = f"data-{uuid.uuid4()}"
        client = botocore.session.get_session().create_client("s3")
        client.create_bucket(Bucket=bucket)
        for path in folder.glob("*.*"):
            client.put_object(Bucket=bucket, Key=f"sets/{path.name}", Body=path.read_bytes())
        request = urllib3.request("POST", f"{s3_url}{faulty_s3.FAULTS_PATH}", body=" ".join(faults))
        assert request.status == 204
        return f"s3://{bucket}/sets"

    return start


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_what_is_read_from_s3_is_what_is_read_from_a_folder(cache, folder, start_s3):
    address = start_s3()
    for rank in range(2):
        settings = {"rank": rank, "world_size": 2, "num_workers": 2 * rank}
        assert training_keys(address, **settings) == training_keys(folder, **settings)
    assert kept(cache) == sums(folder)
    with pytest.raises(UserError, match=r"/nowhere: has no index.json"):
        ShardIndex.load(address.replace("/sets", "/nowhere"))


@pytest.mark.parametrize("fault", ["unavailable", "cut", "truncated", "silent"])
def test_an_object_store_that_fails_for_a_while_costs_nothing(cache, folder, start_s3, fault, monkeypatch):
    address = start_s3(fault, fault)
    monkeypatch.setattr(download, "STALL_SECONDS", 0.5)
    assert fetch(address) == (folder / "train-0.tar").read_bytes()
    assert kept(cache) == {hashlib.sha256((folder / "train-0.tar").read_bytes()).hexdigest()}


def test_an_object_store_that_goes_on_failing_is_an_error(cache, start_s3, monkeypatch):
    monkeypatch.setattr(download, "ATTEMPTS", 2)
    address = start_s3(*["unavailable"] * 50)
    with pytest.raises(UserError, match=r"/sets/train-0.tar: cannot be fetched: .*Check that the server"):
        fetch(address)
    assert kept(cache) == set()
