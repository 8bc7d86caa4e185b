"""Where a training stands: the counters that a checkpoint carries."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class TrainState:
    """Counters of one run. A batch is one forward pass of every rank, a step one optimizer update."""

    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that every rank has consumed."""
    step: int = 0
    samples: int = 0
    """Samples consumed by all ranks together."""
    validated_step: int = 0
    """Step of the last validation between updates."""
    best_step: int | None = None
    """Step of the validation with the lowest loss."""
    best_loss: float | None = None
