"""The training run: read from top to bottom, it is the whole of it."""

from __future__ import annotations

import logging
import math
import shutil
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed
from torch import nn, optim
from tqdm import tqdm

from cmvae.config import ExperimentConfig, save_config
from cmvae.data.batch import to_device
from cmvae.data.index import ShardIndex, SplitName
from cmvae.data.reader import EvaluationLoader, TrainingLoader
from cmvae.distributed import (
    Finding,
    StopRequest,
    agree,
    decide_on_main,
    let_deepspeed_autocast,
    raise_together,
    start_accelerator,
    zero_stage,
)
from cmvae.models.cmvae import channels_last
from cmvae.models.precision import autocast_dtype
from cmvae.tracking import RUN_RECORD_NAME, Status, Tracker, open_tracker
from cmvae.training.advice import out_of_memory_advice
from cmvae.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from cmvae.training.checkpoint_folder import find_newest
from cmvae.training.ema import WeightAverage
from cmvae.training.meters import Meter
from cmvae.training.optimization import (
    build_optimizer,
    learning_rate,
    restart_parameters,
    set_learning_rate,
)
from cmvae.training.precision_check import keep_sound_precision
from cmvae.training.rank_log import rank_log
from cmvae.training.skipped import SkippedSamples
from cmvae.training.state import TrainState
from cmvae.training.tasks import Task, build_task
from cmvae.training.validation import collect_records, evaluation_mode, save_validation
from cmvae.training.watchdog import Heartbeat
from cmvae.utils.errors import UserError
from cmvae.utils.files import remove_folder
from cmvae.utils.progress import progress_bar

# Validated before training starts, so that a broken validation fails in the first minute.
TRIAL_BATCHES = 2
# Samples in a picture of reconstructions, and in what is written down of them.
SHOWN_SAMPLES = 8
# Within the folder of the run: what each rank warns of, and where it stands.
LOGS_NAME = "logs"

_LOGGER = logging.getLogger(__name__)


def run_training(
    config: ExperimentConfig, index: ShardIndex, resume: bool = False, overwrite: bool = False
) -> signal.Signals | None:
    """Train what `config` describes and export it; to be called on every rank.

    Args:
        config: the experiment.
        index: the index of `config.data.shards`.
        resume: go on from the newest checkpoint of the run, if there is one.
        overwrite: delete what an earlier run left in the folder.

    Returns:
        None when the training is complete, or the signal that stopped it after a checkpoint.

    Raises:
        UserError: settings, data or checkpoint do not fit each other; or a term of the loss is not finite.
    """
    accelerator = start_accelerator(config)
    # Every rank starts from the same weights, then draws noise of its own.
    set_seed(config.seed)
    task = build_task(
        config, index, accelerator.device, autocast_dtype(config.train.mixed_precision, accelerator.device)
    )
    if task.channels_last and accelerator.distributed_type != DistributedType.DEEPSPEED:
        # DeepSpeed broadcasts and flattens weights as bytes and so needs them in the default layout.
        channels_last(task)
    if config.train.mixed_precision == "auto":
        keep_sound_precision(accelerator, task, config)
    let_deepspeed_autocast(accelerator, task.autocast_dtype)
    if config.train.compile:
        _compile_networks(accelerator, task)
    module, optimizer = accelerator.prepare(task, build_optimizer(task, config.optimizer))
    average = average_weights(accelerator, module, config.train.ema_decay)
    set_seed(config.seed + 1 + accelerator.process_index)

    state = TrainState()
    checkpoints = config.run_dir / "checkpoints"
    newest = decide_on_main(accelerator, lambda: find_newest(checkpoints)) if resume else None
    if newest is not None:
        state = load_checkpoint(accelerator, newest, config, task, average)
        accelerator.print(f"resumed from {newest} at epoch {state.epoch}, step {state.step}")
    resumed = newest is not None
    decide_on_main(accelerator, lambda: _prepare_run_folder(config, resumed, overwrite))
    _check_shared(accelerator, config.run_dir)
    with rank_log(config.run_dir / LOGS_NAME, accelerator.process_index) as log_file:
        tracker = open_tracker(config, config.run_dir, accelerator.is_main_process, task.name)
        status: Status = "FAILED"
        try:
            trainer = Trainer(config, accelerator, task, module, optimizer, average, state, tracker)
            with StopRequest.listening() as stop, trainer.heartbeat.watching(log_file):
                stopped_by = trainer.fit(stop)
            if stopped_by is None:
                folder = trainer.export()
                accelerator.print(f"{folder}: exported. Next: python launch/evaluate.py {config.run_dir}")
            else:
                accelerator.print(f"{stopped_by.name}: saved at step {state.step}. Go on with --resume")
            status = "FINISHED" if stopped_by is None else "KILLED"
        except torch.OutOfMemoryError as error:
            raise UserError(out_of_memory_advice(config, zero_stage(accelerator))) from error
        except RuntimeError as error:
            if config.train.compile:
                _explain_compiler(error)
            raise
        finally:
            tracker.end(status)
            accelerator.end_training()
    return stopped_by


