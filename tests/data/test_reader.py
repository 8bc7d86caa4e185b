import errno
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade_shards import SHAPES, members_of, picture, png, write_index, write_tar
from PIL import Image

from cmvae.data import split_reader
from cmvae.data.plan import TrainingPlan
from cmvae.data.reader import EvaluationLoader, TrainingLoader, explain_dead_readers
from cmvae.modalities import ImageModality
from cmvae.utils.errors import UserError

SIZES = [7, 11, 3, 9, 13, 5]


def training(folder, **changes) -> TrainingLoader:
    settings = {"modalities": ["m0", "m1"], "batch_size": 3, "seed": 5, "shuffle_window": 12}
    return TrainingLoader(folder, **{**settings, **changes})


def keys(batches) -> list[list[str]]:
    return [batch["key"] for batch in batches]


def check_content(batch) -> None:
    """Pixels and labels belong to the keys."""
    for place, key in enumerate(batch["key"]):
        number = int(key[1:])
        for name, shape in SHAPES.items():
            np.testing.assert_array_equal(batch[name][place].numpy(), picture(number, shape))
        assert batch["label"][place] == number % 10


def test_batches_hold_what_their_keys_say(make_folder):
    loader = training(make_folder(SIZES))
    batches = list(loader.epoch_batches(0))
    assert len(batches) == loader.batches_per_epoch == sum(SIZES) // 3
    for batch in batches:
        check_content(batch)
        assert list(batch) == ["m0", "m1", "mask", "label", "key", "valid", "skipped", "position"]
        assert batch["m0"].shape == (3, 3, 4, 5)
        assert batch["m1"].shape == (3, 1, 3, 2)
        assert batch["m0"].dtype == batch["m1"].dtype == torch.uint8
        assert batch["label"].dtype == torch.int64
        assert batch["valid"].dtype == torch.bool
        assert batch["valid"].all()
        assert batch["mask"].shape == (3, 2)
        assert batch["mask"].all()


def test_only_the_modalities_that_are_asked_for_are_read(make_folder):
    batch = next(training(make_folder(SIZES), modalities=["m1"]).epoch_batches(0))
    assert list(batch) == ["m1", "mask", "label", "key", "valid", "skipped", "position"]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_order_is_the_plan_s_whatever_the_number_of_workers(make_folder):
    folder = make_folder(SIZES)
    plan = TrainingPlan(SIZES, 3, seed=5, shuffle_window=12)
    planned = [[f"k{p:05d}" for p in batch] for e in (0, 1, 4) for batch in plan.for_rank(e).positions()]
    for num_workers in (0, 1, 2, 3):
        loader = training(folder, num_workers=num_workers)
        read = [batch for epoch in (0, 1, 4) for batch in loader.epoch_batches(epoch)]
        assert keys(read) == planned
        for batch in read:
            check_content(batch)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_no_sample(make_folder, world_size):
    folder = make_folder(SIZES)
    read = [
        key
        for rank in range(world_size)
        for batch in training(folder, rank=rank, world_size=world_size).epoch_batches(2)
        for key in batch["key"]
    ]
    assert len(read) == len(set(read)) == sum(SIZES) // (3 * world_size) * 3 * world_size


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_epoch_is_the_tail_of_the_full_one(make_folder, num_workers):
    loader = training(make_folder(SIZES), num_workers=num_workers)
    full = keys(loader.epoch_batches(3))
    for skip in (0, 1, 6, len(full)):
        assert keys(loader.epoch_batches(3, skip_batches=skip)) == full[skip:]


@pytest.fixture
def decoded(monkeypatch):
    """Grows by one with every image that the reader decodes in this process."""
    decoded = []

    def counting(self, content, decode=ImageModality.decode):
        decoded.append(self)
        return decode(self, content)

    monkeypatch.setattr(ImageModality, "decode", counting)
    return decoded


