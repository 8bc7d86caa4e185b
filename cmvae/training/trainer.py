"""The training loop: read it from top to bottom."""

from __future__ import annotations

import gc
import math
import signal
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn, optim
from tqdm import tqdm

from cmvae.config import ExperimentConfig
from cmvae.data.batch import to_device
from cmvae.data.index import SplitName
from cmvae.data.reader import EvaluationLoader
from cmvae.tracking import Tracker
from cmvae.training.checkpoint import Checkpointer
from cmvae.training.meters import Meter, SkippedSamples
from cmvae.training.optimization import (
    WeightAverage,
    learning_rate,
    reinitialize_parameters,
    set_learning_rate,
)
from cmvae.training.step_checks import (
    StepCheck,
    StepChecks,
    StopRequest,
    all_reduce_step_check,
    reads_late,
)
from cmvae.training.task import Measure, Preview, Task
from cmvae.training.train_split import open_train_split
from cmvae.training.validation import collect_records, evaluation_mode, save_validation
from cmvae.training.watchdog import Heartbeat
from cmvae.utils.attempts import attempt
from cmvae.utils.progress import progress_bar
from cmvae.utils.seeds import derive_seed

# Validated before training starts, so that a broken validation fails in the first minute.
TRIAL_BATCHES = 2
# Samples in the figures and texts of a validation.
SHOWN_SAMPLES = 8
# In the run folder: warnings and status of each rank.
LOGS_NAME = "logs"


