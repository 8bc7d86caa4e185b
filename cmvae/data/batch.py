"""From what the reader yields to what a model takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmvae.modalities import Modality


def to_device(
    batch: Mapping[str, Any], modalities: Mapping[str, Modality], device: torch.device
) -> dict[str, Any]:
    """Move a batch and turn its modalities from what is stored into data, see `cmvae.modalities`.

    Args:
        batch: from a reader.
        modalities: those in it by name, as the model knows them: data that was packed elsewhere is
            standardised as that which the model was trained on.
        device: where to; what is no tensor, such as `key`, stays what it is.
    """
    moved = {
        name: _move(value, device) if isinstance(value, Tensor) else value for name, value in batch.items()
    }
    for name, modality in modalities.items():
        if name in moved:
            moved[name] = modality.to_data(moved[name])
    return moved


def _move(value: Tensor, device: torch.device) -> Tensor:
    # From other memory a copy to a GPU waits for all that the GPU was asked to do before.
    pinned = value.pin_memory() if device.type == "cuda" else value
    return pinned.to(device, non_blocking=True)