def test_nothing_that_is_skipped_is_decoded(make_folder, decoded):
    loader = training(make_folder(SIZES), rank=1, world_size=2)
    batches = list(loader.epoch_batches(0, skip_batches=5))
    assert len(batches) == loader.batches_per_epoch - 5 > 0
    assert len(decoded) == len(batches) * 3 * 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_cached_split_reads_the_same_batches(make_folder, num_workers):
    folder = make_folder(SIZES)
    plain = training(folder, num_workers=num_workers)
    cached = training(folder, num_workers=num_workers, cache_bytes=10**6)
    for epoch in range(3):
        for expected, batch in zip(plain.epoch_batches(epoch), cached.epoch_batches(epoch), strict=True):
            assert batch["key"] == expected["key"]
            for name in ("m0", "m1", "label", "valid"):
                assert torch.equal(batch[name], expected[name])


def test_a_cached_split_decodes_every_sample_once(make_folder, decoded):
    loader = training(make_folder(SIZES), cache_bytes=10**6)
    for epoch in range(6):
        keys(loader.epoch_batches(epoch))
    assert len(decoded) == sum(SIZES) * 2, "once for each of two modalities"
    too_small = training(make_folder(SIZES), cache_bytes=sum(SIZES) * (3 * 4 * 5 + 3 * 2) - 1)
    decoded.clear()
    for epoch in range(2):
        keys(too_small.epoch_batches(epoch))
    assert len(decoded) == 2 * too_small.batches_per_epoch * 3 * 2


class WatchedSample(dict):
    """A dict that can be watched: plain ones take no weak references."""


def test_undecoded_samples_are_held_only_from_their_window_to_their_use(make_folder, monkeypatch):
    samples: list[weakref.ref] = []
    read_shard = split_reader.SplitReader.read_shard

    def watched(self, shard):
        for sample in read_shard(self, shard):
            kept = WatchedSample(sample)
            samples.append(weakref.ref(kept))
            yield kept

    def count_alive() -> int:
        return sum(sample() is not None for sample in samples)

    monkeypatch.setattr(split_reader.SplitReader, "read_shard", watched)
    folder = make_folder([10] * 12)
    # Windows of one shard, read in four lanes: four windows at most, and the batch in hand.
    alive = [count_alive() for _ in training(folder, shuffle_window=10, batch_size=5).epoch_batches(0)]
    assert len(samples) == 120, "each shard is read once"
    assert max(alive) <= 4 * 10 + 5
    assert alive[-1] <= 5
    # One window of everything: only what this rank has still to yield is kept.
    loader = training(folder, shuffle_window=120, batch_size=5, rank=1, world_size=3)
    alive = [count_alive() for _ in loader.epoch_batches(0)]
    assert all(count <= 40 - 5 * number for number, count in enumerate(alive))


def test_each_shard_is_opened_once_a_worker(make_folder, monkeypatch):
    opened = []
    read_shard = split_reader.SplitReader.read_shard

    def watched(self, shard):
        opened.append(shard.name)
        return read_shard(self, shard)

    monkeypatch.setattr(split_reader.SplitReader, "read_shard", watched)
    list(training(make_folder(SIZES)).epoch_batches(0))
    assert sorted(opened) == [f"train-{number}.tar" for number in range(len(SIZES))]


def test_an_epoch_can_be_left_for_another(make_folder):
    folder = make_folder(SIZES)
    loader = training(folder, num_workers=2)
    expected = keys(training(folder).epoch_batches(1))
    for _ in range(3):
        next(loader.epoch_batches(0))
        assert keys(loader.epoch_batches(1)) == expected


