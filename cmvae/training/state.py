"""Where a training stands: the counters that a checkpoint carries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cmvae.data.plan import Handover


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
    handovers: list[Handover] = field(default_factory=list)
    """Where the number of ranks changed, in the order of time."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TrainState:
        """The inverse of `dataclasses.asdict`.

        Raises:
            TypeError: a counter is not one of these.
        """
        # A checkpoint from before there were handovers has none.
        handovers = [Handover(**handover) for handover in content.get("handovers", [])]
        return cls(**{**content, "handovers": handovers})
