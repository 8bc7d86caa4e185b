"""Adam and the learning rate, which is a pure function of the step and so needs no state of its own."""

from __future__ import annotations

import math

import torch
from torch import nn

from cmvae.config import OptimizerConfig


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