def test_reading_draws_nothing_from_the_global_random_state(make_folder):
    folder = make_folder(SIZES)
    before = torch.get_rng_state()
    for num_workers in (0, 1):
        list(training(folder, num_workers=num_workers).epoch_batches(0))
        list(
            EvaluationLoader(folder, split="train", modalities=["m0"], batch_size=4, num_workers=num_workers)
        )
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (5, 0), (2, 2)])
def test_evaluation_reads_every_key_exactly_once(make_folder, world_size, num_workers):
    folder = make_folder(SIZES, split="test")
    valid, lengths = [], set()
    for rank in range(world_size):
        loader = EvaluationLoader(
            folder,
            split="test",
            modalities=["m0", "m1"],
            batch_size=4,
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
        batches = list(loader)
        lengths.add((len(loader), len(batches)))
        for batch in batches:
            assert len(batch["key"]) == len(batch["m0"]) == 4
            check_content(batch)
            valid += [key for key, counts in zip(batch["key"], batch["valid"], strict=True) if counts]
    assert valid == [f"k{number:05d}" for number in range(sum(SIZES))]
    assert len(lengths) == 1
    assert len(set(lengths.pop())) == 1


def test_evaluation_of_the_first_samples_opens_only_their_shards(make_folder):
    folder = make_folder(SIZES)
    last = folder / sorted(path.name for path in folder.glob("*.tar"))[-1]
    last.write_bytes(b"x" * last.stat().st_size)
    loader = EvaluationLoader(folder, split="train", modalities=["m0"], batch_size=4, num_samples=9)
    batches = list(loader)
    assert [batch["valid"].sum() for batch in batches] == [4, 4, 1]
    read = [key for of_batch in keys(batches) for key in of_batch]
    assert read[:9] == [f"k{number:05d}" for number in range(9)]


def test_evaluation_can_be_repeated(make_folder):
    loader = EvaluationLoader(
        make_folder(SIZES), split="train", modalities=["m0"], batch_size=4, num_workers=1
    )
    assert keys(loader) == keys(loader)


def test_unlabelled_data_has_label_minus_one(make_folder):
    folder = make_folder(SIZES, change=lambda members: [m for m in members if not m[0].endswith(".cls")])
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "class_names": None}))
    assert next(training(folder).epoch_batches(0))["label"].tolist() == [-1, -1, -1]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_may_be_spawned(make_folder):
    folder = make_folder(SIZES)
    expected = [keys(training(folder).epoch_batches(epoch)) for epoch in (0, 1)]
    processes = torch.multiprocessing
    default = processes.get_start_method()
    processes.set_start_method("spawn", force=True)
    try:
        loader = training(folder, num_workers=1)
        assert [keys(loader.epoch_batches(epoch)) for epoch in (0, 1)] == expected
    finally:
        processes.set_start_method(default, force=True)


def test_workers_outlive_signals_to_the_process_group(make_folder):
    loader = training(make_folder(SIZES), num_workers=2)
    batches = loader.epoch_batches(0)
    # Workers yield in turn: with a batch from each, both are past their initialisation.
    for _ in range(2):
        next(batches)
    workers = torch.multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            # Another process than the parent sends it, as a launcher does.
            subprocess.run(["/bin/kill", f"-{number.value}", str(worker.pid)], check=True)
    assert len(list(batches)) == loader.batches_per_epoch - 2
    assert len(list(loader.epoch_batches(1))) == loader.batches_per_epoch
    assert all(worker.is_alive() for worker in workers)


@pytest.mark.parametrize(("free", "num_processes"), [(2**20, 0), (2**30, 2)])
def test_small_shared_memory_is_not_filled(make_folder, monkeypatch, caplog, free, num_processes):
    folder = make_folder(SIZES)
    expected = keys(training(folder).epoch_batches(0))
    usage = shutil.disk_usage(folder)._replace(free=free)
    monkeypatch.setattr("cmvae.data.reader.shutil.disk_usage", lambda path: usage)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    loader = training(folder, num_workers=2)
    batches = loader.epoch_batches(0)
    read = [next(batches)["key"]]
    assert len(torch.multiprocessing.active_children()) == num_processes
    assert [*read, *keys(batches)] == expected
    warned = [record.getMessage() for record in caplog.records]
    if num_processes:
        assert not warned
    else:
        (message,) = warned
        assert "data.num_workers=2: not used, because /dev/shm has no room" in message
        assert "docker run --shm-size=1g" in message