def _compile_networks(accelerator: Accelerator, task: Task) -> None:
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError(
            "train.compile: under DeepSpeed networks are not compiled, as ZeRO takes their parameters away "
            "between layers. Set train.compile=false, or launch with configs/accelerate/ddp.yaml"
        )
    task.compile_networks()


def _explain_compiler(error: RuntimeError) -> None:
    # Slow to import, and torch itself does so only when it compiles.
    from torch._dynamo.exc import TorchDynamoException

    if isinstance(error, TorchDynamoException):
        reason = " ".join(str(error).splitlines()[:2])
        raise UserError(
            f"train.compile: torch cannot compile the networks here: {reason}. Set train.compile=false"
        ) from error


def _prepare_run_folder(config: ExperimentConfig, resumed: bool, overwrite: bool) -> None:
    if overwrite:
        _delete_run(config.run_dir)
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        if not resumed:
            # A run that died before its first checkpoint starts again, not on top of its old curves.
            (config.run_dir / RUN_RECORD_NAME).unlink(missing_ok=True)
        save_config(config, config.run_dir / "config.yaml")
    except OSError as error:
        raise UserError(f"{config.run_dir}: cannot be written: {error}. Set output_dir=…") from error


def _check_shared(accelerator: Accelerator, run_dir: Path) -> None:
    sees_it = (run_dir / "config.yaml").is_file()
    problem = None if sees_it else f"does not see {run_dir}, which rank 0 has made. Set output_dir=… to a "
    raise_together(accelerator, problem and f"{problem}folder that all machines share", UserError)


def _delete_run(run_dir: Path) -> None:
    # The checkpoints first and at once: what is left of them must not look like something to resume from.
    if (run_dir / "checkpoints").exists():
        remove_folder(run_dir / "checkpoints")
    shutil.rmtree(run_dir, ignore_errors=True)


def average_weights(accelerator: Accelerator, module: nn.Module, decay: float | None) -> WeightAverage | None:
    """The average of a prepared module's weights, if one is wanted.

    Raises:
        UserError: under ZeRO-3, where no rank has whole weights.
    """
    if decay is None:
        return None
    if zero_stage(accelerator) == 3:
        raise UserError(
            "train.ema_decay: under ZeRO-3 no rank has whole weights to average. Launch with "
            "configs/accelerate/zero2.yaml, or set train.ema_decay=null"
        )
    return WeightAverage(accelerator.unwrap_model(module), decay)


