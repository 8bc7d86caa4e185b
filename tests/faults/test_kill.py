"""kill -9 at every kind of moment: what is resumed ends as the undisturbed run, to the bit and the sample."""

import shutil
import threading
import time
from functools import partial

import pytest
from faulty_training import Training, assert_same_end, die, die_before, replace

# Twelve steps of ten batches an epoch: kills fall before and after the turn of an epoch.
SETTINGS = (
    "train.max_steps=12",
    "train.checkpoint_every=2",
    "train.keep_checkpoints=2",
    "train.validate_every=5",
    "train.ema_decay=0.9",
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, digits_shards):
    training = Training(tmp_path_factory.mktemp("undisturbed") / "run", digits_shards, SETTINGS)
    assert training.run() == 0, training.log
    return training


def die_in_weights():
    """The third checkpoint's weights are half written."""
    from cmvae.training import checkpoint

    def half(original, tensors, path):
        original(tensors, path)
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        die()

    # Weights and average: two calls per checkpoint.
    replace(checkpoint, "save_file", half, 5)


def die_while_saving():
    """The checkpoint of step 6 is written but neither flushed nor renamed; the eighth step is under way."""
    from accelerate import Accelerator

    from cmvae.training import checkpoint

    writing = threading.Event()

    def stall(original, *arguments):
        writing.set()
        time.sleep(1000)

    def die_then(original, *arguments):
        writing.wait()
        die()

    # Checkpoints of steps 2, 4, 5 (the first validation) and 6.
    replace(checkpoint, "publish_folder", stall, 4)
    replace(Accelerator, "backward", die_then, 8)


def die_in_deletion():
    from cmvae.utils import files

    def half(original, path, **named):
        (path / "manifest.json").unlink()
        die()

    # The first three have nothing to delete but what an earlier process may have left.
    def only_deletions(original, path, **named):
        if path.name.endswith(".deleted") and path.exists():
            half(original, path, **named)
        return original(path, **named)

    original = shutil.rmtree
    files.shutil.rmtree = partial(only_deletions, original)


CHECKPOINT = "cmvae.training.checkpoint"
FAULTS = {
    "between forward and update": (
        partial(die_before, "accelerate.accelerator:Accelerator", "backward", 8, num_saves=4),
        [5, 6],
    ),
    "while a checkpoint is written": (die_while_saving, [4, 5]),
    "in the first step": (partial(die_before, "accelerate.accelerator:Accelerator", "backward", 1), []),
    "before a checkpoint": (partial(die_before, CHECKPOINT, "list_checkpoints", 3), [2, 4]),
    "in a checkpoint's weights": (die_in_weights, [2, 4]),
    "before a checkpoint's record": (
        partial(die_before, f"{CHECKPOINT}:CheckpointRecord", "write", 3),
        [2, 4],
    ),
    "before the flush and rename": (partial(die_before, CHECKPOINT, "publish_folder", 3), [2, 4]),
    "after the rename": (partial(die_before, CHECKPOINT, "thin_out", 3), [2, 4, 5]),
    "in the deletion of an old one": (die_in_deletion, [4, 5]),
    "in a validation": (
        partial(die_before, "cmvae.training.trainer:Trainer", "validate", 1, num_saves=2),
        [2, 4],
    ),
    "in the export": (partial(die_before, "cmvae.models.export", "save_file", 1), [10, 12]),
}
QUICK = ("while a checkpoint is written", "in a checkpoint's weights")


@pytest.mark.parametrize(
    ("fault", "left"),
    [
        pytest.param(*values, id=name, marks=[] if name in QUICK else pytest.mark.faults)
        for name, values in FAULTS.items()
    ],
)
def test_a_killed_training_ends_as_if_nothing_had_happened(tmp_path, digits_shards, undisturbed, fault, left):
    training = Training(tmp_path / "run", digits_shards, SETTINGS)
    assert training.run(fault) == -9, training.log
    assert training.steps == left
    assert training.run(resume=True) == 0, training.log
    assert ("resumed from" in training.log) == bool(left)
    assert_same_end(training, undisturbed)
    exported = [(run.folder / "export/model.safetensors").read_bytes() for run in (training, undisturbed)]
    assert exported[0] == exported[1]
    assert training.steps == undisturbed.steps
    assert all(path.name.startswith("step-") for path in (training.folder / "checkpoints").iterdir())


@pytest.mark.faults
def test_a_training_that_is_killed_in_every_step_gets_there_in_the_end(tmp_path, digits_shards, undisturbed):
    training = Training(tmp_path / "run", digits_shards, (*SETTINGS, "train.checkpoint_every=1"))
    fault = partial(die_before, "accelerate.accelerator:Accelerator", "backward", 2, num_saves=1)
    kills = 0
    while (code := training.run(fault, resume=True)) != 0:
        assert code == -9, training.log
        kills += 1
    assert kills == 11
    assert_same_end(training, undisturbed)
