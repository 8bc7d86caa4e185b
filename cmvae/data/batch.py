"""From what the reader yields to what a model takes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmvae.data.index import ModalitySchema
from cmvae.modalities import KINDS


def to_device(
    batch: Mapping[str, Any], schemas: Mapping[str, ModalitySchema], device: torch.device
) -> dict[str, Any]:
    """Move a batch and turn its modalities from what is stored into data, see `cmvae.modalities`.

    Args:
        batch: from a reader.
        schemas: of the modalities in it, as the model knows them: data that was packed elsewhere is
            standardised as that which the model was trained on.
        device: where to; what is no tensor, such as `key`, stays what it is.
    """
    moved = {
        name: _move(value, device) if isinstance(value, Tensor) else value for name, value in batch.items()
    }
    for name, schema in schemas.items():
        if name in moved:
            moved[name] = KINDS[schema.kind].to_data(moved[name], schema)
    return moved


def _move(value: Tensor, device: torch.device) -> Tensor:
    # From other memory a copy to a GPU waits for all that the GPU was asked to do before.
    pinned = value.pin_memory() if device.type == "cuda" else value
    return pinned.to(device, non_blocking=True)


def as_stored(data: Tensor, schema: ModalitySchema) -> np.ndarray:
    """What a model takes or makes of one modality, data (B, *shape), as it would lie in a shard."""
    return KINDS[schema.kind].to_stored(data.detach().cpu().numpy(), schema)
