"""Checkpoints that are whole or absent: written beside, flushed, renamed; and loaded."""

from __future__ import annotations

import shutil
from pathlib import Path

from accelerate import Accelerator

from cmvae.config import ExperimentConfig, flatten
from cmvae.distributed import zero_stage
from cmvae.errors import UserError
from cmvae.files import publish_folder
from cmvae.tasks import Task
from cmvae.training.checkpoint_folder import checkpoint_path, thin_out, write_manifest
from cmvae.training.ema import WeightAverage
from cmvae.training.record import CheckpointRecord
from cmvae.training.state import TrainState


def save_checkpoint(
    accelerator: Accelerator,
    folder: Path,
    state: TrainState,
    config: ExperimentConfig,
    task: Task,
    average: WeightAverage | None,
) -> Path:
    """Write `folder/step-XXXXXXXX` and remove those no longer wanted; to be called on all ranks.

    It holds what `Accelerator.save_state` saves (weights, optimizer, scaler, random streams of every rank),
    the average of the weights if there is one, `state.json` (see `CheckpointRecord`) and the checksums of
    all of these. The newest `train.keep_checkpoints` are kept, and that of the best validation.
    """
    path = checkpoint_path(folder, state.step)
    partial = folder / f".{path.name}.partial"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if average is not None:
            average.save(partial)
        record = CheckpointRecord(
            state=state,
            world_size=accelerator.num_processes,
            zero_stage=zero_stage(accelerator),
            belongs_to=task.belongs_to,
            settings=flatten(config),
        )
        record.write(partial)
        write_manifest(partial)
        publish_folder(partial, path)
        thin_out(folder, config.train.keep_checkpoints, state.best_step)
    accelerator.wait_for_everyone()
    return path


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
    record = CheckpointRecord.read(path)
    record.check_launch(path, accelerator.num_processes)
    record.check_settings(path, flatten(config))
    _check_zero_stage(path, record.zero_stage, zero_stage(accelerator))
    if record.belongs_to != task.belongs_to:
        raise UserError(
            f"{path}: belongs to {record.belongs_to}, but this run has {task.belongs_to}: the CMVAE is "
            "another than the one that this training began with. Bring that back, or start a new run with "
            "output_dir=…"
        )
    accelerator.load_state(str(path))
    if average is not None:
        average.load(path)
    return record.state


def _check_zero_stage(path: Path, before: int, now: int) -> None:
    if before == now:
        return
    names = {stage: f"ZeRO-{stage}" if stage else "plain data parallelism" for stage in (before, now)}
    remedy = f"configs/accelerate/zero{before}.yaml" if before else "configs/accelerate/ddp.yaml"
    raise UserError(
        f"{path}: written under {names[before]}, but this run has {names[now]}. Launch it with {remedy} as "
        "before, or start a new run with output_dir=…"
    )
