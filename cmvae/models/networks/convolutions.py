"""The same numbers as torch's own operations, by a gradient that needs less memory or less time."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmvae.models.networks import one_pixel


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
