"""Convolutions and activations that give the same numbers as torch's own, with less time or memory."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmvae.models.networks import one_pixel

# With fewer filters a CPU is faster if it convolves before it pools.
_FEWEST_FILTERS = 24


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
    """As torch's, which keeps its input for the gradient; this one its output, as the next layer does.

    The sign of either tells the slope. Torch does so in place only, and what DeepSpeed's
    ZeRO-3 has wrapped may not be changed in place.

    Args:
        slope: of negative values, positive itself.
    """

    def __init__(self, slope: float) -> None:
        super().__init__()
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        """Apply it, any shape."""
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
    """As `torch.nn.functional.conv_transpose2d`, but the bias' gradient is a plain sum.

    On a CPU oneDNN's own takes as long as half of the other gradients.

    Args:
        x: (B, C_in, H, W).
        kernel: (C_in, C_out, k, k).
        bias: (C_out,).
        stride: of the output.
        padding: cut off the output at each side.
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
    def backward(ctx: Any, of_means: Tensor, of_top: Tensor, of_left: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        sizes = [3, 3], [1, 1], [1, 1]
        of_x = torch.ops.aten.avg_pool2d_backward(of_means, x, *sizes, False, True, None)
        return _add_to_borders(of_x, of_top, of_left)


def box_mean(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Means of 3×3 pixels, zeros beyond the border counted; and the first row and the first column of `x`.

    The gradients of row and column are added where they belong, without a map of zeros for each.

    Args:
        x: (B, C, H, W).

    Returns:
        (B, C, H, W), (B, W, C) and (B, H, C).
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
    """Add to the first row and the first column of `x`, in place; their gradients are parts of its own.

    Args:
        x: (B, C, H, W), which nothing keeps for its gradient.
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
    """A 3×3 convolution, (B, C_in, H, W) to (B, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)


class UpsampledConv(Conv3x3):
    """Nearest ×2, then a 3×3 convolution: (B, C_in, H, W) to (B, C_out, 2H, 2W), with 4/9 of the operations.

    The four pixels of an upsampled one are equal, so that the weights that meet it can be summed beforehand:
    the same numbers come from one transposed convolution of stride 2, whose 4×4 kernel is the flipped 3×3
    one summed over its four shifts. The 3×3 kernel stays the parameter.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Upsample and convolve."""
        flipped = rearrange(self.weight, "o i h w -> i o h w").flip(2, 3)
        shifts = [(left, 1 - left, top, 1 - top) for left in (0, 1) for top in (0, 1)]
        kernel = torch.stack([F.pad(flipped, shift) for shift in shifts]).sum(0)
        return conv_transpose2d(x, kernel, cast(Tensor, self.bias), stride=2, padding=1)


class PooledConv(Conv3x3):
    """A 3×3 convolution, then means of 3×3 pixels at every other: (B, C_in, H, W) to (B, C_out, H/2, W/2).

    On a CPU with a quarter of the operations, and the same numbers: a mean and a convolution may change
    places, and of a convolution behind the mean only every other pixel is wanted. At the border they differ:
    the mean that comes last counts no pixels above the image, where a convolution of means would find some.
    So for the first row of the result the image's first row is taken from the lower weights and given to the
    upper ones, and for the first column likewise. H and W must be even, or the last ones would want it, too.

    With few filters the dozen small operations at the border take longer than what they save; on a GPU, where
    each of them is a launch, the plain order is taken, too.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve and pool."""
        if x.device.type != "cpu" or self.in_channels < _FEWEST_FILTERS:
            return F.avg_pool2d(super().forward(x), 3, stride=2, padding=1)
        means, top, left = box_mean(x)
        weight, bias = self.weight / 9, cast(Tensor, self.bias) / 9
        to_top = rearrange(weight[:, :, 0] - weight[:, :, 2], "o i k -> (k i) o")
        to_left = rearrange(weight[..., 0] - weight[..., 2], "o i k -> (k i) o")
        # Of nine pixels a mean counts six at an edge, but four in the corner, which is of both edges.
        missing = torch.full((top.shape[1] // 2, 1), 3.0, dtype=bias.dtype)
        missing[0] = 2
        return add_to_borders(
            one_pixel.conv2d(means, self.weight, self.bias, stride=2, padding=1),
            _meet_weights(top, mean_last=True) @ to_top - missing * bias,
            _meet_weights(left, mean_last=False) @ to_left - 3 * bias,
        )


def _meet_weights(line: Tensor, mean_last: bool) -> Tensor:
    """Sums of the pixels that each of three weights meets for every other place of a line.

    Args:
        line: (B, L, C).
        mean_last: a convolution, then sums of three; else sums of three, then a convolution.

    Returns:
        (B, L/2, 3 C)
    """
    met = _met_by_weights(line.shape[1], mean_last).to(line.dtype)
    return rearrange(met @ line, "b (l k) c -> b l (k c)", k=3)


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _met_by_weights(length: int, mean_last: bool) -> Tensor:
    """`_meet_weights` as a matrix of zeros and ones, (L/2 · 3, L)."""

    def windows(lines: Tensor, stride: int) -> Tensor:
        """Three neighbours along the first axis, zeros beyond its ends, as a last axis."""
        beyond = [0, 0] * (lines.ndim - 1) + [1, 1]
        return F.pad(lines, beyond).unfold(0, 3, stride)

    neighbours = windows(torch.eye(length), 1)
    met = windows(neighbours, 2).sum(-1) if mean_last else windows(neighbours.sum(-1), 2)
    return rearrange(met, "l x k -> (l k) x")
