"""How one process finds the others: the Accelerator, and the agreement of all ranks at every step."""

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

Decision = TypeVar("Decision")


# How much longer than the heartbeat a collective operation waits.
_GROUP_GRACE = timedelta(minutes=2)

_LOGGER = logging.getLogger(__name__)


def start_accelerator(config: ExperimentConfig) -> Accelerator:
    """The Accelerator that the launcher's environment asks for, on GPUs or on CPU.

    The model switches autocast on around its networks itself; so Accelerate is told of no precision but
    fp16, for which it scales the loss, and its own autocast around the whole call is off. What DeepSpeed is
    told of it says `let_deepspeed_autocast`.

    Raises:
        UserError: the ranks that the launcher started did not find each other, or fp16 on a CPU.
    """
    deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() == "true"
    on_cpu = wants_cpu or not torch.accelerator.is_available()
    precision = config.train.mixed_precision
    if precision == "fp16" and on_cpu:
        raise UserError("train.mixed_precision: fp16 needs a GPU; on a CPU take bf16 or fp32")

    # DeepSpeed scales an fp16 loss itself.
    scales_loss = precision == "fp16" and not deepspeed
    # After the heartbeat's, which names the rank that is waited for.
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
            # Without it DeepSpeed picks a backend that is not there, and every rank thinks that it is rank 0.
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
            group.backend = "gloo"
    accelerator = Accelerator(
        # Under DeepSpeed `cpu=True` would switch DeepSpeed off; its own variable above says it instead.
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
            "fp32 here. Set train.mixed_precision=auto for what is faster, or fp32",
            "this processor" if on_cpu else accelerator.device,
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        _configure_deepspeed(accelerator, config)
    return accelerator


def _trains_parts(config: ExperimentConfig) -> bool:
    """Whether some steps leave parameters without a gradient, which data parallelism then looks for."""
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
    """This process's rank, 0 where there is only one."""
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def gather(values: Tensor, dim: int) -> Tensor:
    """The values of all ranks along `dim`, in the order of the ranks; equally many on each; no gradient.

    With one rank `values` itself. To be called on all ranks.
    """
    if _is_alone():
        return values
    parts = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, values.contiguous())
    return torch.cat(parts, dim)


def gather_with_gradient(values: Tensor, dim: int) -> Tensor:
    """The values of all ranks along `dim`, in the order of the ranks; equally many on each.

    The gradient sums what the losses of all ranks say, so that a mean of gradients over ranks is that of the
    mean of the losses. With one rank `values` itself. To be called on all ranks.
    """
    if _is_alone():
        return values
    return cast(Tensor, _Gather.apply(values, dim))


def start_evaluation_accelerator() -> Accelerator:
    """The Accelerator of an evaluation: ranks that share a split and wrap no module, in fp32.

    Raises:
        UserError: the ranks did not find each other, or were launched under DeepSpeed.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise UserError(
            "an evaluation has nothing to shard, so DeepSpeed has no part in it. Launch it with "
            "configs/accelerate/ddp.yaml, or as one process"
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
            f"({accelerator.distributed_type.value}): they would work apart. Launch with one of "
            "configs/accelerate/*.yaml"
        )


def _configure_deepspeed(accelerator: Accelerator, config: ExperimentConfig) -> None:
    settings = accelerator.deepspeed_plugin.deepspeed_config
    # `auto` needs a prepared loader, and ours is split by rank already; one value feeds both libraries.
    settings["train_micro_batch_size_per_gpu"] = config.train.batch_size
    settings["gradient_accumulation_steps"] = config.train.gradient_accumulation_steps
    settings["gradient_clipping"] = config.optimizer.max_grad_norm or 0.0


def let_deepspeed_autocast(accelerator: Accelerator, dtype: torch.dtype | None) -> None:
    """Tell DeepSpeed, if it is there, which precision the networks have, before it prepares them.

    It gets its `torch_autocast` block, which leaves parameters and densities in fp32, never its `bf16` block.

    Args:
        accelerator: not prepared yet.
        dtype: of the networks; None is fp32.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED and dtype is not None:
        settings = accelerator.deepspeed_plugin.deepspeed_config
        settings["torch_autocast"] = {"enabled": True, "dtype": str(dtype).removeprefix("torch.")}


def zero_stage(accelerator: Accelerator) -> int:
    """ZeRO's stage, or 0 where every rank has all weights and the whole optimizer."""
    plugin = accelerator.state.deepspeed_plugin
    return 0 if plugin is None else plugin.zero_stage


def run_on_main(accelerator: Accelerator, decide: Callable[[], Decision]) -> Decision:
    """What rank 0 decides, on all ranks alike, so that they cannot disagree; to be called on all ranks.

    Raises:
        UserError: on all ranks, when `decide` raises one.
    """
    outcome: list[Decision | UserError | None] = [None]
    if accelerator.is_main_process:
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[0] = error
    if accelerator.num_processes > 1:
        torch.distributed.broadcast_object_list(outcome, device=accelerator.device)
    (decision,) = outcome
    if isinstance(decision, UserError):
        raise decision
    return decision  # type: ignore[return-value]


def raise_on_all_ranks(accelerator: Accelerator, problem: str | None, error: type[UserError]) -> None:
    """Raise `error` on all ranks if any has a problem, naming them; to be called on all ranks.

    Args:
        accelerator: the ranks.
        problem: this rank's, or None.
        error: what to raise.

    Raises:
        UserError: an `error`.
    """
    told = gather_problems(accelerator, problem)
    if told:
        raise error(told)


def gather_problems(accelerator: Accelerator, problem: str | None) -> str:
    """What ranks have found, naming them, the same on all ranks; to be called on all ranks.

    Args:
        accelerator: the ranks.
        problem: this rank's, or None.

    Returns:
        One line, empty if no rank has a problem.
    """
    problems = [problem]
    if accelerator.num_processes > 1:
        problems = [None] * accelerator.num_processes
        torch.distributed.all_gather_object(problems, problem)
    return "; ".join(f"rank {rank}: {what}" for rank, what in enumerate(problems) if what is not None)