class Trainer:
    """Trains a task; all its methods must be called on all ranks.

    Randomness of a step is a function of (seed, step, place of the sample in the global batch): a batch
    carries `_seed` and `_place`, see `cmvae.utils.seeds.sample_generators`. So no random state is saved, and
    nothing but training itself decides what a step draws. Dropout is the exception, see `_update`.

    Args:
        config: the experiment.
        accelerator: the ranks.
        task: what is trained, by its own name ...
        module: ... and as prepared by the accelerator.
        optimizer: prepared.
        average: moving average of the weights, or None.
        checkpointer: saves all of these, and has the state to start from.
        tracker: gets curves and figures.
        stop: whether this rank was asked to stop.
        measure: further metrics of a validation.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        accelerator: Accelerator,
        task: Task,
        module: nn.Module,
        optimizer: optim.Optimizer,
        average: WeightAverage | None,
        checkpointer: Checkpointer,
        tracker: Tracker,
        stop: StopRequest,
        measure: Measure | None = None,
    ) -> None:
        self.config, self.accelerator, self.tracker, self.stop = config, accelerator, tracker, stop
        self.measure = measure
        self.task, self.module, self.optimizer, self.average = task, module, optimizer, average
        self.checkpointer, self.state = checkpointer, checkpointer.state
        rank, world_size = accelerator.process_index, accelerator.num_processes
        self.train_loader = open_train_split(
            config,
            task.modality_names,
            accelerator.device,
            rank=rank,
            world_size=world_size,
        )
        self.validation_loader = EvaluationLoader(
            config.data.shards,
            split="validation",
            modalities=task.modality_names,
            batch_size=config.evaluation.batch_size,
            rank=rank,
            world_size=world_size,
            on_error=config.data.on_error,
        )
        self.accumulation = config.train.gradient_accumulation_steps
        self.batch_size = config.train.batch_size_per_rank(world_size)
        self.samples_per_batch = self.batch_size * world_size
        self.total_steps = self._count_steps()
        task.begin(self.total_steps)
        self.meter = Meter()
        self.checks = StepChecks(reads_late(accelerator.device))
        self.skipped = SkippedSamples(config.data.max_skipped)
        self.skipped_in_validation = SkippedSamples(config.data.max_skipped)
        self.heartbeat = Heartbeat(config.run_dir / LOGS_NAME, rank, world_size, config.train.hang_timeout)

    def fit(self) -> signal.Signals | None:
        """Train to the last step or to a signal, with a checkpoint of that step in either case.

        Returns:
            The signal that stopped the training, or None.

        Raises:
            NonFiniteError: a term or the gradient is not finite.
        """
        every, state, checks, checkpointer = self.config.train, self.state, self.checks, self.checkpointer
        self._collect_records(TRIAL_BATCHES)
        batches, progress = self._batches(), self._progress_bar()
        while state.step < self.total_steps and checks.signal is None:
            checkpointer.advance(checks.num_finished)
            if self._is_due(every.validate_every) and state.validated_step != state.step:
                with self._final_weights():
                    state.record_validation(self.validate()["loss"])
            is_best = state.best_step == state.step
            if (is_best or self._is_due(every.checkpoint_every)) and checkpointer.saved_step != state.step:
                self.heartbeat.beat("writing a checkpoint")
                checkpointer.start_save()
            values = self.task.reinitialize(state.step, self._first_train_batches)
            reinitialize_parameters(self.accelerator, self.optimizer, values)
            self._update(batches)
            progress.update(self.samples_per_batch * self.accumulation)
            # Nothing is written down of a step that was not checked.
            if any(map(self._is_due, (every.log_every, every.validate_every, every.checkpoint_every))):
                checks.read()
            if self._is_due(every.log_every):
                progress.set_postfix(self._log_curves())
                gc.collect(1)
        checks.read()
        progress.close()
        if checkpointer.saved_step != state.step:
            self.heartbeat.beat("writing a checkpoint")
            checkpointer.save()
        return checks.signal

    def _update(self, batches: Iterator[dict[str, Any]]) -> None:
        """One optimizer update from `gradient_accumulation_steps` batches of every rank."""
        accelerator, step = self.accelerator, self.state.step
        set_learning_rate(self.optimizer, learning_rate(step, self.total_steps, self.config.optimizer))
        for part in range(self.accumulation):
            batch = self._next_batch(batches, part)
            with accelerator.accumulate(self.module):
                self.heartbeat.beat("in the forward pass")
                if self.config.train.compile == "reduce-overhead":
                    # The outputs of the last step are no longer used: their memory may be overwritten.
                    torch.compiler.cudagraph_mark_step_begin()
                # Dropout masks know no samples: they are a function of (seed, step, part, rank).
                dropout = derive_seed(self.config.seed, "dropout", step, part, accelerator.process_index)
                torch.manual_seed(dropout)
                loss, report = self.module(batch)
                self.heartbeat.beat("waiting for the losses of the other ranks")
                self.checks.read()
                saved = self.checkpointer.num_finished
                self.checks.add(all_reduce_step_check(accelerator, loss, report, self.stop, saved))
                self.heartbeat.beat("in the backward pass and the update")
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    self._clip_gradients()
                self.optimizer.step()
                self.optimizer.zero_grad()
            self.meter.add(report, self.samples_per_batch)
        if self.average is not None:
            self.average.update(step)
        self.state.step += 1

    def _next_batch(self, batches: Iterator[dict[str, Any]], part: int) -> dict[str, Any]:
        """The next batch of this rank on its device; `part` counts the batches of an update."""
        accelerator, config = self.accelerator, self.config
        self.heartbeat.beat("reading a batch")
        with self.meter.waiting():
            batch = next(batches)
        if config.data.on_error == "skip":
            self.heartbeat.beat("waiting for the other ranks to count skipped samples")
            self.skipped.add(accelerator, batch["skipped"])
        first = part * self.samples_per_batch + accelerator.process_index * self.batch_size
        batch["_seed"] = derive_seed(config.seed, "step", self.state.step)
        batch["_place"] = range(first, first + self.batch_size)
        return to_device(batch, self.task.modalities, accelerator.device)

    def _clip_gradients(self) -> None:
        """Clip to `max_grad_norm` and check that the norm is finite; in fp16 it may overflow."""
        limit = self.config.optimizer.max_grad_norm or math.inf
        # DeepSpeed has clipped already and only returns the norm.
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), limit)
        if norm is None or self.config.train.mixed_precision == "fp16":
            return
        finite = torch.as_tensor(norm, device=self.accelerator.device).isfinite()
        flags = torch.cat([~finite.view(1), finite.new_zeros(2)]).int()
        self.checks.add(StepCheck(["the gradient, though the loss is"], flags))

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.state.step % every == 0

    def _first_train_batches(self, num_samples: int) -> Iterator[dict[str, Any]]:
        self.checks.read()  # the new values are computed from the weights
        return self._read_split("train", num_samples)

    def _read_split(self, split: SplitName, num_samples: int | None) -> Iterator[dict[str, Any]]:
        """The first `num_samples` samples of a split or, with None, all of it; the same on every rank."""
        loader = EvaluationLoader(
            self.config.data.shards,
            split=split,
            modalities=self.task.modality_names,
            batch_size=self.config.evaluation.batch_size,
            num_samples=num_samples,
            on_error=self.config.data.on_error,
        )
        return self._beating(loader, "finding clusters")

    def validate(self) -> dict[str, float]:
        """Log metrics, figures and texts of the validation split; returns the metrics."""
        records = self._collect_records()
        metrics = {"loss": float(records["loss"].mean()), **self.task.validation_metrics(records)}
        if self.config.data.on_error == "skip":
            metrics["skipped_samples"] = self.skipped_in_validation.count
        if self.measure is not None:
            self.heartbeat.beat("measuring generated samples")
            with evaluation_mode(self.module):
                metrics |= self.measure(self.task, self.accelerator)
        self.tracker.log_metrics(
            {f"validation/{name}": value for name, value in metrics.items()}, self.state.step
        )
        batch = to_device(next(iter(self.validation_loader)), self.task.modalities, self.accelerator.device)
        generator = torch.Generator(self.accelerator.device).manual_seed(self.config.seed)
        with evaluation_mode(self.module):
            preview = self.task.show(batch, SHOWN_SAMPLES, generator)
        if self.accelerator.is_main_process:
            self._log_preview(preview)
        return metrics

    def _log_preview(self, preview: Preview) -> None:
        for name, draw in preview.figures.items():
            figure = attempt(f"figure {name}", draw)
            if figure is not None:
                self.tracker.log_image(figure, name, self.state.step)
        for name, write in preview.texts.items():
            text = attempt(f"text {name}", write)
            if text is not None:
                self.tracker.log_text(text, name, self.state.step)

    def _collect_records(self, max_batches: int | None = None) -> dict[str, np.ndarray]:
        """The report over the validation split, or over its first `max_batches` batches."""
        return collect_records(
            self.accelerator,
            self.module,
            self.task.modalities,
            self._validation_batches(),
            self.config.seed,
            max_batches,
        )

    def _beating(self, batches: Iterable[dict[str, Any]], activity: str) -> Iterator[dict[str, Any]]:
        """The same batches, with a heartbeat for each."""
        for batch in batches:
            self.heartbeat.beat(activity)
            yield batch

    def _validation_batches(self) -> Iterator[dict[str, Any]]:
        """Validation batches of this rank, equally many on all ranks; skipped samples are counted on all."""
        self.skipped_in_validation.begin_epoch()
        for batch in self._beating(self.validation_loader, "validating"):
            if self.config.data.on_error == "skip":
                self.skipped_in_validation.add(self.accelerator, batch["skipped"])
            yield batch

    def export(self) -> Path:
        """Validate a last time, then write `validation.json` and `export/`; returns the latter."""
        with self._final_weights():
            metrics = self.validate()
            # Under ZeRO-3 no rank has the whole model: all ranks must gather it.
            weights = self.accelerator.get_state_dict(self.module)
            folder = self.config.run_dir / "export"
            if self.accelerator.is_main_process:
                # Written first, as a run that has an export is complete.
                save_validation(self.config.run_dir, metrics)
                self.task.export(folder, weights, self._read_split)
        self.accelerator.wait_for_everyone()
        return folder

    def _final_weights(self) -> AbstractContextManager[None]:
        """Replace the weights by those that would be exported now."""
        return self.average.applied() if self.average is not None else nullcontext()

    def _batches(self) -> Iterator[dict[str, Any]]:
        """Batches of this rank without end, from the counters of the state on."""
        while True:
            self.skipped.begin_epoch()
            for batch in self.train_loader.epoch_batches(self.state.epoch, skip_batches=self.state.batch):
                self.state.batch += 1
                self.state.samples += self.samples_per_batch
                yield batch
            self.state.epoch += 1
            self.state.batch = 0

    def _count_steps(self) -> int:
        # The config requires one of the two.
        epochs = self.config.train.epochs or math.inf
        max_steps = self.config.train.max_steps or math.inf
        return int(min(epochs * self.train_loader.batches_per_epoch / self.accumulation, max_steps))

    def _log_curves(self) -> dict[str, str]:
        """Log the means since the last call; returns what the progress bar shows."""
        readings = self.meter.read(self.accelerator)
        curves = {f"train/{name}": value for name, value in readings.items()}
        curves["train/learning_rate"] = learning_rate(
            self.state.step - 1, self.total_steps, self.config.optimizer
        )
        curves["train/epoch"] = self.state.epoch + self.state.batch / self.train_loader.batches_per_epoch
        if self.config.data.on_error == "skip":
            curves["train/skipped_samples"] = self.skipped.count
        self.tracker.log_metrics(curves, self.state.step)
        return {
            "epoch": f"{self.state.epoch}",
            self.task.progress_metric: f"{readings[self.task.progress_metric]:.5g}",
        }

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
