"""Precision of the networks on a device. Densities and reductions are always fp32."""

from __future__ import annotations

from typing import Literal

import torch

from cmvae.config import MixedPrecision

Precision = Literal["fp32", "bf16", "fp16"]

AUTOCAST_DTYPES: dict[Precision, torch.dtype | None] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def network_precision(setting: MixedPrecision, device: torch.device) -> Precision:
    """Resolve `train.mixed_precision` for a device: `auto` is bf16 if the device supports it, else fp32."""
    if setting != "auto":
        return setting
    return "bf16" if computes_in_bf16(device) else "fp32"


def autocast_dtype(setting: MixedPrecision, device: torch.device) -> torch.dtype | None:
    """Resolve `train.mixed_precision` to a dtype for `torch.autocast`; None is fp32."""
    return AUTOCAST_DTYPES[network_precision(setting, device)]


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for bf16. Without them, fp32 is up to ten times as fast."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # `torch.cpu.get_capabilities` does not exist in the oldest supported version of torch.
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