class Trainer:
    """Everything that one run works with, on one rank."""

    def __init__(
        self,
        config: ExperimentConfig,
        accelerator: Accelerator,
        task: Task,
        module: nn.Module,
        optimizer: optim.Optimizer,
        average: WeightAverage | None,
        state: TrainState,
        tracker: Tracker,
    ) -> None:
        self.config, self.accelerator, self.tracker, self.state = config, accelerator, tracker, state
        self.task, self.module, self.optimizer, self.average = task, module, optimizer, average
        rank, world_size = accelerator.process_index, accelerator.num_processes
        modalities = task.modality_names
        self.train_loader = TrainingLoader(
            config.data.shards,
            modalities=modalities,
            batch_size=config.train.batch_size,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            num_workers=config.data.num_workers,
            shuffle_window=config.data.shuffle_window,
            cache_bytes=config.data.cache_megabytes * 2**20,
            on_error=config.data.on_error,
            handovers=state.handovers,
        )
        self.validation_loader = EvaluationLoader(
            config.data.shards,
            split="validation",
            modalities=modalities,
            batch_size=config.evaluation.batch_size,
            rank=rank,
            world_size=world_size,
            on_error=config.data.on_error,
        )
        self.accumulation = config.train.gradient_accumulation_steps
        self.samples_per_batch = config.train.batch_size * world_size
        self.total_steps = self._count_steps()
        task.begin(self.total_steps)
        self.meter = Meter()
        self.skipped = SkippedSamples(config.data.max_skipped)
        self.skipped_in_validation = SkippedSamples(config.data.max_skipped)
        self.heartbeat = Heartbeat(config.run_dir / LOGS_NAME, rank, world_size, config.train.hang_timeout)
        self.saved_step = state.step
        self.findings: deque[Finding] = deque()
        self.runs_ahead = _runs_ahead(accelerator)

    def fit(self, stop: StopRequest) -> signal.Signals | None:
        """Train to the last step, or to a signal; a checkpoint is there in either case."""
        self._collect_records(TRIAL_BATCHES)
        every, caught = self.config.train, None
        if self._validate_if_due():
            self._save_if_possible()
        batches = self._batches()
        progress = self._progress_bar()
        while self.state.step < self.total_steps and caught is None:
            self._restart_if_due()
            caught = self._update(batches, stop)
            if self.average is not None:
                self.average.update(self.state.step)
            self.state.step += 1
            progress.update(self.samples_per_batch * self.accumulation)
            written = (every.log_every, every.validate_every, every.checkpoint_every)
            if any(_is_due(self.state.step, n) for n in written):
                caught = self._read_findings() or caught
            if _is_due(self.state.step, every.log_every):
                progress.set_postfix(self._log_curves())
            # A signal does not wait for a validation: one that is due then follows on resume.
            is_best = caught is None and self._validate_if_due()
            if is_best or _is_due(self.state.step, every.checkpoint_every):
                self._save_if_possible()
        progress.close()
        self._read_findings()
        if self.saved_step != self.state.step:
            self._save_checkpoint()
        return caught

    def _restart_if_due(self) -> None:
        """Let parameters start anew where the task says so."""
        values = self.task.restart(self.state.step, self._first_train_batches)
        restart_parameters(self.accelerator, self.optimizer, values)

    def _first_train_batches(self, num_samples: int) -> Iterator[dict[str, Any]]:
        self._read_findings()  # what restarts takes the weights as they are
        return self._read_split("train", num_samples)

    def _read_split(self, split: SplitName, num_samples: int | None) -> Iterator[dict[str, Any]]:
        """The first so many samples of a split, or all of it, the same on every rank that asks."""
        loader = EvaluationLoader(
            self.config.data.shards,
            split=split,
            modalities=self.task.modality_names,
            batch_size=self.config.evaluation.batch_size,
            num_samples=num_samples,
            on_error=self.config.data.on_error,
        )
        return self._beating(loader, "finding clusters")

    def _update(self, batches: Iterator[dict[str, Any]], stop: StopRequest) -> signal.Signals | None:
        """One optimizer update from as many batches as are accumulated."""
        rate = learning_rate(self.state.step, self.total_steps, self.config.optimizer)
        set_learning_rate(self.optimizer, rate)
        caught = None
        for _ in range(self.accumulation):
            self.heartbeat.beat("reading a batch")
            asked = time.perf_counter()
            raw = next(batches)
            waited = time.perf_counter() - asked
            if self.config.data.on_error == "skip":
                self.heartbeat.beat("waiting for the other ranks to tell what they skipped")
                self.skipped.add(self.accelerator, raw["skipped"])
            batch = to_device(raw, self.task.modalities, self.accelerator.device)
            with self.accelerator.accumulate(self.module):
                self.heartbeat.beat("in the forward pass")
                loss, report = self.module(batch)
                self.heartbeat.beat("waiting for the losses of the other ranks")
                self.findings.append(agree(self.accelerator, loss, report, stop))
                caught = self._read_findings(keep=1 if self.runs_ahead else 0) or caught
                self.heartbeat.beat("in the backward pass and the update")
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self._clip_gradients()
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.meter.add(report, self.samples_per_batch, waited)
        return caught

    def _clip_gradients(self) -> None:
        """Clip to `max_grad_norm`; find a gradient that is not finite, where fp16 does not expect some."""
        limit = self.config.optimizer.max_grad_norm or math.inf
        # DeepSpeed has clipped already, and only tells the norm.
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), limit)
        if norm is None or self.config.train.mixed_precision == "fp16":
            return
        finite = torch.as_tensor(norm, device=self.accelerator.device).isfinite()
        flags = torch.stack([~finite, torch.zeros_like(finite)]).int()
        self.findings.append(Finding(["the gradient, though the loss is"], flags))
        if not self.runs_ahead:
            self._read_findings()

    def _read_findings(self, keep: int = 0) -> signal.Signals | None:
        """Read what was found, but for the last `keep`: the signal that some rank caught, or None.

        Whatever is written down between updates, and what ends a training, reads all before.

        Raises:
            NonFiniteError: something was not finite.
        """
        caught = None
        while len(self.findings) > keep:
            caught = self.findings.popleft().read() or caught
        return caught

    def _validate_if_due(self) -> bool:
        """Validate between updates, once a step, whatever came between; whether it was the best so far."""
        state = self.state
        is_due = _is_due(state.step, self.config.train.validate_every) and state.step < self.total_steps
        if not is_due or state.validated_step == state.step:
            return False
        with self._final_weights():
            loss = self.validate()["loss"]
        state.validated_step = state.step
        if state.best_loss is not None and loss >= state.best_loss:
            return False
        state.best_step, state.best_loss = state.step, loss
        return True

    def validate(self) -> dict[str, float]:
        """Log metrics, pictures and texts of the validation split, on all ranks; returns the metrics."""
        records = self._collect_records()
        metrics = {"loss": float(records["loss"].mean()), **self.task.validation_metrics(records)}
        if self.config.data.on_error == "skip":
            metrics["skipped_samples"] = self.skipped_in_validation.count
        self.tracker.log_metrics(
            {f"validation/{name}": value for name, value in metrics.items()}, self.state.step
        )
        batch = to_device(next(iter(self.validation_loader)), self.task.modalities, self.accelerator.device)
        # A stream of its own: validating more often must not change the training.
        generator = torch.Generator(self.accelerator.device).manual_seed(self.config.seed)
        with evaluation_mode(self.module):
            shown = self.task.show(batch, SHOWN_SAMPLES, generator)
        for name, figure in shown.figures.items():
            self.tracker.log_image(figure, name, self.state.step)
        for name, text in shown.texts.items():
            self.tracker.log_text(text, name, self.state.step)
        return metrics

    def _collect_records(self, max_batches: int | None = None) -> dict[str, np.ndarray]:
        """The report over the validation split, or the first of its batches."""
        return collect_records(
            self.accelerator,
            self.module,
            self.task.modalities,
            self._validation_batches(),
            self.config.seed,
            max_batches,
        )

    def _beating(self, batches: Iterable[dict[str, Any]], activity: str) -> Iterator[dict[str, Any]]:
        """The same batches, each a sign of life."""
        for batch in batches:
            self.heartbeat.beat(activity)
            yield batch

    def _validation_batches(self) -> Iterator[dict[str, Any]]:
        """Batches of this rank, of which all ranks have equally many: what they skip is counted together."""
        self.skipped_in_validation.begin_epoch()
        for batch in self._beating(self.validation_loader, "validating"):
            if self.config.data.on_error == "skip":
                self.skipped_in_validation.add(self.accelerator, batch["skipped"])
            yield batch

    def export(self) -> Path:
        """Validate a last time, write `validation.json` and `export/`; on all ranks."""
        with self._final_weights():
            metrics = self.validate()
            # Under ZeRO-3 no rank has the whole model: gathering is a matter of all ranks.
            weights = self.accelerator.get_state_dict(self.module)
            folder = self.config.run_dir / "export"
            if self.accelerator.is_main_process:
                # First: a run that has an export is complete.
                save_validation(self.config.run_dir, metrics)
                self.task.export(folder, weights, self._read_split)
        self.accelerator.wait_for_everyone()
        return folder

    def _final_weights(self) -> AbstractContextManager[None]:
        """The weights that would be exported now, in place of those that are trained."""
        return self.average.applied() if self.average is not None else nullcontext()

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Batches of this rank without end, from where the counters stand."""
        while True:
            self.skipped.begin_epoch()
            for batch in self.train_loader.epoch_batches(self.state.epoch, skip_batches=self.state.batch):
                self.state.batch += 1
                self.state.samples += self.samples_per_batch
                yield batch
            self.state.epoch += 1
            self.state.batch = 0

    def _count_steps(self) -> int:
        # The config makes sure that at least one of the two is set.
        epochs = self.config.train.epochs or math.inf
        max_steps = self.config.train.max_steps or math.inf
        return int(min(epochs * self.train_loader.batches_per_epoch / self.accumulation, max_steps))

    def _log_curves(self) -> dict[str, str]:
        """Log the means since the last time; on all ranks. Returns what the progress bar shows."""
        readings = self.meter.read(self.accelerator)
        curves = {f"train/{name}": value for name, value in readings.items()}
        curves["train/learning_rate"] = learning_rate(
            self.state.step - 1, self.total_steps, self.config.optimizer
        )
        curves["train/epoch"] = self.state.epoch + self.state.batch / self.train_loader.batches_per_epoch
        if self.config.data.on_error == "skip":
            curves["train/skipped_samples"] = self.skipped.count
        self.tracker.log_metrics(curves, self.state.step)
        return {"epoch": f"{self.state.epoch}", self.task.headline: f"{readings[self.task.headline]:.5g}"}

    def _save_checkpoint(self) -> None:
        self.heartbeat.beat("writing a checkpoint")
        folder = self.config.run_dir / "checkpoints"
        save_checkpoint(self.accelerator, folder, self.state, self.config, self.task, self.average)
        self.saved_step = self.state.step

    def _save_if_possible(self) -> None:
        """Save between updates: a training is worth more than one of its checkpoints."""
        try:
            self._save_checkpoint()
        except CheckpointError as error:
            _LOGGER.warning(
                "no checkpoint of step %d: %s. The training goes on; the last checkpoint is that of step %d",
                self.state.step,
                error,
                self.saved_step,
            )

    def _progress_bar(self) -> tqdm:
        samples_per_step = self.samples_per_batch * self.accumulation
        return progress_bar(
            desc=self.config.name,
            total=self.total_steps * samples_per_step,
            initial=self.state.step * samples_per_step,
            unit="samples",
            unit_scale=True,
            disable=not self.accelerator.is_main_process,
        )


def _runs_ahead(accelerator: Accelerator) -> bool:
    """Whether what a step found is read after the next forward pass: a GPU then never waits for Python."""
    return accelerator.device.type != "cpu"


def _is_due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
