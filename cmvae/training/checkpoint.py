"""Checkpoints that are complete or absent: written to a temporary folder, flushed, renamed; and loaded."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import RNG_STATE_NAME, SAFE_MODEL_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from cmvae.config import ExperimentConfig, flatten
from cmvae.distributed import raise_on_all_ranks, run_on_main, zero_stage
from cmvae.training.checkpoint_folder import (
    checkpoint_path,
    find_newest,
    list_checkpoints,
    thin_out,
    write_manifest,
)
from cmvae.training.optimization import WeightAverage
from cmvae.training.state import CheckpointRecord, TrainState
from cmvae.training.task import Task
from cmvae.utils.errors import UserError
from cmvae.utils.files import publish_folder

_LOGGER = logging.getLogger(__name__)
# Prefix of DistributedDataParallel to the names of the weights.
_WRAPPER = "module."


class CheckpointError(UserError):
    """A checkpoint could not be written; earlier ones are intact. Raised on all ranks alike."""


class Checkpointer:
    """Saves and restores all that a run continues from; its methods must be called on all ranks.

    A checkpoint `checkpoints/step-XXXXXXXX` holds what `Accelerator.save_state` writes (weights, optimizer,
    gradient scaler), the average of the weights if there is one, `state.json` (see `CheckpointRecord`) and
    the checksums of all these files. It holds no random state, as every step seeds its own.

    Args:
        accelerator: the ranks, which have prepared module and optimizer.
        config: the experiment.
        task: the module that was prepared.
        average: moving average of its weights, or None.
    """

    def __init__(
        self, accelerator: Accelerator, config: ExperimentConfig, task: Task, average: WeightAverage | None
    ) -> None:
        self.state = TrainState()
        """Counters of the run; the loop advances them."""
        self.saved_step = 0
        """Step of the last checkpoint; 0 if there is none."""
        self._accelerator, self._config, self._task, self._average = accelerator, config, task, average
        self._folder = config.run_dir / "checkpoints"

    def save(self) -> Path:
        """Write a checkpoint, then remove all but the newest `train.keep_checkpoints` and the best one.

        Raises:
            CheckpointError: there is not enough space, or some rank could not write.
        """
        accelerator, path = self._accelerator, checkpoint_path(self._folder, self.state.step)
        partial = self._folder / f".{path.name}.partial"

        def prepare() -> None:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self._check_space()

        def complete() -> None:
            for random_state in partial.glob(f"{RNG_STATE_NAME}_*.pkl"):
                random_state.unlink()
            if self._average is not None:
                self._average.save(partial)
            self._record().write(partial)
            write_manifest(partial)
            publish_folder(partial, path)
            thin_out(self._folder, self._config.train.keep_checkpoints, self.state.best_step)

        try:
            run_on_main(accelerator, lambda: _explaining(prepare))
            failure = _failure(lambda: accelerator.save_state(str(partial)))
            raise_on_all_ranks(accelerator, failure, CheckpointError)
            run_on_main(accelerator, lambda: _explaining(complete))
        except CheckpointError:
            if accelerator.is_main_process:
                shutil.rmtree(partial, ignore_errors=True)
            raise
        self.saved_step = self.state.step
        return path

    def try_save(self) -> None:
        """Write a checkpoint, or log why it could not be written: a training outlives a full disk."""
        try:
            self.save()
        except CheckpointError as error:
            last = f"the last one is of step {self.saved_step}" if self.saved_step else "there is none yet"
            _LOGGER.warning(
                "no checkpoint of step %d: %s. The training continues; %s", self.state.step, error, last
            )

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
        if record.world_size == accelerator.num_processes:
            accelerator.load_state(str(path))
        else:
            self._load_for_other_world_size(path, record)
        if self._average is not None:
            self._average.load(path)
        self.state, self.saved_step = record.state, record.state.step
        accelerator.print(f"resumed from {path} at epoch {self.state.epoch}, step {self.state.step}")
        return True

    def _record(self) -> CheckpointRecord:
        return CheckpointRecord(
            state=self.state,
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

    def _load_for_other_world_size(self, path: Path, record: CheckpointRecord) -> None:
        """Restore what another number of ranks wrote, each of which had everything."""

        def load_weights(models: list[nn.Module], folder: str) -> None:
            # Data parallelism prefixes the names with that of its wrapper, a single process does not.
            weights = load_file(Path(folder) / f"{SAFE_MODEL_NAME}.safetensors")
            self._task.load_state_dict({name.removeprefix(_WRAPPER): x for name, x in weights.items()})
            models.clear()  # tells Accelerate that they are loaded

        hook = self._accelerator.register_load_state_pre_hook(load_weights)
        self._accelerator.load_state(str(path))
        hook.remove()


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
