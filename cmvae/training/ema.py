"""An exponential moving average of weights, for validation and export."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cmvae.utils.errors import UserError

EMA_NAME = "ema.safetensors"


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
