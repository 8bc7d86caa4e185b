"""Checkpoints that are whole or absent: written beside, flushed, renamed; found, loaded, thinned out."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator

from cmvae.config import ExperimentConfig, flatten
from cmvae.errors import UserError
from cmvae.files import publish_folder
from cmvae.tasks import Task
from cmvae.training.ema import WeightAverage
from cmvae.training.state import TrainState

STATE_NAME = "state.json"
_CHECKPOINT_NAME = re.compile(r"step-(\d{8})")

# What a run may change when it goes on: what it reports, and how long it trains. A CMVAE may move: whether it
# is the same is told by its hash.
_CHANGEABLE = re.compile(
    r"name|output_dir|cmvae|refiner\.sampler\..*|tracking\..*|evaluation\..*"
    r"|data\.(shards|num_workers|cache_megabytes)"
    r"|train\.(log_every|validate_every|checkpoint_every|keep_checkpoints)"
)
_LENGTH = re.compile(r"train\.(epochs|max_steps)")


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    state: TrainState,
    config: ExperimentConfig,
    task: Task,
    average: WeightAverage | None,
) -> Path:
    """Write `folder/step-XXXXXXXX` and remove the oldest ones; to be called on all ranks.

    It holds what `Accelerator.save_state` saves (weights, optimizer, scaler, random streams of every rank),
    the average of the weights if there is one, and `state.json`: the counters, the world size, the settings
    and the hashes of what the task belongs to.
    """
    path = folder / f"step-{state.step:08d}"
    partial = folder / f".{path.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        content = {
            "state": asdict(state),
            **_describe_launch(accelerator),
            "belongs_to": task.belongs_to,
            "settings": flatten(config),
        }
        if average is not None:
            average.save(partial)
        (partial / STATE_NAME).write_text(json.dumps(content, indent=1), encoding="utf-8")
        publish_folder(partial, path)
        for old in list_checkpoints(folder)[: -config.train.keep_checkpoints]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the newest last."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if _CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(path for path in named if (path / STATE_NAME).is_file())


def load_checkpoint(
    accelerator: Accelerator,
    path: Path,
    config: ExperimentConfig,
    task: Task,
    average: WeightAverage | None,
) -> TrainState:
    """Restore weights, their average, optimizer and random streams; to be called on all ranks.

    Raises:
        UserError: the checkpoint was written by another number of ranks, under another way of distributing,
            with settings that cannot change within a run, or for another CMVAE.
    """
    content = json.loads((path / STATE_NAME).read_text(encoding="utf-8"))
    for key, value in _describe_launch(accelerator).items():
        if content[key] != value:
            raise UserError(
                f"{path}: written with {key} {content[key]}, but this run has {value}. Launch it as it was "
                "launched before, or start a new run with output_dir=…"
            )
    _check_settings(path, content["settings"], flatten(config))
    if content["belongs_to"] != task.belongs_to:
        raise UserError(
            f"{path}: belongs to {content['belongs_to']}, but this run has {task.belongs_to}: the CMVAE is "
            "another than the one that this training began with. Bring that back, or start a new run with "
            "output_dir=…"
        )
    accelerator.load_state(str(path))
    if average is not None:
        average.load(path)
    return TrainState(**content["state"])


def _describe_launch(accelerator: Accelerator) -> dict[str, int | str]:
    """What must be the same again for a checkpoint to fit."""
    return {
        "world_size": accelerator.num_processes,
        "distributed_type": str(accelerator.distributed_type.value),
    }


def _check_settings(path: Path, before: dict[str, object], now: dict[str, object]) -> None:
    schedule = now["optimizer.schedule"]
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key) or _CHANGEABLE.fullmatch(key):
            continue
        reason = ""
        if _LENGTH.fullmatch(key):
            if schedule == "constant":
                continue
            reason = f"; with optimizer.schedule: {schedule} the length decides every learning rate"
        raise UserError(
            f"{path}: {key} was {before.get(key)!r} and is now {now.get(key)!r}{reason}. Set it back to go "
            "on, or start a new run with output_dir=…"
        )
