"""Convolutions that compute maps to or from a single pixel as matrix products.

Parameters and values are those of torch's layers. On processors with AMX, the bf16 kernels of oneDNN for such
maps occasionally returned NaN gradients if there were few channels. Matrix products do not use them.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

_Size = int | tuple[int, int]


def _pair(size: _Size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def conv2d(
    x: Tensor, kernel: Tensor, bias: Tensor | None = None, stride: _Size = 1, padding: _Size = 0
) -> Tensor:
    """`torch.nn.functional.conv2d`, computed as a matrix product if the result has one pixel.

    Args:
        x: (B, C_in, H, W).
        kernel: (C_out, C_in, k_h, k_w).
        bias: (C_out,).
        stride: stride of both axes, or of each.
        padding: zero padding on both sides of both axes, or of each.

    Returns:
        (B, C_out, H', W')
    """
    axes = tuple(zip(x.shape[2:], kernel.shape[2:], _pair(stride), _pair(padding), strict=True))
    if any((size + 2 * pad - k) // step for size, k, step, pad in axes):
        return F.conv2d(x, kernel, bias, stride, padding)
    # Only these weights are multiplied with pixels of the map, the others with padding.
    rows, columns = (min(size, k - pad) for size, k, _, pad in axes)
    top, left = _pair(padding)
    used = kernel[:, :, top : top + rows, left : left + columns]
    pixels = rearrange(x[:, :, :rows, :columns], "b i h w -> b (h w i)")
    return F.linear(pixels, rearrange(used, "o i h w -> o (h w i)"), bias)[..., None, None]


def conv_transpose2d(
    x: Tensor, kernel: Tensor, bias: Tensor | None = None, stride: _Size = 1, padding: _Size = 0
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d`, computed as a matrix product if `x` has one pixel.

    Args:
        x: (B, C_in, H, W).
        kernel: (C_in, C_out, k_h, k_w).
        bias: (C_out,).
        stride: stride of both axes of the result, or of each.
        padding: number of pixels to remove from both sides of both axes of the result, or of each.

    Returns:
        (B, C_out, H', W')
    """
    if x.shape[2:] != (1, 1):
        return F.conv_transpose2d(x, kernel, bias, stride, padding)
    (top, left), (height, width) = _pair(padding), kernel.shape[2:]
    kept = kernel[:, :, top : height - top, left : width - left]
    rows, columns = kept.shape[2:]
    # In the order (h, w, o), the result is a channels-last map, which matches channels-last kernels.
    values = F.linear(
        x.flatten(1),
        rearrange(kept, "i o h w -> (h w o) i"),
        None if bias is None else bias.repeat(rows * columns),
    )
    return rearrange(values, "b (h w o) -> b o h w", h=rows, w=columns)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` without dilation and groups that uses `conv2d` of this module."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C_in, H, W) to (B, C_out, H', W')."""
        return conv2d(x, self.weight, self.bias, cast(_Size, self.stride), cast(_Size, self.padding))


class ConvTranspose2d(nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` without dilation and groups that uses `conv_transpose2d` of this module."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Map (B, C_in, H, W) to (B, C_out, H', W')."""
        return conv_transpose2d(
            x, self.weight, self.bias, cast(_Size, self.stride), cast(_Size, self.padding)
        )
