"""Full disks, folders that take no files, hangs, memory: told with what to do, and nothing older is lost."""

import errno
import logging
import os
import resource
import shutil
import subprocess
import threading
import time
from collections import namedtuple
from functools import partial

import pytest
import torch
from faulty_training import Training, replace

from cmvae.training import watchdog as heartbeat
from cmvae.training.rank_log import rank_log
from cmvae.training.run import out_of_memory_advice
from cmvae.training.watchdog import EXIT_HUNG, Heartbeat

SETTINGS = ("train.max_steps=6", "train.checkpoint_every=2")
Usage = namedtuple("Usage", "total used free")


def fill_disk(checks):
    """The disk is full at the given checks for room, counted from one."""
    count = iter(range(1, 100))
    shutil.disk_usage = lambda _: Usage(10**9, 10**9, 1000 if next(count) in checks else 10**9)


def test_a_full_disk_costs_a_checkpoint_and_not_the_training(tmp_path, digits_shards):
    training = Training(tmp_path / "run", digits_shards, SETTINGS)
    assert training.run(partial(fill_disk, (2,))) == 0, training.log
    assert training.steps == [2, 6]
    (told,) = [line for line in training.log.splitlines() if "no checkpoint of step 4" in line]
    assert "are free, but a checkpoint takes" in told
    assert "The training continues; the last one is of step 2" in told
    assert told.partition("no checkpoint")[2] in (training.folder / "logs/rank-0.log").read_text()


def test_a_full_disk_at_the_end_is_an_error_and_the_last_checkpoint_is_intact(tmp_path, digits_shards):
    training = Training(tmp_path / "run", digits_shards, SETTINGS)
    assert training.run(partial(fill_disk, (2, 3, 4))) == 2
    assert "error: rank 0: OSError: " in training.log
    assert training.steps == [2]
    assert [path.name for path in (training.folder / "checkpoints").iterdir()] == ["step-00000002"]
    assert training.run(resume=True) == 0
    assert training.steps == [4, 6]


def limit_file_size():
    """No file can be larger than the weights: the optimizer's state is cut off while it is written."""
    from cmvae.training import checkpoint

    def limited(original, folder, *arguments):
        original(folder, *arguments)
        size = (folder / "step-00000002/model.safetensors").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 1000, resource.RLIM_INFINITY))

    replace(checkpoint, "thin_out", limited, 1)


