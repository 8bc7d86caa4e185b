"""One training run: set up the ranks, the task and the run folder, train, export, take down."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import set_seed
from torch import nn

from cmvae.config import CMVAEExperiment, ExperimentConfig, save_config
from cmvae.data.index import TABLE_NAME, ShardIndex
from cmvae.data.reader import explain_dead_readers
from cmvae.distributed import (
    let_deepspeed_autocast,
    raise_on_all_ranks,
    run_on_main,
    start_accelerator,
    zero_stage,
)
from cmvae.models.cmvae import channels_last
from cmvae.models.precision import autocast_dtype
from cmvae.tracking import RUN_RECORD_NAME, Status, open_tracker
from cmvae.training.checkpoint import Checkpointer
from cmvae.training.optimization import WeightAverage, build_optimizer
from cmvae.training.precision_check import keep_sound_precision
from cmvae.training.rank_log import rank_log
from cmvae.training.step_checks import StopRequest
from cmvae.training.task import Measure
from cmvae.training.tasks import Task, build_task
from cmvae.training.trainer import LOGS_NAME, Trainer
from cmvae.utils.errors import UserError
from cmvae.utils.files import remove_folder, write_whole
from cmvae.utils.memory import garbage_collected_on_request
from cmvae.utils.progress import is_quiet


def run_training(
    config: ExperimentConfig,
    index: ShardIndex,
    resume: bool = False,
    overwrite: bool = False,
    measure: Measure | None = None,
) -> signal.Signals | None:
    """Train an experiment and export the result; must be called on all ranks.

    Args:
        config: the experiment.
        index: index of `config.data.shards`.
        resume: continue from the newest checkpoint of the run, if there is one.
        overwrite: delete an earlier run in the folder.
        measure: further metrics of every validation.

    Returns:
        None when the training is complete, or the signal that stopped it after a checkpoint.

    Raises:
        UserError: settings, data and checkpoint do not fit each other, or a term of the loss is not finite.
    """
    accelerator = start_accelerator(config)
    # Every rank starts from the same weights.
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
        compile_networks(accelerator, task, config.train.compile)
    module, optimizer = accelerator.prepare(task, build_optimizer(task, config.optimizer))
    average = average_weights(accelerator, module, config.train.ema_decay)
    checkpointer = Checkpointer(accelerator, config, task, module, optimizer, average)
    resumed = resume and checkpointer.load_newest()
    run_on_main(accelerator, lambda: _prepare_run_folder(config, index, resumed, overwrite))
    _check_shared(accelerator, config.run_dir)
    with rank_log(config.run_dir / LOGS_NAME, accelerator.process_index) as log_file:
        tracker = open_tracker(config, config.run_dir, accelerator.is_main_process, task.name)
        tracker.log_data(index, config.data.shards)
        status: Status = "FAILED"
        try:
            with StopRequest.listening() as stop:
                trainer = Trainer(
                    config,
                    accelerator,
                    task,
                    module,
                    optimizer,
                    average,
                    checkpointer,
                    tracker,
                    stop,
                    measure,
                )
                with (
                    explain_dead_readers(),
                    trainer.heartbeat.watching(log_file),
                    checkpointer.finishing(),
                    garbage_collected_on_request(),
                ):
                    stopped_by = trainer.fit()
            if stopped_by is None:
                folder = trainer.export()
                tracker.log_folder(folder)
                message = f"{folder}: exported. Next: cmvae evaluate {config.run_dir}"
            else:
                message = f"{stopped_by.name}: saved at step {trainer.state.step}. Continue with --resume"
            if accelerator.is_main_process and not is_quiet():
                print(message)
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


def compile_networks(accelerator: Accelerator, task: Task, how: bool | str = True) -> None:
    """Compile the networks of a task.

    Args:
        accelerator: the ranks.
        task: whose networks.
        how: `train.compile`.

    Raises:
        UserError: under DeepSpeed.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError(
            "train.compile: under DeepSpeed networks cannot be compiled, as ZeRO frees their parameters "
            "between layers. Set train.compile=false, or launch with configs/accelerate/ddp.yaml"
        )
    task.compile_networks(mode=how if isinstance(how, str) else None)


def _explain_compiler(error: RuntimeError) -> None:
    # Slow to import; torch itself imports it only when it compiles.
    from torch._dynamo.exc import TorchDynamoException

    if isinstance(error, TorchDynamoException):
        reason = " ".join(str(error).splitlines()[:2])
        raise UserError(
            f"train.compile: torch cannot compile the networks here: {reason}. Set train.compile=false"
        ) from error


def _prepare_run_folder(config: ExperimentConfig, index: ShardIndex, resumed: bool, overwrite: bool) -> None:
    if overwrite:
        _delete_run(config.run_dir)
    try:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        if not resumed:
            # A run that was killed before its first checkpoint starts a new run of the tracker.
            (config.run_dir / RUN_RECORD_NAME).unlink(missing_ok=True)
        save_config(config, config.run_dir / "config.yaml")
        if index.table is not None:
            # New rows are read in the same way, when the shards may be gone.
            write_whole(config.run_dir / TABLE_NAME, index.table.model_dump_json(indent=2).encode())
    except OSError as error:
        raise UserError(f"{config.run_dir}: cannot be written: {error}. Set output_dir=…") from error


def _check_shared(accelerator: Accelerator, run_dir: Path) -> None:
    problem = None
    if not (run_dir / "config.yaml").is_file():
        problem = (
            f"does not see {run_dir}, which rank 0 created. Set output_dir=… to a folder that all machines "
            "share"
        )
    raise_on_all_ranks(accelerator, problem, UserError)


def _delete_run(run_dir: Path) -> None:
    # The checkpoints first and at once, so that an interrupted deletion leaves nothing to resume from.
    if (run_dir / "checkpoints").exists():
        remove_folder(run_dir / "checkpoints")
    shutil.rmtree(run_dir, ignore_errors=True)


def average_weights(accelerator: Accelerator, module: nn.Module, decay: float | None) -> WeightAverage | None:
    """The moving average of a prepared module's weights, or None without a `decay`.

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


def out_of_memory_advice(config: ExperimentConfig, zero_stage: int) -> str:
    """Settings with which a training takes less memory, the cheapest first.

    Args:
        config: the experiment that ran out of memory.
        zero_stage: stage of ZeRO; 0 for plain data parallelism.
    """
    train, remedies = config.train, []
    name = "batch_size" if train.global_batch_size is None else "global_batch_size"
    if (size := getattr(train, name)) > 1:
        half, twice = size // 2, train.gradient_accumulation_steps * 2
        remedies.append(
            f"train.{name}={half} with train.gradient_accumulation_steps={twice}, which is the same "
            "global batch"
        )
    if train.mixed_precision == "fp32":
        remedies.append("train.mixed_precision=bf16")
    if isinstance(config, CMVAEExperiment):
        if config.objective.num_samples > 1:
            remedies.append(f"objective.num_samples below {config.objective.num_samples}")
        if config.objective.cross_sources == "all" and len(config.model.modalities) > 2:
            remedies.append("objective.cross_sources=1, which decodes fewer modalities at a time")
        if config.objective.decoder_checkpoint_above is None:
            remedies.append(
                f"objective.decoder_checkpoint_above={2 * train.batch_size}, which decodes in parts "
                "and takes longer"
            )
    if zero_stage < 3:
        remedies.append(
            f"on several GPUs, --config_file configs/accelerate/zero{max(2, zero_stage + 1)}.yaml"
        )
    return "out of memory. Any of these takes less: " + "; ".join(remedies)