def test_a_killed_worker_is_an_error_with_a_remedy(make_folder):
    batches = training(make_folder(SIZES), num_workers=1).epoch_batches(0)
    next(batches)
    (worker,) = torch.multiprocessing.active_children()

    @explain_dead_readers()
    def read_on():
        os.kill(worker.pid, signal.SIGBUS)
        # PyTorch raises the error from a signal handler: here, or else in whatever pytest does next.
        time.sleep(30)
        list(batches)

    with pytest.raises(UserError, match=r"data\.num_workers: a reader process died: .*--shm-size=1g"):
        read_on()
    with pytest.raises(RuntimeError, match="something else"), explain_dead_readers():
        raise RuntimeError("something else")


def report_workers_and_stay(folder, pids) -> None:
    batches = training(folder, num_workers=2).epoch_batches(0)
    for _ in range(2):
        next(batches)
    pids.put([worker.pid for worker in torch.multiprocessing.active_children()])
    time.sleep(60)


def test_workers_die_with_a_killed_parent(make_folder):
    processes = torch.multiprocessing.get_context("fork")
    pids = processes.Queue()
    parent = processes.Process(target=report_workers_and_stay, args=(make_folder(SIZES), pids))
    parent.start()
    workers = pids.get(timeout=60)
    assert len(workers) == 2
    assert all(is_running(pid) for pid in workers)
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        # An orphan that nobody waits for stays as a zombie where there is no init process.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Trap:
    """Unpickling this fails the test for good."""

    def __reduce__(self):
        return os._exit, (99,)


def replace(name, content):
    return lambda members: [(key, content if key == name else old) for key, old in members]


DAMAGES = {
    "a pickle": (
        lambda members: [*members, ("k00001.pyd", pickle.dumps(Trap()))],
        ["train-0.tar", "'k00001.pyd'"],
    ),
    "an unknown suffix": (lambda members: [("k00000.pth", b"x"), *members], ["train-0.tar", "'k00000.pth'"]),
    "a path": (lambda members: [("../k00000.cls", b"1"), *members], ["train-0.tar", "'../k00000.cls'"]),
    "a missing member": (
        lambda members: [member for member in members if member[0] != "k00001.m1.png"],
        ["train-0.tar", "k00001", ".m1.png"],
    ),
    "a repeated member": (lambda members: [members[0], *members], ["train-0.tar", "k00000.cls"]),
    "a missing sample": (lambda members: members[3:], ["train-0.tar", "has 2 samples", "says 3"]),
    "a sample too many": (
        lambda members: [*members, *((f"x{name}", content) for name, content in members[:3])],
        ["train-0.tar", "has more samples than the 3"],
    ),
    "no PNG": (replace("k00002.m0.png", b"GIF89a"), ["train-0.tar", "k00002.m0.png", "decoded"]),
    "half a PNG": (
        replace("k00002.m0.png", png(picture(2, SHAPES["m0"]))[:60]),
        ["train-0.tar", "k00002.m0.png", "decoded"],
    ),
    "another size": (
        replace("k00002.m0.png", png(picture(2, (3, 5, 4)))),
        ["train-0.tar", "k00002.m0.png", "RGB image of 5×4", "RGB of 4×5"],
    ),
    "grey for colour": (
        replace("k00002.m0.png", png(picture(2, (1, 4, 5)))),
        ["train-0.tar", "k00002.m0.png", "L image"],
    ),
    "a label out of range": (replace("k00002.cls", b"10"), ["train-0.tar", "k00002.cls", "0..9"]),
    "a label that is no number": (replace("k00002.cls", b"-1"), ["train-0.tar", "k00002.cls", "b'-1'"]),
}


DAMAGES["a sample that is there twice"] = (
    lambda members: [*members[:6], *members[:3]],
    ["train-0.tar", "k00000 occurs twice"],
)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(make_folder, damage):
    change, words = DAMAGES[damage]
    folder = make_folder([3], change=change)
    with pytest.raises(UserError) as problem:
        list(training(folder).epoch_batches(0))
    for word in [*words, "cmvae inspect"]:
        assert word in str(problem.value)


