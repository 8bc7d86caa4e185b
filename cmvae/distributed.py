"""How the processes of a run find each other: the Accelerator, and calls that all ranks make together."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
)
from torch import Tensor

from cmvae.config import CMVAEExperiment, ExperimentConfig
from cmvae.models.precision import computes_in_bf16
from cmvae.utils.errors import UserError
from cmvae.utils.memory import keep_freed_memory

Result = TypeVar("Result")

# How much longer than the heartbeat a collective operation waits.
_GROUP_GRACE = timedelta(minutes=2)

_LOGGER = logging.getLogger(__name__)


def start_accelerator(config: ExperimentConfig) -> Accelerator:
    """Create the Accelerator that the launcher's environment asks for, on GPUs or on a CPU.

    The model enables autocast around its networks itself, so Accelerate's own autocast is off. Accelerate
    knows of fp16 only, for which it scales the loss; for DeepSpeed see `let_deepspeed_autocast`.

    Raises:
        UserError: the ranks that the launcher started did not find each other, or fp16 on a CPU.
    """
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    on_cpu = wants_cpu or not torch.accelerator.is_available()
    precision = config.train.mixed_precision
    if precision == "fp16" and on_cpu:
        raise UserError("train.mixed_precision: fp16 needs a GPU; set it to bf16 or fp32 on a CPU")

    # DeepSpeed scales an fp16 loss itself.
    scales_loss = precision == "fp16" and not deepspeed
    # Longer than that of the heartbeat, which names the rank that the others wait for.
    group = InitProcessGroupKwargs(timeout=timedelta(seconds=config.train.hang_timeout) + _GROUP_GRACE)
    data_parallel = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True, find_unused_parameters=_trains_parts(config)
    )
    handlers: list[KwargsHandler] = [group, data_parallel]
    if scales_loss:
        handlers.append(AutocastKwargs(enabled=False))
    if deepspeed:
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        if on_cpu:
            # Otherwise DeepSpeed selects a backend that is not available, and every rank is rank 0.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            group.backend = "gloo"
    accelerator = Accelerator(
        # `cpu=True` would disable DeepSpeed, which reads the variable above instead.
        cpu=on_cpu and not deepspeed,
        mixed_precision="fp16" if scales_loss else "no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.train.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        kwargs_handlers=handlers,
    )
    _check_world_size(accelerator)
    if on_cpu:
        keep_freed_memory()
    if precision == "bf16" and accelerator.is_main_process and not computes_in_bf16(accelerator.device):
        _LOGGER.warning(
            "train.mixed_precision: %s has no instructions for bf16, which takes up to ten times as long as "
            "fp32 here. Set train.mixed_precision=auto, which selects the faster one, or fp32",
            "this processor" if on_cpu else accelerator.device,
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _configure_deepspeed(accelerator, config)
    return accelerator


def _trains_parts(config: ExperimentConfig) -> bool:
    """Whether some steps leave parameters without a gradient, which data parallelism must then find."""
    return isinstance(config, CMVAEExperiment) and config.objective.alignment.pretrain > 0


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, dim: int) -> Tensor:
        ctx.dim, ctx.size = dim, values.shape[dim]
        return gather(values, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # Every rank's loss depends on these values.
        total = gradient.contiguous()
        torch.distributed.all_reduce(total)
        return total.narrow(ctx.dim, torch.distributed.get_rank() * ctx.size, ctx.size), None


def _is_alone() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1


def rank_of_process() -> int:
    """Rank of this process; 0 if it is the only one."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def gather(values: Tensor, dim: int) -> Tensor:
    """Concatenate the values of all ranks along `dim`, without a gradient; must be called on all ranks.

    Every rank must have equally many. A single rank gets `values` itself.
    """
    if _is_alone():
        return values
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts, dim)


