"""Checkpoints that are whole or absent: written beside, flushed, renamed; and loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import SAFE_MODEL_NAME, set_seed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cmvae.config import ExperimentConfig, flatten
from cmvae.data.plan import WorldSizeChange
from cmvae.distributed import raise_on_all_ranks, run_on_main, zero_stage
from cmvae.training.checkpoint_folder import checkpoint_path, list_checkpoints, thin_out, write_manifest
from cmvae.training.optimization import WeightAverage
from cmvae.training.state import CheckpointRecord, TrainState
from cmvae.training.tasks import Task
from cmvae.utils.errors import UserError
from cmvae.utils.files import publish_folder
from cmvae.utils.seeds import derive_seed

# What DistributedDataParallel puts before the names of the weights.
_WRAPPER = "module."


class CheckpointError(UserError):
    """A checkpoint could not be written; those before it are intact. Raised on all ranks alike."""


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

    Raises:
        CheckpointError: there is no room for it, or some rank could not write.
    """
    path = checkpoint_path(folder, state.step)
    partial = folder / f".{path.name}.partial"
    record = CheckpointRecord(
        state=state,
        world_size=accelerator.num_processes,
        zero_stage=zero_stage(accelerator),
        frozen_hashes=task.frozen_hashes,
        settings=flatten(config),
    )

    def prepare() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _check_space(folder, task, config)

    def complete() -> None:
        if average is not None:
            average.save(partial)
        record.write(partial)
        write_manifest(partial)
        publish_folder(partial, path)
        thin_out(folder, config.train.keep_checkpoints, state.best_step)

    try:
        run_on_main(accelerator, lambda: _explaining(prepare))
        raise_on_all_ranks(
            accelerator, _failure(lambda: accelerator.save_state(str(partial))), CheckpointError
        )
        run_on_main(accelerator, lambda: _explaining(complete))
    except CheckpointError:
        if accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return path


def _failure(write: Callable[[], object]) -> str | None:
    """What a full disk or a folder that takes no files makes of writing, or None."""
    try:
        write()
    # torch reports a failed write as a RuntimeError, and safetensors as one of its own.
    except (OSError, RuntimeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _explaining(write: Callable[[], None]) -> None:
    problem = _failure(write)
    if problem is not None:
        raise CheckpointError(f"rank 0: {problem}")


def _check_space(folder: Path, task: Task, config: ExperimentConfig) -> None:
    earlier = list_checkpoints(folder)
    if earlier:
        needed = sum(path.stat().st_size for path in earlier[-1].rglob("*") if path.is_file())
    else:
        # Weights, Adam's two states or three, ZeRO's own copy of the weights, their average: 4 bytes each.
        # Under ZeRO-3 a parameter's own size is that of this rank's part.
        numbers = sum(getattr(weights, "ds_numel", weights.numel()) for weights in task.parameters())
        needed = 4 * numbers * (4 + config.optimizer.amsgrad + (config.train.ema_decay is not None))
    free = shutil.disk_usage(folder).free
    if free < 1.05 * needed:
        raise OSError(
            f"{folder}: {free / 1e6:,.1f} MB are free, but a checkpoint takes {needed / 1e6:,.1f} MB. Free "
            "some disk, or set train.keep_checkpoints lower"
        )


def load_checkpoint(
    accelerator: Accelerator,
    path: Path,
    config: ExperimentConfig,
    task: Task,
    average: WeightAverage | None,
) -> TrainState:
    """Restore weights, their average, optimizer and random streams; to be called on all ranks.

    Ranks of another number than wrote it draw from random streams that begin anew.

    Raises:
        UserError: the checkpoint was written by ranks whose number cannot change, under another way of
            distributing, with settings that cannot change within a run, or for another CMVAE.
    """
    record = CheckpointRecord.read(path)
    record.check_resume(path, flatten(config), accelerator.num_processes)
    _check_zero_stage(path, record.zero_stage, zero_stage(accelerator))
    if record.frozen_hashes != task.frozen_hashes:
        raise UserError(
            f"{path}: belongs to {record.frozen_hashes}, but this run has {task.frozen_hashes}: the CMVAE is "
            "another than the one that this training began with. Bring that back, or start a new run with "
            "output_dir=…"
        )
    if record.world_size == accelerator.num_processes:
        accelerator.load_state(str(path))
    else:
        _take_over(accelerator, path, config, task, record)
    if average is not None:
        average.load(path)
    return record.state


def _take_over(
    accelerator: Accelerator, path: Path, config: ExperimentConfig, task: Task, record: CheckpointRecord
) -> None:
    """Restore what ranks of another number wrote, each of which had everything."""

    def load_weights(models: list[nn.Module], folder: str) -> None:
        # Under data parallelism names begin with that of the wrapper, in one process they do not.
        weights = load_file(Path(folder) / f"{SAFE_MODEL_NAME}.safetensors")
        task.load_state_dict({name.removeprefix(_WRAPPER): value for name, value in weights.items()})
        models.clear()  # tells Accelerate that they are loaded

    hook = accelerator.register_load_state_pre_hook(load_weights)
    accelerator.load_state(str(path))
    hook.remove()
    state = record.state
    state.world_size_changes.append(WorldSizeChange(state.epoch, state.batch, record.world_size))
    # numpy's seed has 32 bits.
    set_seed(derive_seed(config.seed, "handover", state.step, accelerator.process_index) % 2**32)


def _check_zero_stage(path: Path, before: int, now: int) -> None:
    if before == now:
        return
    names = {stage: f"ZeRO-{stage}" if stage else "plain data parallelism" for stage in (before, now)}
    remedy = f"configs/accelerate/zero{before}.yaml" if before else "configs/accelerate/ddp.yaml"
    raise UserError(
        f"{path}: written under {names[before]}, but this run has {names[now]}. Launch it with {remedy} as "
        "before, or start a new run with output_dir=…"
    )
