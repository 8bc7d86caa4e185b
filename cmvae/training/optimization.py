"""Adam and the learning rate, which is a pure function of the step and so needs no state of its own."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast
from torch import Tensor, nn

from cmvae.config import OptimizerConfig

# What torch's Adam with amsgrad remembers of a parameter, besides the number of steps.
_ADAM_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Adam:
    """Adam over all parameters that require a gradient."""
    return torch.optim.Adam(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=config.learning_rate,
        betas=config.betas,
        amsgrad=config.amsgrad,
        weight_decay=config.weight_decay,
        # One kernel for all parameters; the default loops over them in Python on a CPU.
        fused=True,
    )


@torch.no_grad()
def restart_parameters(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, values: Mapping[nn.Parameter, Tensor]
) -> None:
    """Give parameters the first rank's values, and let the optimizer forget their past; on all ranks.

    Args:
        accelerator: the ranks.
        optimizer: prepared.
        values: by parameter.
    """
    for parameter, value in values.items():
        value = broadcast(value.to(parameter.dtype))
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            _restart_under_deepspeed(parameter, value)
            continue
        parameter.copy_(value)
        for past in optimizer.state[parameter].values():
            # Adam's count of steps is a scalar, and stays.
            if isinstance(past, Tensor) and past.ndim:
                past.zero_()


def _restart_under_deepspeed(parameter: nn.Parameter, value: Tensor) -> None:
    """DeepSpeed updates parts of a copy of its own: set that copy and its states, too."""
    from deepspeed import utils, zero

    if hasattr(parameter, "ds_id"):  # ZeRO-3: a part of the parameter on each rank
        with zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(value)
        part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        utils.safe_set_local_fp32_param(parameter, part)
        for key in _ADAM_STATES:
            utils.safe_set_local_optimizer_state(parameter, torch.zeros_like(part), key)
    else:
        parameter.copy_(value)
        utils.safe_set_full_fp32_param(parameter, value)
        for key in _ADAM_STATES:
            utils.safe_set_full_optimizer_state(parameter, torch.zeros_like(value), key)


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The rate for the update that follows `step` updates: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every parameter group the rate `value`."""
    for group in optimizer.param_groups:
        group["lr"] = value