def damage_key(key, change):
    """Change the members of one sample only, in whatever shard it is."""

    def apply(members):
        mine = [member for member in members if member[0].startswith(key)]
        others = [member for member in members if not member[0].startswith(key)]
        place = next((n for n, member in enumerate(members) if member in mine), len(members))
        return [*others[:place], *(change(mine) if mine else []), *others[place:]]

    return apply


# What is wrong with sample 4 of nine, in three shards of three.
SPOILT = {
    "a pickle": lambda mine: [*mine, ("k00004.pyd", pickle.dumps(Trap()))],
    "a path": lambda mine: [("../k00004.cls", b"1"), *mine],
    "a missing member": lambda mine: mine[:-1],
    "a repeated member": lambda mine: [mine[0], *mine],
    "another sample's key": lambda mine: [(name.replace("4", "3"), content) for name, content in mine],
    "no PNG": replace("k00004.m0.png", b"GIF89a"),
    "another size": replace("k00004.m0.png", png(picture(4, (3, 5, 4)))),
    "a label out of range": replace("k00004.cls", b"10"),
    "a sample that is not there": lambda mine: [],
}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_damaged_sample_is_skipped_and_reported_and_no_batch_is_lost(make_folder, spoilt, num_workers):
    folder = make_folder([3, 3, 3], change=damage_key("k00004", SPOILT[spoilt]))
    if spoilt == "another sample's key":
        # Side by side they would be one sample, with members twice. Apart, the second one is skipped.
        write_tar_apart(folder)
    read, lengths = [], []
    for rank in range(2):
        loader = EvaluationLoader(
            folder,
            split="train",
            modalities=["m0", "m1"],
            batch_size=2,
            rank=rank,
            world_size=2,
            num_workers=num_workers,
            on_error="skip",
        )
        batches = list(loader)
        lengths.append(len(batches))
        read += batches
    valid = [key for b in read for key, counts in zip(b["key"], b["valid"], strict=True) if counts]
    assert valid == [f"k{number:05d}" for number in range(9) if number != 4]
    assert lengths == [3, 3]
    for batch in read:
        if batch["valid"].any():  # else there is nothing in it that could stand in
            check_content(batch)
    (reported,) = [problem for batch in read for problem in batch["skipped"]]
    assert "train-1.tar: " in reported
    assert "cmvae inspect" in reported


def write_tar_apart(folder):
    """Shard 1 with the samples 3, 5 and 3 again."""
    members = [
        (f"k{number:05d}.{suffix}", content)
        for number in (3, 5, 3)
        for suffix, content in members_of(number).items()
    ]
    write_tar(folder / "train-1.tar", members)
    write_index(folder, "train", [3, 3, 3])


@pytest.mark.parametrize("kept_bytes", [0, 10**6])
def test_a_cut_shard_costs_what_it_lost_in_every_epoch_and_no_batch(make_folder, kept_bytes):
    folder = make_folder([4, 4])
    shard = folder / "train-1.tar"
    # Each member takes a header and a block: the cut is within the second sample.
    shard.write_bytes(shard.read_bytes()[: 512 * 9])
    loader = training(folder, batch_size=2, on_error="skip", cache_bytes=kept_bytes)
    for epoch in range(3):
        batches = list(loader.epoch_batches(epoch))
        assert len(batches) == 4
        valid = [key for b in batches for key, counts in zip(b["key"], b["valid"], strict=True) if counts]
        assert sorted(valid) == [f"k{number:05d}" for number in range(5)]
        reported = [problem for batch in batches for problem in batch["skipped"]]
        assert len(reported) == 3
        assert "train-1.tar: after 1 samples" in "".join(reported)


