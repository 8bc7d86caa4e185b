"""A split that is kept in memory gives the batches that are read from shards."""

from __future__ import annotations

import pytest
import torch
from mixed import Mixed

from cmvae.data.index import ShardIndex
from cmvae.data.plan import TrainingPlan
from cmvae.data.reader import TrainingLoader
from cmvae.data.resident import ResidentLoader
from cmvae.data.split_reader import SplitReader
from cmvae.datasets.writer import write_shards
from cmvae.training.checkpoint_folder import list_checkpoints
from cmvae.training.run import run_training
from cmvae.utils.errors import UserError

SIZES = [7, 11, 3, 9, 13, 5]
CPU = torch.device("cpu")


def both(folder, **changes):
    settings = {"modalities": ["m0", "m1"], "batch_size": 3, "seed": 5, "shuffle_window": 12, **changes}
    return TrainingLoader(folder, **settings), resident_loader(folder, **settings)


def resident_loader(
    folder, *, modalities, batch_size, split="train", seed=0, rank=0, world_size=1, shuffle_window=4096,
    on_error="error", device=CPU,
):  # fmt: skip
    shards = SplitReader(folder, split, modalities, on_error)
    plan = TrainingPlan(shards.sizes, batch_size * world_size, seed, shuffle_window)
    return ResidentLoader(shards, plan, rank, world_size, device)


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, values in first.items():
        if isinstance(values, torch.Tensor):
            assert values.dtype == second[name].dtype
            assert torch.equal(values, second[name]), name
        else:
            assert values == second[name], name


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rank": 1, "world_size": 2},
        {"modalities": ["m1"]},
    ],
)
def test_batches_are_those_of_the_shards(make_folder, changes):
    streaming, resident = both(make_folder(SIZES), **changes)
    assert resident.batches_per_epoch == streaming.batches_per_epoch
    for epoch, skipped in ((0, 0), (1, 0), (1, 2), (7, 1)):
        expected, found = (
            list(loader.epoch_batches(epoch, skip_batches=skipped)) for loader in (streaming, resident)
        )
        assert len(expected) == len(found) > 0
        for one, other in zip(expected, found, strict=True):
            assert_equal(one, other)


def test_samples_may_lack_a_modality_or_have_a_group(quadrants_shards, tmp_path):
    write_shards(Mixed(missing=0.3), tmp_path / "mixed")
    for folder, split, names in (
        (tmp_path / "mixed", "train", list(Mixed.modalities)),
        (quadrants_shards, "test", ["m0", "m2"]),
    ):
        streaming, resident = both(folder, split=split, modalities=names)
        for one, other in zip(streaming.epoch_batches(0), resident.epoch_batches(0), strict=True):
            assert_equal(one, other)
        complete = [bool(batch["mask"].all()) for batch in resident.epoch_batches(0)]
        assert ("group" in one, all(complete)) == ((False, False) if split == "train" else (True, True))


def test_a_damaged_sample_is_reported_and_not_valid(make_folder):
    def spoil(members):
        return [(name, b"GIF89a" if name == "k00004.m0.png" else content) for name, content in members]

    folder = make_folder([6, 6], change=spoil)
    with pytest.raises(UserError, match=r"train-0\.tar: .*k00004\.m0\.png"):
        both(folder)
    streaming, resident = both(folder, on_error="skip")
    for one, other in zip(streaming.epoch_batches(0), resident.epoch_batches(0), strict=True):
        for name in ("key", "label", "valid", "skipped", "position", "mask"):
            intact = one["valid"].tolist()
            if name in ("key", "label"):
                pairs = zip(one[name], other[name], intact, strict=True)
                assert all(a == b for a, b, counts in pairs if counts)
            elif name in ("valid", "position"):
                assert torch.equal(one[name], other[name])
        assert one["skipped"] == other["skipped"]


def test_a_split_that_does_not_fit_a_gpu_is_refused(make_folder, monkeypatch):
    folder = make_folder(SIZES)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000, 10**9))
    with pytest.raises(
        UserError, match=r"data\.on_device: the train split takes .*Set data\.on_device=false"
    ):
        resident_loader(folder, device=torch.device("cuda"), modalities=["m0", "m1"], batch_size=3)


def test_a_training_on_it_is_the_same_training(experiment, tmp_path):
    weights = []
    for on_device in ("false", "true"):
        config = experiment(f"data.on_device={on_device}", f"output_dir={tmp_path / on_device}")
        run_training(config, ShardIndex.load(config.data.shards))
        newest = list_checkpoints(config.run_dir / "checkpoints")[-1]
        weights.append((newest / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
