"""Image networks of a few large convolutions, for CPUs and small GPUs.

A strided convolution reduces height and width to a quarter, and further ones halve them while a side is
longer than 8 pixels: PolyMNIST's 28×28 becomes 7×7, 64×64 becomes 8×8. A residual block follows at that size.
The decoder begins with linear layers, where z and w interact, and upsamples by pixel shuffle (Shi et al.,
CVPR 2016). Nearly all operations are then matrix products and convolutions of many channels on small maps,
which processors compute close to their peak performance. docs/polymnist.md compares decoders.
"""

from __future__ import annotations

import itertools

from einops import rearrange
from torch import Tensor, nn
from typing_extensions import override

from cmvae.modalities import Modality
from cmvae.models.networks.convolutions import Conv3x3, LeakyReLU
from cmvae.models.networks.encoder import TwoTrunkEncoder
from cmvae.models.networks.image import LEAKY_SLOPE, ResidualBlock
from cmvae.utils.errors import UserError

_STEM_STRIDE = 4
# Maps are halved while a side is longer than this.
_MAX_MAP_SIDE = 8
# The number of filters doubles with each halving after the stem, up to this multiple of the width.
_MAX_MULTIPLE = 4
# Units of the linear layers of the decoder, as a multiple of the width.
_HIDDEN_MULTIPLE = 8


def _filters(height: int, width_px: int, width: int) -> list[int]:
    """Number of filters of the stem and after each halving."""
    filters, side = [width], max(height, width_px) // _STEM_STRIDE
    while side > _MAX_MAP_SIDE:
        filters.append(min(2 * filters[-1], _MAX_MULTIPLE * width))
        side //= 2
    return filters


def _stride(filters: list[int]) -> int:
    """Ratio of the side of an image to that of the smallest map."""
    return _STEM_STRIDE * 2 ** (len(filters) - 1)


def _trunk(channels: int, filters: list[int]) -> nn.Sequential:
    """Trunk from images (B, C, H, W) to the flattened smallest map (B, h·w·F)."""
    halvings = [
        layer
        for before, after in itertools.pairwise(filters)
        for layer in (LeakyReLU(LEAKY_SLOPE), nn.Conv2d(before, after, 4, stride=2, padding=1))
    ]
    return nn.Sequential(
        nn.Conv2d(channels, filters[0], 6, stride=_STEM_STRIDE, padding=1),
        *halvings,
        ResidualBlock(filters[-1], filters[-1]),
        LeakyReLU(LEAKY_SLOPE),
        _FlattenMap(),
    )


class _FlattenMap(nn.Module):
    """(B, F, h, w) to (B, h·w·F). Channels-last maps are not copied."""

    def forward(self, maps: Tensor) -> Tensor:
        return rearrange(maps, "b c h w -> b (h w c)")


class StridedImageEncoder(TwoTrunkEncoder):
    """Encoder of images (B, C, H, W) in [0, 1]."""

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

    @override
    def prepare(self, x: Tensor) -> Tensor:
        """Scale images to [−1, 1], so that the input of the first layer is centred."""
        return 2 * x - 1


class StridedImageDecoder(nn.Module):
    """Decoder of images: from latents to the parameters of the likelihood."""

    def __init__(self, modality: Modality, width: int, shared_dim: int, private_dim: int) -> None:
        super().__init__()
        channels, height, width_px = modality.shape
        filters = _filters(height, width_px, width)
        self.height, self.width_px = (side // _stride(filters) for side in (height, width_px))
        hidden = _HIDDEN_MULTIPLE * width
        self.stem = nn.Sequential(
            nn.Linear(shared_dim + private_dim, hidden),
            LeakyReLU(LEAKY_SLOPE),
            nn.Linear(hidden, hidden),
            LeakyReLU(LEAKY_SLOPE),
            nn.Linear(hidden, filters[-1] * self.height * self.width_px),
        )
        half_size = max(1, width // 2)
        doublings = [
            layer
            for before, after in itertools.pairwise([*reversed(filters), half_size])
            for layer in (LeakyReLU(LEAKY_SLOPE), Conv3x3(before, 4 * after), nn.PixelShuffle(2))
        ]
        self.layers = nn.Sequential(
            *doublings, LeakyReLU(LEAKY_SLOPE), Conv3x3(half_size, 4 * channels), nn.PixelShuffle(2)
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Map concatenated (z, w), (B, D_z + D_w), to (B, C, H, W)."""
        maps = rearrange(self.stem(latents), "b (h w c) -> b c h w", h=self.height, w=self.width_px)
        return self.layers(maps)


def check_strided_size(modality: Modality, name: str) -> None:
    """Check that a modality is an image whose sides are divisible by the total stride.

    Raises:
        UserError: the modality does not fit.
    """
    if len(modality.shape) != 3 or modality.num_categories:
        raise UserError(
            f"model.modalities.{name}.network: strided takes images, not a modality of kind "
            f"{modality.kind}. Remove the key to use the default network of this kind"
        )
    _, height, width_px = modality.shape
    stride = _stride(_filters(height, width_px, 1))
    if height % stride or width_px % stride:
        raise UserError(
            f"modality {name!r}: network strided divides the sides of such an image by {stride}, so height "
            f"and width must be multiples of {stride}, not {height}×{width_px}. Resize the images when "
            "packing"
        )
