"""A run that goes on with another number of ranks."""

import json
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, run_command
from safetensors.torch import load_file

from cmvae.config import load_config
from cmvae.data.reader import TrainingLoader
from cmvae.utils.seeds import derive_seed

LOGGED = Path(__file__).with_name("world_size_change_log.py")
TRAIN = ROOT / "launch/train.py"
GLOBAL_BATCH = 16
"""Ten of these make an epoch."""


def train(folder, experiment_file, ranks, steps, *arguments, global_batch=GLOBAL_BATCH):
    """A training of `ranks` ranks up to a step, which must end well."""
    launch = ["accelerate", "launch", f"--config_file={ROOT}/configs/accelerate/ddp.yaml"]
    command = (
        [*launch, f"--num_processes={ranks}", "--main_process_port=0"] if ranks > 1 else [sys.executable]
    )
    settings = [
        f"output_dir={folder / 'run'}",
        f"train.batch_size={global_batch // ranks}",
        f"train.max_steps={steps}",
        "train.checkpoint_every=null",
        "train.ema_decay=0.9",
    ]
    folder.mkdir(exist_ok=True)
    # A log of its own for each start: what a rank read before is not mixed up with what it reads now.
    log = folder / f"{ranks}-to-{steps}"
    done = run_command([*command, LOGGED, log, TRAIN, experiment_file, *settings, *arguments], ROOT)
    assert done.returncode == 0, done.stderr
    return done


def read_batches(folder):
    """Keys that all ranks read together, and what their noise is a function of, by (epoch, batch)."""
    batches, streams = {}, {}
    for log in sorted(folder.glob("*-to-*")):
        for line in log.read_text().splitlines():
            epoch, batch, keys, seed, places = json.loads(line)
            batches.setdefault((epoch, batch), []).extend(keys)
            streams.setdefault((epoch, batch), []).extend((seed, place) for place in places)
    return batches, streams


@pytest.mark.parametrize(("before", "after"), [(2, 1), pytest.param(1, 2, marks=pytest.mark.faults)])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, experiment_file, before, after):
    train(tmp_path, experiment_file, before, 4)
    # The second resume is one with the same number of ranks, in the same epoch.
    for steps in (7, 12):
        done = train(tmp_path, experiment_file, after, steps, "--resume")
        assert "resumed from" in done.stdout
    batches, streams = read_batches(tmp_path)
    assert sorted(batches) == [(0, n) for n in range(1, 11)] + [(1, 1), (1, 2)]
    assert {len(keys) for keys in batches.values()} == {GLOBAL_BATCH}
    # The noise of a step is that of a run of any number of ranks: one stream per place in the global batch.
    for step, found in enumerate(streams[place] for place in sorted(streams)):
        seed = derive_seed(0, "step", step)
        assert found == [(seed, place) for place in range(GLOBAL_BATCH)]
    first_epoch = [key for (epoch, _), keys in batches.items() if epoch == 0 for key in keys]
    assert len(set(first_epoch)) == len(first_epoch) == 160
    # Later epochs are those of a run that always had so many ranks.
    loader = TrainingLoader(
        load_config(experiment_file).data.shards,
        modalities=["m0"],
        batch_size=GLOBAL_BATCH // after,
        world_size=after,
    )
    first = next(loader.epoch_batches(1))["key"]
    assert set(first) <= set(batches[1, 1])
    state = json.loads((tmp_path / "run/checkpoints/step-00000012/state.json").read_text())
    assert (state["world_size"], state["state"]["samples"]) == (after, 12 * GLOBAL_BATCH)
    assert state["state"]["world_size_changes"] == [{"epoch": 0, "batch": 4, "world_size": before}]


@pytest.mark.faults
def test_weights_optimizer_and_average_go_on(tmp_path, experiment_file):
    """With all of the data in each batch, the samples of a step do not depend on the ranks either."""
    whole = {"global_batch": 160}
    train(tmp_path / "undisturbed", experiment_file, 1, 3, **whole)
    third = end_of_training(tmp_path / "undisturbed", 3)
    train(tmp_path / "undisturbed", experiment_file, 1, 6, "--resume", **whole)
    sixth = end_of_training(tmp_path / "undisturbed", 6)
    for before, after in ((2, 1), (1, 2)):
        folder = tmp_path / f"{before}-{after}"
        train(folder, experiment_file, before, 3, **whole)
        train(folder, experiment_file, after, 6, "--resume", **whole)
        for expected, begun, reached in zip(sixth, third, end_of_training(folder, 6), strict=True):
            # Sums over other parts of a batch round differently.
            assert (reached - expected).norm() < 0.01 * (expected - begun).norm()


def end_of_training(folder, step):
    """All weights, all of their averages, and all of Adam's states, as one vector each."""
    checkpoint = folder / f"run/checkpoints/step-{step:08d}"
    weights = load_file(checkpoint / "model.safetensors")
    average = load_file(checkpoint / "ema.safetensors")
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    vectors = [
        [weights[name] for name in sorted(weights, key=lambda name: name.removeprefix("module."))],
        [average[name] for name in sorted(average)],
        *([optimizer[n][key] for n in sorted(optimizer)] for key in ("exp_avg", "exp_avg_sq")),
    ]
    return [torch.cat([tensor.flatten().double() for tensor in vector]) for vector in vectors]


def test_what_cannot_be_handed_over_is_refused_in_the_first_second(tmp_path, experiment_file):
    """The records are those of checkpoints; nothing but `state.json` is read."""
    train(tmp_path, experiment_file, 1, 2)
    record = tmp_path / "run/checkpoints/step-00000002/state.json"
    written = json.loads(record.read_text())
    command = [sys.executable, TRAIN, experiment_file, "--resume", f"output_dir={tmp_path / 'run'}"]
    settings = ["train.ema_decay=0.9", "train.checkpoint_every=null"]

    def refusal(changed, ranks, batch_size):
        record.write_text(json.dumps(written | changed))
        overrides = [*settings, f"train.batch_size={batch_size}"]
        done = run_command([*command, *overrides], ROOT, WORLD_SIZE=str(ranks))
        assert done.returncode == 2
        return done.stderr

    assert "Set train.batch_size=8 to keep the global batch" in refusal({}, 2, 16)
    assert "which the 3 ranks of this run cannot share evenly" in refusal({}, 3, 16)
    told = refusal({"zero_stage": 2, "world_size": 2}, 4, 4)
    assert "written by 2 rank(s) under ZeRO-2" in told
    assert "cmvae train CONFIG … --launch zero2 --num-processes 2 --resume" in told
