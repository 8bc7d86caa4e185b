"""Image networks of few, large convolutions, for CPUs and small GPUs.

A strided convolution takes an image to a quarter of its height and width, and further ones halve it while it
is larger than 8 pixels a side: PolyMNIST's 28×28 becomes 7×7, 64×64 becomes 8×8. A residual block works
there, and the decoder comes back by pixel shuffle (Shi et al., CVPR 2016). Nearly all operations are then
in convolutions of many channels on small maps, which a processor computes near its peak.
"""

from __future__ import annotations

import itertools

from einops import rearrange
from torch import Tensor, nn

from cmvae.modalities import Modality
from cmvae.models.networks.convolutions import Conv3x3, LeakyReLU
from cmvae.models.networks.encoder import TwoTrunkEncoder
from cmvae.models.networks.image import LEAKY_SLOPE, ResidualBlock
from cmvae.utils.errors import UserError

_STEM_STRIDE = 4
# Maps are halved while a side is longer than this.
_LOWEST = 8
# Filters double with every halving after the stem, up to so many times the width.
_MAX_MULTIPLE = 4


def _filters(height: int, width_px: int, width: int) -> list[int]:
    """Filters of the stem and after each halving that follows it."""
    filters, side = [width], max(height, width_px) // _STEM_STRIDE
    while side > _LOWEST:
        filters.append(min(2 * filters[-1], _MAX_MULTIPLE * width))
        side //= 2
    return filters


def _stride(filters: list[int]) -> int:
    """Pixels of the image that a pixel of the smallest map stands for, along one side."""
    return _STEM_STRIDE * 2 ** (len(filters) - 1)


def _trunk(channels: int, filters: list[int]) -> nn.Sequential:
    """An image (B, C, H, W) to the smallest map (B, F, h, w)."""
    halving = [
        layer
        for before, after in itertools.pairwise(filters)
        for layer in (LeakyReLU(LEAKY_SLOPE), nn.Conv2d(before, after, 4, stride=2, padding=1))
    ]
    return nn.Sequential(
        nn.Conv2d(channels, filters[0], 6, stride=_STEM_STRIDE, padding=1),
        *halving,
        ResidualBlock(filters[-1], filters[-1]),
        LeakyReLU(LEAKY_SLOPE),
        _FlattenMap(),
    )


class _FlattenMap(nn.Module):
    """(B, F, h, w) to (B, h·w·F): with channels-last maps that is no copy."""

    def forward(self, maps: Tensor) -> Tensor:
        return rearrange(maps, "b c h w -> b (h w c)")


class StridedImageEncoder(TwoTrunkEncoder):
    """Images (B, C, H, W) in [0, 1]."""

    def __init__(self, modality: Modality, width: int, shared_dim: int, private_dim: int) -> None:
        channels, height, width_px = modality.shape
        filters = _filters(height, width_px, width)
        stride = _stride(filters)
        num_features = filters[-1] * (height // stride) * (width_px // stride)
        super().__init__(
            _trunk(channels, filters),
            _trunk(channels, filters),
            (num_features, num_features),
            shared_dim,
            private_dim,
        )

    def prepare(self, x: Tensor) -> Tensor:
        """As `TwoTrunkEncoder.prepare`: centred, so that the first layer sees both signs."""
        return 2 * x - 1


class StridedImageDecoder(nn.Module):
    """Latents (B, D_z + D_w) to the likelihood's parameters for an image (B, C, H, W)."""

    def __init__(self, modality: Modality, width: int, shared_dim: int, private_dim: int) -> None:
        super().__init__()
        channels, height, width_px = modality.shape
        filters = _filters(height, width_px, width)
        self.height, self.width_px = (side // _stride(filters) for side in (height, width_px))
        self.stem = nn.Linear(shared_dim + private_dim, filters[-1] * self.height * self.width_px)
        doubling = [
            layer
            for before, after in itertools.pairwise(reversed(filters))
            for layer in (Conv3x3(before, 4 * after), nn.PixelShuffle(2), LeakyReLU(LEAKY_SLOPE))
        ]
        self.layers = nn.Sequential(
            ResidualBlock(filters[-1], filters[-1]),
            LeakyReLU(LEAKY_SLOPE),
            *doubling,
            Conv3x3(width, channels * _STEM_STRIDE**2),
            nn.PixelShuffle(_STEM_STRIDE),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Decode a batch of concatenated (z, w)."""
        maps = rearrange(self.stem(latents), "b (h w c) -> b c h w", h=self.height, w=self.width_px)
        return self.layers(maps)


def check_strided_size(modality: Modality, name: str) -> None:
    """Refuse what is no image, or one whose sides these networks cannot divide.

    Raises:
        UserError: it does not fit.
    """
    if len(modality.shape) != 3 or modality.num_categories:
        raise UserError(
            f"model.modalities.{name}.network: 'strided' takes images, not a modality of kind "
            f"{modality.kind}; leave network out for what fits it"
        )
    _, height, width_px = modality.shape
    stride = _stride(_filters(height, width_px, 1))
    if height % stride or width_px % stride:
        raise UserError(
            f"modality {name!r}: network 'strided' divides the sides of such an image by {stride}, so "
            f"height and width must be multiples of {stride}, not {height}×{width_px}. Resize the images "
            "when packing"
        )