def test_a_batch_of_damaged_samples_is_as_large_as_any(make_folder):
    change = replace("k00000.m0.png", b"x")
    loader = training(make_folder([1], change=change), batch_size=1, on_error="skip")
    (batch,) = loader.epoch_batches(0)
    assert not batch["valid"].any()
    assert batch["mask"].all()
    assert not batch["m0"].any()


def test_a_disk_that_fails_is_no_damage(make_folder, monkeypatch):
    """Another rank may read what this one cannot: skipped here alone, it would be no longer alike."""

    def failing(*_, **__):
        raise OSError(errno.EIO, "Input/output error")
        yield

    monkeypatch.setattr(split_reader, "read_members", failing)
    loader = training(make_folder([4]), on_error="skip")
    with pytest.raises(UserError, match=r"train-0\.tar: cannot be read: Input/output error"):
        list(loader.epoch_batches(0))


def test_a_missing_shard_is_an_error_all_the_same(make_folder):
    folder = make_folder([4, 4])
    (folder / "train-1.tar").unlink()
    with pytest.raises(UserError, match=r"train-1\.tar: missing"):
        training(folder, on_error="skip")


def test_damage_in_a_worker_process_reads_the_same(make_folder):
    change, words = DAMAGES["no PNG"]
    message = ""
    try:
        list(training(make_folder([3], change=change), num_workers=1).epoch_batches(0))
    except UserError as error:  # pytest.raises would keep the loader, and a late garbage collection waits 5 s
        message = str(error)
    assert words[1] in message
    assert "Traceback" not in message


def test_a_jpeg_is_not_taken_for_a_png(make_folder):
    buffer = io.BytesIO()
    Image.fromarray(picture(2, (4, 5, 3))).save(buffer, "JPEG")
    folder = make_folder([3], change=replace("k00002.m0.png", buffer.getvalue()))
    with pytest.raises(UserError, match="decoded as PNG"):
        list(training(folder).epoch_batches(0))


@pytest.mark.parametrize("length", [700, 512 * 9, 512 * 12 + 100])
def test_a_truncated_tar_is_named(make_folder, length):
    folder = make_folder([4])
    shard = folder / "train-0.tar"
    shard.write_bytes(shard.read_bytes()[:length])
    with pytest.raises(UserError, match=r"train-0\.tar: has \d+ bytes, but its index says \d+"):
        training(folder)
    # The same while reading, where the index agrees with the short file.
    write_index(folder, "train", [4])
    with pytest.raises(UserError, match=r"train-0\.tar"):
        list(training(folder).epoch_batches(0))


def test_what_is_no_tar_is_named(make_folder):
    folder = make_folder([4])
    (folder / "train-0.tar").write_bytes(b"\x01" * 5000)
    write_index(folder, "train", [4])
    with pytest.raises(UserError, match=r"train-0\.tar"):
        list(training(folder).epoch_batches(0))


def test_a_shard_name_that_leaves_the_folder_is_refused(make_folder):
    folder = make_folder([4])
    index = folder / "index.json"
    for name in ("../train-0.tar", "/etc/passwd.tar", "..tar", "pipe:cat x.tar"):
        changed = json.loads(index.read_text())
        changed["splits"]["train"]["shards"][0]["name"] = name
        index.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"index\.json.*plain file name"):
            training(folder)


def test_what_is_missing_is_named_at_once(make_folder):
    folder = make_folder([4, 4])
    with pytest.raises(UserError, match=r"no modality 'm7'; it has m0, m1"):
        training(folder, modalities=["m7"])
    with pytest.raises(UserError, match=r"no split 'test'; it has train"):
        training(folder, split="test")
    with pytest.raises(UserError, match=r"train\.batch_size: the ranks together read 9"):
        training(folder, batch_size=9)
    (folder / "train-1.tar").unlink()
    with pytest.raises(UserError, match=r"train-1\.tar: missing"):
        training(folder)
    write_tar(folder / "train-1.tar", [])
    with pytest.raises(UserError, match=r"train-1\.tar: has \d+ bytes"):
        training(folder)
