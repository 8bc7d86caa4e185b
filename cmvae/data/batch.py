"""From what the reader yields to what a model takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmvae.data.schema import RESERVED_NAMES


def to_device(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch and turn its images into fp32 in [0, 1], channels-last.

    Images travel as bytes, a quarter of their size as floats; `key` stays what it is.
    """
    return {
        name: _move(value, device) if name in RESERVED_NAMES else _image(value, device)
        for name, value in batch.items()
    }


def _image(pixels: Tensor, device: torch.device) -> Tensor:
    moved = pixels.to(device, non_blocking=True)
    return moved.to(torch.float32, memory_format=torch.channels_last).div_(255)


def _move(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
