"""Adam, the learning rate (a pure function of the step) and the moving average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
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
    """Give parameters the first rank's values, and let the optimizer forget their past; on all ranks.

    Args:
        accelerator: the ranks.
        optimizer: prepared.
        values: by parameter.
    """
    for parameter, value in values.items():
        value = broadcast(value.to(parameter.dtype))
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            _reinitialize_under_deepspeed(parameter, value)
            continue
        parameter.copy_(value)
        for past in optimizer.state[parameter].values():
            # Adam's count of steps is a scalar, and stays.
            if isinstance(past, Tensor) and past.ndim:
                past.zero_()


def _reinitialize_under_deepspeed(parameter: nn.Parameter, value: Tensor) -> None:
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


class WeightAverage:
    """The average a ← d·a + (1 − d)·θ over the updates of a module's trained parameters.

    d is `decay`, but (1 + n) / (10 + n) after n updates where that is less, so that a short training is not
    dominated by its random start (the rule of TensorFlow's ExponentialMovingAverage).

    Args:
        module: whose parameters; each must be whole on this rank.
        decay: of every update, below 1.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._current = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._current.items()}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Take in the weights after one more update.

        Args:
            num_updates: how many there were before it.
        """
        decay = min(self.decay, (1 + num_updates) / (10 + num_updates))
        torch._foreach_lerp_(list(self._average.values()), list(self._current.values()), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Let the module have the average while the block lasts."""
        kept = {name: p.detach().clone() for name, p in self._current.items()}
        self._assign(self._average)
        try:
            yield
        finally:
            self._assign(kept)

    @torch.no_grad()
    def _assign(self, values: dict[str, torch.Tensor]) -> None:
        torch._foreach_copy_(list(self._current.values()), list(values.values()))

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint."""
        content = {name: tensor.contiguous() for name, tensor in self._average.items()}
        save_file(content, folder / EMA_NAME)

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote into a checkpoint.

        Raises:
            UserError: the checkpoint has no average, or one of other weights.
        """
        if not (folder / EMA_NAME).is_file():
            raise UserError(f"{folder / EMA_NAME}: missing, so the average of the weights cannot go on")
        content = load_file(folder / EMA_NAME)
        if content.keys() != self._average.keys():
            raise UserError(
                f"{folder / EMA_NAME}: damaged: it is the average of other weights than there are"
            )
        for name, tensor in content.items():
            self._average[name].copy_(tensor)