def gather_with_gradient(values: Tensor, dim: int) -> Tensor:
    """Concatenate the values of all ranks along `dim`, with a gradient; must be called on all ranks.

    The gradient is the sum of the gradients of the losses of all ranks, so that the mean of the gradients
    over ranks is the gradient of the mean loss. Every rank must have equally many values. A single rank gets
    `values` itself.
    """
    if _is_alone():
        return values
    return cast(Tensor, _Gather.apply(values, dim))


def start_evaluation_accelerator() -> Accelerator:
    """Create the Accelerator of an evaluation: ranks share a split and wrap no module, in fp32.

    Raises:
        UserError: the ranks did not find each other, or were launched under DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "an evaluation does not run under DeepSpeed, as it has nothing to shard. Launch it with "
            "configs/accelerate/ddp.yaml, or as a single process"
        )
    on_cpu = not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu)
    _check_world_size(accelerator)
    if on_cpu:
        keep_freed_memory()
    return accelerator


def _check_world_size(accelerator: Accelerator) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != launched:
        raise UserError(
            f"the launcher started {launched} ranks, but they found {accelerator.num_processes} "
            f"({accelerator.distributed_type.value}): they would work independently. Launch with one of "
            "configs/accelerate/*.yaml"
        )


def _configure_deepspeed(accelerator: Accelerator, config: ExperimentConfig) -> None:
    settings = accelerator.deepspeed_plugin.deepspeed_config
    # `auto` needs a prepared loader, and ours is already split over ranks.
    settings["train_micro_batch_size_per_gpu"] = config.train.batch_size_per_rank(accelerator.num_processes)
    settings["gradient_accumulation_steps"] = config.train.gradient_accumulation_steps
    settings["gradient_clipping"] = config.optimizer.max_grad_norm or 0.0


def let_deepspeed_autocast(accelerator: Accelerator, dtype: torch.dtype | None) -> None:
    """Set the precision of the networks in DeepSpeed's settings, if it is used.

    Sets its `torch_autocast` block, which keeps parameters and densities in fp32, not its `bf16` block.

    Args:
        accelerator: before it prepares anything.
        dtype: precision of the networks; None is fp32.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED and dtype is not None:
        settings = accelerator.deepspeed_plugin.deepspeed_config
        settings["torch_autocast"] = {"enabled": True, "dtype": str(dtype).removeprefix("torch.")}


def zero_stage(accelerator: Accelerator) -> int:
    """Stage of ZeRO; 0 if every rank has all weights and the whole optimizer."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else plugin.zero_stage


def run_on_main(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Call a function on rank 0 and return its result on all ranks; must be called on all ranks.

    Raises:
        UserError: on all ranks, if `function` raises one.
    """
    outcome: list[Result | UserError | None] = [None]
    if accelerator.is_main_process:
        try:
            outcome[0] = function()
        except UserError as error:
            outcome[0] = error
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(outcome, device=accelerator.device)
    (result,) = outcome
    if isinstance(result, UserError):
        raise result
    return result  # type: ignore[return-value]


def raise_on_all_ranks(accelerator: Accelerator, problem: str | None, error: type[UserError]) -> None:
    """Raise an error on all ranks if any of them has a problem; must be called on all ranks.

    Args:
        accelerator: the ranks.
        problem: what is wrong on this rank, or None.
        error: class of the error.

    Raises:
        UserError: an `error` that names the ranks and their problems.
    """
    problems = gather_problems(accelerator, problem)
    if problems:
        raise error(problems)


def gather_problems(accelerator: Accelerator, problem: str | None) -> str:
    """Describe the problems of all ranks in one line; must be called on all ranks.

    Args:
        accelerator: the ranks.
        problem: what is wrong on this rank, or None.

    Returns:
        The same line on all ranks, empty if no rank has a problem.
    """
    problems = [problem]
    if accelerator.num_processes > 1:
        problems = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(problems, problem)
    return "; ".join(f"rank {rank}: {what}" for rank, what in enumerate(problems) if what is not None)
