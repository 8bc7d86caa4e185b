"""Adam, the learning rate (a pure function of the step) and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast
from safetensors.torch import load_file
from torch import Tensor, nn

from cmvae.config import OptimizerConfig
from cmvae.utils.errors import UserError

EMA_NAME = "ema.safetensors"
"""File of the average in a checkpoint."""

# The state of torch's Adam with amsgrad per parameter, besides the number of steps.
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
def reinitialize_parameters(
    accelerator: Accelerator, optimizer: torch.optim.Optimizer, values: Mapping[nn.Parameter, Tensor]
) -> None:
    """Set parameters to the values of rank 0 and reset their optimizer state; must be called on all ranks.

    Args:
        accelerator: the ranks.
        optimizer: prepared.
        values: new values by parameter.
    """
    for parameter, value in values.items():
        value = broadcast(value.to(parameter.dtype))
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            _reinitialize_under_deepspeed(parameter, value)
            continue
        parameter.copy_(value)
        for past in optimizer.state[parameter].values():
            # Adam's number of steps is a scalar and stays.
            if isinstance(past, Tensor) and past.ndim:
                past.zero_()


def _reinitialize_under_deepspeed(parameter: nn.Parameter, value: Tensor) -> None:
    """Set the parameter, and DeepSpeed's own copy of it with its optimizer state."""
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
    """Learning rate of the update after `step` updates: linear warm-up, then the schedule."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


class WeightAverage:
    """Exponential moving average a ← d·a + (1 − d)·θ of the trained parameters of a module.

    d is the smaller of `decay` and (1 + n) / (10 + n) after n updates, so that a short training is not
    dominated by its random start (the rule of TensorFlow's ExponentialMovingAverage).

    Args:
        module: whose parameters are averaged; each must be whole on this rank.
        decay: of every update, below 1.
    """

    # Not torch's AveragedModel: it copies the whole module with its hooks and a frozen CMVAE, and knows the
    # number of updates only on the device. Not diffusers' EMAModel: it has no names to save tensors under.

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._current = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._current.items()}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Update the average after an update of the weights.

        Args:
            num_updates: number of updates before that one.
        """
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        torch._foreach_lerp_(list(self._average.values()), list(self._current.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the weights of the module by the average while the block runs."""
        kept = {name: p.detach().clone() for name, p in self._current.items()}
        self._assign(self._average)
        try:
            yield
        finally:
            self._assign(kept)

    @torch.no_grad()
    def _assign(self, values: dict[str, torch.Tensor]) -> None:
        torch._foreach_copy_(list(self._current.values()), list(values.values()))

    def state_dict(self) -> dict[str, Tensor]:
        """The average of each parameter by name; the tensors change with every update."""
        return dict(self._average)

    def load(self, folder: Path) -> None:
        """Load the average from a checkpoint.

        Raises:
            UserError: the checkpoint has no average, or one of other parameters.
        """
        if not (folder / EMA_NAME).is_file():
            raise UserError(f"{folder / EMA_NAME}: missing, so the average of the weights cannot resume")
        content = load_file(folder / EMA_NAME)
        if content.keys() != self._average.keys():
            raise UserError(
                f"{folder / EMA_NAME}: damaged: it is the average of other parameters than those of this run"
            )
        for name, tensor in content.items():
            self._average[name].copy_(tensor)
