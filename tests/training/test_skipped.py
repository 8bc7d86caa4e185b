"""Trainings on shards of which some samples are damaged."""

import json
import logging

import pytest
from accelerate import Accelerator
from faulty_training import Training

from cmvae.data.index import ShardIndex
from cmvae.tracking import Tracker
from cmvae.training import run
from cmvae.training.meters import SkippedSamples
from cmvae.utils.errors import UserError

SETTINGS = ("train.max_steps=12", "train.checkpoint_every=7")


def test_a_damaged_sample_ends_a_training_by_default(tmp_path, damaged_shards):
    training = Training(tmp_path / "run", damaged_shards, SETTINGS)
    assert training.run() == 2
    assert ".m1.png: cannot be decoded as PNG" in training.log


def test_a_training_goes_on_without_damaged_samples(tmp_path, damaged_shards):
    training = Training(tmp_path / "run", damaged_shards, (*SETTINGS, "data.on_error=skip"))
    assert training.run() == 0, training.log
    # 10 batches an epoch, so that two epochs meet them: told once each.
    told = [line for line in training.log.splitlines() if "skipped a sample: " in line]
    assert len(told) == len(set(told)) == 3
    assert "skipped a sample: " in (training.folder / "logs/rank-0.log").read_text()


def test_more_damaged_samples_than_may_be_skipped_end_a_training(tmp_path, damaged_shards):
    overrides = (*SETTINGS, "data.on_error=skip", "data.max_skipped=2")
    training = Training(tmp_path / "run", damaged_shards, overrides)
    assert training.run() == 2
    assert "error: data.max_skipped: 3 damaged samples were skipped, at most 2 are allowed" in training.log
    longer = Training(tmp_path / "run", damaged_shards, (*SETTINGS, "data.on_error=skip"))
    assert longer.run(resume=True) == 0, longer.log


def test_what_was_skipped_is_a_curve(experiment, damaged_shards, monkeypatch):
    points = []

    class Recorder(Tracker):
        def log_metrics(self, metrics, step):
            points.extend((name, step, value) for name, value in metrics.items() if "skipped" in name)

    monkeypatch.setattr(run, "open_tracker", lambda *_: Recorder())
    index = json.loads((damaged_shards / "index.json").read_text())
    shard = damaged_shards / index["splits"]["validation"]["shards"][0]["name"]
    shard.write_bytes(shard.read_bytes().replace(b"PNG", b"GIF", 1))
    settings = [f"data.shards={damaged_shards}", "data.on_error=skip", "data.cache_megabytes=0"]
    config = experiment(*settings, "train.max_steps=20", "train.log_every=10", "train.validate_every=10")
    run.run_training(config, ShardIndex.load(config.data.shards))
    assert points == [
        (name, step, count)
        for step in (10, 20)
        for name, count in (("train/skipped_samples", 3), ("validation/skipped_samples", 1))
    ], "ten batches are an epoch"
    # Two epochs, and three validations, decode each of them anew.
    log = (config.run_dir / "logs/rank-0.log").read_text()
    assert log.count("skipped a sample: ") == 4


def test_every_epoch_counts_anew_and_tells_once(caplog):
    skipped, alone = SkippedSamples(2), Accelerator(cpu=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            skipped.begin_epoch()
            skipped.add(alone, ["a.tar: x"])
            skipped.add(alone, ["a.tar: y"])
            assert skipped.count == 2
    assert len(caplog.records) == 2
    with pytest.raises(UserError, match="3 damaged samples"):
        skipped.add(alone, ["a.tar: z"])
