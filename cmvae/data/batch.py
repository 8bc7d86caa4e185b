"""From what the reader yields to what a model takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmvae.modalities import Modality


def stack_values(
    samples: Sequence[Mapping[str, np.ndarray]], modalities: Mapping[str, Modality]
) -> dict[str, Tensor]:
    """Stack the stored values of B samples.

    Args:
        samples: B times modality to stored value (*shape), without the modalities that a sample lacks.
        modalities: the M modalities of the batch by name.

    Returns:
        By modality (B, *shape), zeros where a sample lacks it, and `mask` (B, M) bool.
    """
    batch = {}
    for name, modality in modalities.items():
        missing = np.zeros(modality.shape, modality.dtype)
        batch[name] = torch.from_numpy(np.stack([sample.get(name, missing) for sample in samples]))
    batch["mask"] = torch.tensor([[name in sample for name in modalities] for sample in samples])
    return batch


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
    pinned = value.pin_memory() if device.type == "cuda" and value.device.type == "cpu" else value
    return pinned.to(device, non_blocking=True)