@pytest.mark.faults
def test_a_write_that_is_cut_off_leaves_nothing_behind(tmp_path, digits_shards):
    training = Training(tmp_path / "run", digits_shards, SETTINGS)
    assert training.run(limit_file_size) == 2
    assert "no checkpoint of step 4: rank 0: " in training.log
    assert [path.name for path in (training.folder / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB, mounted."""
    disk = tmp_path / "run"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def fill(disk):
    """Something else takes all space but 20 kB."""
    with (disk / "other").open("wb") as file:
        file.write(bytes(max(0, shutil.disk_usage(disk).free - 20_000)))


def fill_after_second_checkpoint(disk):
    from cmvae.training import checkpoint

    replace(checkpoint, "thin_out", lambda original, *arguments: (original(*arguments), fill(disk)), 2)


@pytest.mark.faults
def test_a_real_full_disk(small_disk, digits_shards):
    training = Training(small_disk, digits_shards, ("train.max_steps=40", "train.checkpoint_every=1"))
    assert training.run(partial(fill_after_second_checkpoint, small_disk)) == 2, training.log[-3000:]
    assert "MB are free, but a checkpoint takes" in training.log
    assert len(training.steps) == 2


def fill_during_third_checkpoint(disk):
    from cmvae.training import checkpoint

    def filled(original, *arguments):
        fill(disk)
        try:
            original(*arguments)
        finally:
            (disk / "other").unlink()

    replace(checkpoint, "save_file", filled, 3)


def test_a_disk_that_fills_while_a_checkpoint_is_written(small_disk, digits_shards):
    """There was enough space at its start; later there is again."""
    training = Training(small_disk, digits_shards, ("train.max_steps=8", "train.checkpoint_every=2"))
    assert training.run(partial(fill_during_third_checkpoint, small_disk)) == 0, training.log[-3000:]
    (told,) = [line for line in training.log.splitlines() if "no checkpoint of step 6: rank 0: " in line]
    assert "No space left on device" in told
    assert told.endswith("The training continues; the last one is of step 4")
    assert training.steps == [4, 8]
    assert not list((training.folder / "checkpoints").glob(".*"))


def fail_in_flush():
    """The storage fails when the second checkpoint is flushed, while the training is a step ahead."""
    from cmvae.training import checkpoint
    from cmvae.training.trainer import Trainer

    ahead = threading.Event()

    def fail(original, *arguments):
        ahead.wait()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def note(original, *arguments):
        original(*arguments)
        ahead.set()

    replace(Trainer, "_update", note, 5)
    replace(checkpoint, "publish_folder", fail, 2)


def test_a_storage_that_fails_while_the_training_continues(tmp_path, digits_shards):
    training = Training(tmp_path / "run", digits_shards, SETTINGS)
    assert training.run(fail_in_flush) == 0, training.log
    (told,) = [line for line in training.log.splitlines() if "no checkpoint of step 4" in line]
    assert "rank 0: OSError: [Errno 5] Input/output error. The training continues" in told
    assert told.endswith("the last one is of step 2")
    assert training.steps == [2, 6]
    assert not list((training.folder / "checkpoints").glob(".*"))


def test_a_folder_that_takes_no_files_is_named(tmp_path, digits_shards):
    (tmp_path / "file").touch()
    training = Training(tmp_path / "run", digits_shards, (f"output_dir={tmp_path}/file/run",))
    assert training.run() == 2
    assert f"error: {tmp_path}/file/run: cannot be written: " in training.log
    assert "Set output_dir=…" in training.log


def hang_in_reading():
    from cmvae.data.reader import TrainingLoader

    original = TrainingLoader.epoch_batches

    def hanging(loader, epoch, skip_batches=0):
        for number, batch in enumerate(original(loader, epoch, skip_batches)):
            if number == 3:
                time.sleep(1000)
            yield batch

    TrainingLoader.epoch_batches = hanging


def test_a_hang_ends_with_what_hangs_and_where(tmp_path, digits_shards):
    training = Training(tmp_path / "run", digits_shards, (*SETTINGS, "train.hang_timeout=4"))
    assert training.run(hang_in_reading, timeout=60) == EXIT_HUNG, training.log
    assert "no progress for 4 s (train.hang_timeout)" in training.log
    assert "is behind: it is reading a batch" in training.log
    log = (training.folder / "logs/rank-0.log").read_text()
    assert "Rank 0" in log
    assert "in hanging" in log, "the traceback shows the line that hangs"
    assert training.steps == [2]


@pytest.fixture
def three_ranks(tmp_path):
    """Rank 0 and two more that have written their status; rank 1 is two things behind."""
    ranks = [Heartbeat(tmp_path, rank, 3, timeout=60) for rank in range(3)]
    for rank, beats in enumerate((7, 5, 7)):
        for _ in range(beats - 1):
            ranks[rank].beat("earlier")
        ranks[rank].beat("reading a batch" if rank == 1 else "waiting")
        ranks[rank]._write()
    return ranks


def test_the_rank_that_all_wait_for_is_named(three_ranks):
    told = three_ranks[0]._describe_hang()
    assert "Rank 1 (" in told
    assert ", alive) is behind: it is reading a batch." in told
    assert "Rank 0 (" not in told
    assert "Rank 2 (" not in told
    assert "This is rank 0, waiting." in told


def test_a_rank_that_died_is_told_from_one_that_hangs(three_ranks, tmp_path):
    path = tmp_path / "rank-1.json"
    os.utime(path, (path.stat().st_mtime - 500,) * 2)
    assert "silent for 500 s) is behind" in three_ranks[2]._describe_hang()
    path.unlink()
    assert "Rank 1 never reported." in three_ranks[2]._describe_hang()


def test_what_moves_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat.os, "_exit", lambda code: pytest.fail("ended a training that moves"))
    beating = Heartbeat(tmp_path, 0, 1, timeout=0.4)
    with (tmp_path / "log").open("w") as log, beating.watching(log):
        for _ in range(10):
            time.sleep(0.1)
            beating.beat("working")
    assert (tmp_path / "log").read_text() == ""


def run_out_of_memory():
    from cmvae.training.trainer import Trainer

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    replace(Trainer, "_update", fail, 3)


def test_out_of_memory_names_the_settings(tmp_path, digits_shards):
    training = Training(tmp_path / "run", digits_shards, (*SETTINGS, "objective.num_samples=4"))
    assert training.run(run_out_of_memory) == 2
    for setting in (
        "train.batch_size=8 with train.gradient_accumulation_steps=2",
        "train.mixed_precision=bf16",
        "objective.num_samples below 4",
        "objective.cross_sources=1",
        "objective.decoder_checkpoint_above=32",
        "configs/accelerate/zero2.yaml",
    ):
        assert setting in training.log
    assert "CUDA out of memory" in (training.folder / "logs/rank-0.log").read_text()


def test_advice_is_for_what_is_not_done_yet(experiment):
    config = experiment(
        "train.batch_size=1",
        "train.mixed_precision=bf16",
        "objective.cross_sources=1",
        "objective.decoder_checkpoint_above=2",
    )
    advice = out_of_memory_advice(config, zero_stage=2)
    assert "zero3.yaml" in advice
    for setting in (
        "batch_size",
        "mixed_precision",
        "num_samples",
        "cross_sources",
        "decoder_checkpoint_above",
    ):
        assert setting not in advice
    assert "zero" not in out_of_memory_advice(config, zero_stage=3)


def test_each_rank_writes_its_warnings_and_its_end(tmp_path, capsys):
    logger = logging.getLogger("some.library")

    def work():
        logger.info("too much")
        logger.warning("careful")
        raise ValueError("gone")

    with pytest.raises(ValueError, match="gone"), rank_log(tmp_path / "logs", 3):
        work()
    logger.warning("after the end")
    log = (tmp_path / "logs/rank-3.log").read_text()
    assert "WARNING some.library: careful" in log
    assert 'raise ValueError("gone")' in log
    assert "too much" not in log
    assert "after the end" not in log
    assert "careful" not in capsys.readouterr().err, "other ranks' warnings are not for the terminal"
