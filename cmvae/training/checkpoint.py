"""Checkpoints that are complete or absent, written while the training continues; and loaded."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import MODEL_NAME, OPTIMIZER_NAME, SAFE_WEIGHTS_NAME, SCALER_NAME, recursively_apply
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn, optim

from cmvae.config import ExperimentConfig, flatten
from cmvae.distributed import raise_on_all_ranks, run_on_main, zero_stage
from cmvae.training.background import BackgroundJobs
from cmvae.training.checkpoint_folder import (
    checkpoint_path,
    find_newest,
    list_checkpoints,
    thin_out,
    write_manifest,
)
from cmvae.training.optimization import EMA_NAME, WeightAverage
from cmvae.training.state import CheckpointRecord, TrainState
from cmvae.training.step_checks import NonFiniteError
from cmvae.training.task import Task
from cmvae.utils.errors import UserError
from cmvae.utils.files import publish_folder

_LOGGER = logging.getLogger(__name__)

Files = dict[Path, Callable[[Path], object]]
"""Path → function that writes the file."""


class CheckpointError(UserError):
    """A checkpoint could not be written; earlier ones are intact. Raised on all ranks alike."""


class Checkpointer:
    """Saves and restores all that a run continues from; its methods must be called on all ranks.

    A checkpoint `checkpoints/step-XXXXXXXX` holds weights, optimizer and gradient scaler in the files that
    `Accelerator.load_state` reads, the average of the weights if there is one, `state.json` (see
    `CheckpointRecord`) and the checksums of all these files. It holds no random state, as every step seeds
    its own.

    The state is copied to main memory at once and written by a thread, one checkpoint at a time. Without ZeRO
    rank 0 writes everything in one job. With ZeRO each rank writes its part, and rank 0 completes the
    checkpoint in a second job, after the ranks have agreed that all parts are written.

    Args:
        accelerator: the ranks, which have prepared module and optimizer.
        config: the experiment.
        task: the module that was prepared ...
        module: ... as prepared by the accelerator.
        optimizer: prepared.
        average: moving average of the weights, or None.
    """

    # Not torch.distributed.checkpoint.async_save: its thread communicates, for which runs on GPUs would need
    # a second process group on the CPU; it knows neither checksums nor a rename of the whole; and
    # `Accelerator.load_state` does not read its format.

    def __init__(
        self,
        accelerator: Accelerator,
        config: ExperimentConfig,
        task: Task,
        module: nn.Module,
        optimizer: optim.Optimizer,
        average: WeightAverage | None,
    ) -> None:
        self.state = TrainState()
        """Counters of the run; the loop advances them."""
        self.saved_step = 0
        """Step of the last complete checkpoint; 0 if there is none."""
        self._accelerator, self._config, self._task, self._average = accelerator, config, task, average
        self._module, self._optimizer = module, optimizer
        self._folder = config.run_dir / "checkpoints"
        self._jobs = BackgroundJobs(accelerator, CheckpointError)
        self._record = self._new_record()
        """Record of the checkpoint under way, or of the last one."""

    @property
    def num_finished(self) -> int:
        """Number of jobs that have finished on this rank, for `advance`."""
        return self._jobs.num_finished

    def save(self) -> None:
        """Write a checkpoint, then remove all but the newest `train.keep_checkpoints` and the best one.

        Raises:
            CheckpointError: there is not enough space, or some rank could not write.
        """
        self.wait()
        with self._cleaning_up():
            self._begin()
            self._jobs.finish()

    def start_save(self) -> None:
        """Copy the state, and write it as `save` does while the training continues.

        An error is logged, here or in a later `advance` or `wait`: a training outlives a full disk.
        """
        self.wait()
        with self._warning():
            self._begin()

    def advance(self, num_finished: int) -> None:
        """Continue with the checkpoint under way if all ranks are ready; does not wait, and logs an error.

        Args:
            num_finished: the smallest `num_finished` of all ranks, now or earlier.
        """
        with self._warning():
            self._jobs.advance(num_finished)

    def wait(self) -> None:
        """Wait until the checkpoint under way is complete; an error is logged."""
        with self._warning():
            self._jobs.finish()

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Finish what this rank writes when the block ends, also with an error."""
        try:
            yield
        except NonFiniteError:
            # Raised on all ranks alike, so they can complete a checkpoint together.
            self.wait()
            raise
        finally:
            self._jobs.close()

    @contextmanager
    def _warning(self) -> Iterator[None]:
        """Log why a checkpoint could not be written."""
        try:
            with self._cleaning_up():
                yield
        except CheckpointError as error:
            last = f"the last one is of step {self.saved_step}" if self.saved_step else "there is none yet"
            step = self._record.state.step
            _LOGGER.warning("no checkpoint of step %d: %s. The training continues; %s", step, error, last)

    @contextmanager
    def _cleaning_up(self) -> Iterator[None]:
        """Remove what was written of a checkpoint that could not be completed."""
        try:
            yield
        except CheckpointError:
            if self._accelerator.is_main_process:
                shutil.rmtree(self._unfinished, ignore_errors=True)
            raise

    @property
    def _all_ranks_write(self) -> bool:
        return self._accelerator.distributed_type == DistributedType.DEEPSPEED

    @property
    def _unfinished(self) -> Path:
        """Folder of the checkpoint under way."""
        return self._folder / f".{checkpoint_path(self._folder, self._record.state.step).name}.partial"

    def _begin(self) -> None:
        """Copy the state and start to write it.

        Raises:
            CheckpointError: there is not enough space, or some rank could not copy.
        """
        self._record = record = self._new_record()
        folder, files = self._unfinished, Files()

        def prepare() -> None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._check_space()
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()

        def copy_state() -> None:
            files.update(self._copy_state(folder))

        def write() -> None:
            for path, write_file in files.items():
                write_file(path)

        def complete() -> None:
            if self._accelerator.is_main_process:
                record.write(folder)
                write_manifest(folder)
                publish_folder(folder, checkpoint_path(self._folder, record.state.step))
                thin_out(self._folder, self._config.train.keep_checkpoints, record.state.best_step)

        def write_and_complete() -> None:
            write()
            complete()

        def note_success() -> None:
            self.saved_step = record.state.step

        run_on_main(self._accelerator, lambda: _explaining(prepare))
        raise_on_all_ranks(self._accelerator, _failure(copy_state), CheckpointError)
        jobs = [write, complete] if self._all_ranks_write else [write_and_complete]
        self._jobs.start([partial(_failure, job) for job in jobs], note_success)

    def _copy_state(self, folder: Path) -> Files:
        """Copy what this rank saves to main memory.

        Args:
            folder: where it is to be written.
        """
        accelerator, files = self._accelerator, Files()
        if self._all_ranks_write:
            files |= _copy_deepspeed_state(self._module, folder)
        elif accelerator.is_main_process:
            files[folder / SAFE_WEIGHTS_NAME] = partial(_save_tensors, _copy(self._task.state_dict()))
            files[folder / f"{OPTIMIZER_NAME}.bin"] = partial(torch.save, _copy(self._optimizer.state_dict()))
            if accelerator.scaler is not None:
                files[folder / SCALER_NAME] = partial(torch.save, accelerator.scaler.state_dict())
        if self._average is not None and accelerator.is_main_process:
            files[folder / EMA_NAME] = partial(_save_tensors, _copy(self._average.state_dict()))
        return files

    def load_newest(self) -> bool:
        """Restore the newest checkpoint into everything that it was saved from; whether there is one.

        Raises:
            UserError: the checkpoint was written with another number of ranks that cannot change, by another
                way of distributing, with settings that cannot change, or for another CMVAE.
        """
        accelerator = self._accelerator
        path = run_on_main(accelerator, lambda: find_newest(self._folder))
        if path is None:
            return False
        record = CheckpointRecord.read(path)
        self._check_fits(path, record)
        hook = accelerator.register_load_state_pre_hook(self._load_weights)
        accelerator.load_state(str(path))
        hook.remove()
        if self._average is not None:
            self._average.load(path)
        self.state, self.saved_step = record.state, record.state.step
        accelerator.print(f"resumed from {path} at epoch {self.state.epoch}, step {self.state.step}")
        return True

    def _new_record(self) -> CheckpointRecord:
        return CheckpointRecord(
            state=copy.deepcopy(self.state),
            world_size=self._accelerator.num_processes,
            zero_stage=zero_stage(self._accelerator),
            frozen_hashes=self._task.frozen_hashes,
            settings=flatten(self._config),
        )

    def _check_space(self) -> None:
        earlier = list_checkpoints(self._folder)
        if earlier:
            needed = sum(path.stat().st_size for path in earlier[-1].rglob("*") if path.is_file())
        else:
            # Weights, two or three states of Adam, ZeRO's copy of the weights, their average: 4 bytes each.
            # Under ZeRO-3 a parameter's own size is that of this rank's part.
            numbers = sum(getattr(p, "ds_numel", p.numel()) for p in self._task.parameters())
            needed = 4 * numbers * (4 + self._config.optimizer.amsgrad + (self._average is not None))
        free = shutil.disk_usage(self._folder).free
        if free < 1.05 * needed:
            raise OSError(
                f"{self._folder}: {free / 1e6:,.1f} MB are free, but a checkpoint takes "
                f"{needed / 1e6:,.1f} MB. Free some disk space, or decrease train.keep_checkpoints"
            )

    def _check_fits(self, path: Path, record: CheckpointRecord) -> None:
        record.check_resume(path, self._config, self._accelerator.num_processes)
        stage = zero_stage(self._accelerator)
        if record.zero_stage != stage:
            before, now = (f"ZeRO-{n}" if n else "plain data parallelism" for n in (record.zero_stage, stage))
            file = f"zero{record.zero_stage}.yaml" if record.zero_stage else "ddp.yaml"
            raise UserError(
                f"{path}: written under {before}, but this run uses {now}. Launch it with "
                f"configs/accelerate/{file} as before, or start a new run with output_dir=…"
            )
        if record.frozen_hashes != self._task.frozen_hashes:
            raise UserError(
                f"{path}: belongs to {record.frozen_hashes}, but this run has {self._task.frozen_hashes}: "
                "the CMVAE is not the one that this training began with. Restore that one, or start a new "
                "run with output_dir=…"
            )

    def _load_weights(self, models: list[nn.Module], folder: str) -> None:
        """Load the weights by the names of the task, which a wrapper may prefix."""
        if models:  # none under DeepSpeed, which loads its own
            self._task.load_state_dict(load_file(Path(folder) / SAFE_WEIGHTS_NAME))
            models.clear()  # tells Accelerate that they are loaded


