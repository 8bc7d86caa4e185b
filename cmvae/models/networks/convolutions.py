"""Convolutions and activations with the same values as those of torch, in less time or memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmvae.models.networks import one_pixel

# With fewer filters, convolving before pooling is faster on a CPU.
_MIN_FILTERS = 24


class _LeakyReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float) -> Tensor:
        y = F.leaky_relu(x, slope)
        ctx.save_for_backward(y)
        ctx.slope = slope
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.leaky_relu_backward(gradient, y, ctx.slope, self_is_result=True), None


class LeakyReLU(nn.Module):
    """`torch.nn.LeakyReLU` that saves its output for the gradient, not its input.

    The next layer saves the same tensor, so less memory is used. Input and output have the same sign, which
    determines the gradient. Torch does this only in place, which is not allowed for tensors that DeepSpeed
    ZeRO-3 has wrapped.

    Args:
        slope: slope for negative values; must be positive.
    """

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation to a tensor of any shape."""
        return cast(Tensor, _LeakyReLU.apply(x, self.slope))


class _BiasGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, biased: Tensor, bias: Tensor) -> Tensor:
        ctx.dtype = bias.dtype
        return biased.view_as(biased)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.sum((0, 2, 3)).to(ctx.dtype)


def conv_transpose2d(x: Tensor, kernel: Tensor, bias: Tensor, stride: int, padding: int) -> Tensor:
    """`torch.nn.functional.conv_transpose2d` whose bias gradient is computed as a plain sum.

    On a CPU, the bias gradient of oneDNN takes half as long as the other gradients.

    Args:
        x: (B, C_in, H, W).
        kernel: (C_in, C_out, k, k).
        bias: (C_out,).
        stride: stride of the output.
        padding: number of pixels to remove from each side of the output.

    Returns:
        (B, C_out, H', W')
    """
    biased = one_pixel.conv_transpose2d(x, kernel, bias.detach(), stride=stride, padding=padding)
    return cast(Tensor, _BiasGradient.apply(biased, bias))


class _BoxMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(x)
        rows = rearrange(x, "b c h w -> b h w c")
        return F.avg_pool2d(x, 3, stride=1, padding=1), rows[:, 0].clone(), rows[:, :, 0].clone()

    @staticmethod
    def backward(ctx: Any, grad_means: Tensor, grad_top: Tensor, grad_left: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        sizes = [3, 3], [1, 1], [1, 1]
        grad_x = torch.ops.aten.avg_pool2d_backward(grad_means, x, *sizes, False, True, None)
        return _add_to_borders(grad_x, grad_top, grad_left)


def box_mean(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute means over 3×3 pixels with zero padding, and extract the first row and first column of `x`.

    The gradients of row and column are added in place, not as maps that are zero elsewhere.

    Args:
        x: (B, C, H, W).

    Returns:
        Means (B, C, H, W), first row (B, W, C) and first column (B, H, C).
    """
    return cast("tuple[Tensor, Tensor, Tensor]", _BoxMean.apply(x))


class _AddToBorders(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, top: Tensor, left: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return _add_to_borders(x, top, left)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = rearrange(gradient, "b c h w -> b h w c")
        return gradient, rows[:, 0], rows[:, :, 0]


def add_to_borders(x: Tensor, top: Tensor, left: Tensor) -> Tensor:
    """Add to the first row and the first column of `x` in place.

    Args:
        x: (B, C, H, W), not saved for the gradient by another operation.
        top: (B, W, C).
        left: (B, H, C).
    """
    return cast(Tensor, _AddToBorders.apply(x, top, left))


def _add_to_borders(x: Tensor, top: Tensor, left: Tensor) -> Tensor:
    rows = rearrange(x, "b c h w -> b h w c")
    rows[:, 0] += top
    rows[:, :, 0] += left
    return x


class Conv3x3(one_pixel.Conv2d):
    """3×3 convolution, (B, C_in, H, W) to (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)


class UpsampledConv(Conv3x3):
    """Nearest-neighbour upsampling by 2, then a 3×3 convolution: (B, C_in, H, W) to (B, C_out, 2H, 2W).

    It takes 4/9 of the operations. The four pixels that come from one pixel are equal, so the weights that
    they are multiplied with can be summed beforehand. This gives a transposed convolution of stride 2, whose
    4×4 kernel is the sum of the flipped 3×3 kernel over its four shifts. The parameter is the 3×3 kernel.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Upsample and convolve."""
        flipped = rearrange(self.weight, "o i h w -> i o h w").flip(2, 3)
        shifts = [(left, 1 - left, top, 1 - top) for left in (0, 1) for top in (0, 1)]
        kernel = torch.stack([F.pad(flipped, shift) for shift in shifts]).sum(0)
        return conv_transpose2d(x, kernel, cast(Tensor, self.bias), stride=2, padding=1)


class PooledConv(Conv3x3):
    """3×3 convolution, then 3×3 mean pooling with stride 2: (B, C_in, H, W) to (B, C_out, H/2, W/2).

    On a CPU it takes a quarter of the operations: means and convolutions commute, and a convolution after the
    mean is only needed at every other pixel. At the border the two orders differ, because each ignores the
    intermediate values outside the image. In the first row of the result, the first row of the image is
    therefore removed from the lower weights and added to the upper weights; likewise for the first column.
    H and W must be even; otherwise the last row and column would need a correction, too.

    With few filters, the dozen small operations at the border take longer than they save. On a GPU, each of
    them is a kernel launch. In these cases the convolution comes first.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and pool."""
        if x.device.type != "cpu" or self.in_channels < _MIN_FILTERS:
            return F.avg_pool2d(super().forward(x), 3, stride=2, padding=1)
        means, top, left = box_mean(x)
        weight, bias = self.weight / 9, cast(Tensor, self.bias) / 9
        to_top = rearrange(weight[:, :, 0] - weight[:, :, 2], "o i k -> (k i) o")
        to_left = rearrange(weight[..., 0] - weight[..., 2], "o i k -> (k i) o")
        # A window has six of nine pixels in the image at an edge, and four in the corner of both edges.
        missing = torch.full((top.shape[1] // 2, 1), 3.0, dtype=bias.dtype)
        missing[0] = 2
        return add_to_borders(
            one_pixel.conv2d(means, self.weight, self.bias, stride=2, padding=1),
            _sums_per_weight(top, mean_last=True) @ to_top - missing * bias,
            _sums_per_weight(left, mean_last=False) @ to_left - 3 * bias,
        )


def _sums_per_weight(line: Tensor, mean_last: bool) -> Tensor:
    """Sum the pixels that each of three weights is multiplied with, at every other position of a line.

    Args:
        line: (B, L, C).
        mean_last: convolve, then sum three neighbours; else sum, then convolve.

    Returns:
        (B, L/2, 3 C)
    """
    matrix = _sum_matrix(line.shape[1], mean_last).to(line.dtype)
    return rearrange(matrix @ line, "b (l k) c -> b l (k c)", k=3)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _sum_matrix(length: int, mean_last: bool) -> Tensor:
    """Matrix of zeros and ones, (L/2 · 3, L), with which `_sums_per_weight` multiplies a line."""

    def windows(lines: Tensor, stride: int) -> Tensor:
        """Three neighbours along the first axis, zero-padded, as a new last axis."""
        padding = [0, 0] * (lines.ndim - 1) + [1, 1]
        return F.pad(lines, padding).unfold(0, 3, stride)

    neighbours = windows(torch.eye(length), 1)
    sums = windows(neighbours, 2).sum(-1) if mean_last else windows(neighbours.sum(-1), 2)
    return rearrange(sums, "l x k -> (l k) x")