def _failure(write: Callable[[], object]) -> str | None:
    """Why files could not be written, or None."""
    try:
        write()
    # torch reports a failed write as a RuntimeError, and safetensors as an error of its own.
    except (OSError, RuntimeError, SafetensorError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _explaining(write: Callable[[], None]) -> None:
    problem = _failure(write)
    if problem is not None:
        raise CheckpointError(f"rank 0: {problem}")


def _copy(state: Any) -> Any:
    """Copy nested lists, tuples and dicts; tensors are copied to main memory."""

    def copy_leaf(leaf: Any) -> Any:
        return leaf.detach().to("cpu", copy=True) if isinstance(leaf, Tensor) else copy.deepcopy(leaf)

    return recursively_apply(copy_leaf, state, test_type=lambda leaf: True)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _copy_deepspeed_state(engine: Any, folder: Path) -> Files:
    """Let DeepSpeed gather what each rank saves, and copy it instead of writing it.

    DeepSpeed still writes its folder, the name of its newest checkpoint and two scripts by itself.
    """
    # Not DeepSpeed's own background writer (`checkpoint.writer.decoupled` in its settings): it compiles an
    # operator (async_io), and the next update waits until it is done.
    writer, files = engine.checkpoint_engine, Files()
    save = writer.save

    def copy_instead(state_dict: dict[str, Any], path: str) -> None:
        files[Path(path)] = partial(save, _copy(state_dict))

    writer.save = copy_instead
    try:
        engine.save_checkpoint(str(folder), MODEL_NAME)
    finally:
        writer.save = save
    return files
