"""Residual image networks of the PolyMNIST and CUBICC experiments, for any width and many image sizes.

Source: the networks released with MMVAE+ and CMVAE. With width 64, five modalities of 28×28, 40 clusters and
32 + 32 latent dimensions, a CMVAE of these networks has 22.16 M parameters (published: 22.17 M). The networks
for CUBICC, from 64×64 to 2×2, are in github.com/srl-ethz/mmvaeplus,
src/models/encoder_decoder_blocks/resnet_cub_image.py.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from typing_extensions import override

from cmvae.modalities import Modality
from cmvae.models.networks.convolutions import Conv3x3, LeakyReLU, PooledConv, UpsampledConv
from cmvae.models.networks.encoder import TwoTrunkEncoder
from cmvae.models.networks.one_pixel import Conv2d
from cmvae.utils.errors import UserError

LEAKY_SLOPE = 0.2
RESIDUAL_SCALE = 0.1
"""Factor of a residual branch, so that a block is close to the identity at initialisation."""

_MIN_HALVINGS = 2
# Images with sides of up to this many pixels are halved twice, like those of PolyMNIST.
_MAX_SMALL_SIDE = 32
# Larger images are halved to this size, like those of CUBICC, or until a side is odd.
_MIN_MAP_SIDE = 2
# Maximum side of the smallest map, which is flattened for linear layers.
_MAX_MAP_SIDE = 16


def num_halvings(height: int, width_px: int) -> int:
    """Number of times an image is halved.

    PolyMNIST's 28×28 is halved twice, to 7×7; CUBICC's 64×64 five times, to 2×2.
    """
    halvings = _MIN_HALVINGS
    if max(height, width_px) > _MAX_SMALL_SIDE:
        while all(
            side % 2 ** (halvings + 1) == 0 and side >> halvings > _MIN_MAP_SIDE
            for side in (height, width_px)
        ):
            halvings += 1
    return halvings


def _filters(width: int, halvings: int) -> list[int]:
    """Number of filters before and after each halving: doubled twice, then constant."""
    return [width * min(2**stage, 4) for stage in range(halvings + 1)]


class ResidualBlock(nn.Module):
    """Residual block, (B, C_in, H, W) to (B, C_out, H, W): shortcut + 0.1 · (lrelu, conv, lrelu, conv)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.branch = _branch(in_channels, out_channels, Conv3x3, Conv3x3)
        self.shortcut = _shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return torch.add(self.shortcut(x), self.branch(x), alpha=RESIDUAL_SCALE)


class PooledResidualBlock(nn.Module):
    """`ResidualBlock`, then 3×3 mean pooling with stride 2: (B, C_in, H, W) to (B, C_out, H/2, W/2).

    Operations that commute with the pooling are done after it.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.branch = _branch(in_channels, out_channels, Conv3x3, PooledConv)
        self.shortcut = _shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block and pool."""
        shortcut = self.shortcut(F.avg_pool2d(x, 3, stride=2, padding=1))
        # In place: no operation needs the shortcut for its gradient.
        return shortcut.add_(self.branch(x), alpha=RESIDUAL_SCALE)


class UpsampledResidualBlock(nn.Module):
    """Nearest-neighbour upsampling by 2, then a `ResidualBlock`: (B, C_in, H, W) to (B, C_out, 2H, 2W).

    Operations that commute with the upsampling are done before it.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.branch = _branch(in_channels, out_channels, UpsampledConv, Conv3x3)
        self.shortcut = _shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample and apply the block."""
        shortcut = F.interpolate(self.shortcut(x), scale_factor=2.0, mode="nearest")
        # In place: no operation needs the shortcut for its gradient.
        return shortcut.add_(self.branch(x), alpha=RESIDUAL_SCALE)


def _branch(
    in_channels: int, out_channels: int, first: type[Conv3x3], second: type[Conv3x3]
) -> nn.Sequential:
    hidden = min(in_channels, out_channels)
    return nn.Sequential(
        LeakyReLU(LEAKY_SLOPE),
        first(in_channels, hidden),
        LeakyReLU(LEAKY_SLOPE),
        second(hidden, out_channels),
    )


def _shortcut(in_channels: int, out_channels: int) -> nn.Module:
    if in_channels == out_channels:
        return nn.Identity()
    return Conv2d(in_channels, out_channels, 1, bias=False)


class ImageTrunk(nn.Module):
    """Trunk from images to the features of a map that is halved `len(filters) − 1` times.

    Args:
        channels: C.
        filters: number of filters before and after each halving.
    """

    def __init__(self, channels: int, filters: list[int]) -> None:
        super().__init__()
        *pooled, last = itertools.pairwise([filters[0], *filters])
        layers: list[nn.Module] = [Conv3x3(channels, filters[0])]
        layers += [*(PooledResidualBlock(*in_out) for in_out in pooled), ResidualBlock(*last)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, C, H, W) to features (B, F)."""
        # Flattened in the order (h, w, c), which does not copy channels-last maps.
        return rearrange(self.layers(x), "b c h w -> b (h w c)")


class ImageEncoder(TwoTrunkEncoder):
    """Encoder of images (B, C, H, W) in [0, 1]."""

    def __init__(self, modality: Modality, width: int, shared_dim: int, private_dim: int) -> None:
        channels, height, width_px = modality.shape
        halvings = num_halvings(height, width_px)
        filters = _filters(width, halvings)
        num_features = filters[-1] * (height >> halvings) * (width_px >> halvings)
        super().__init__(
            ImageTrunk(channels, filters),
            ImageTrunk(channels, filters),
            (num_features, num_features),
            shared_dim,
            private_dim,
        )

    @override
    def prepare(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


class ImageDecoder(nn.Module):
    """Decoder of images: from latents to the parameters of the likelihood."""

    def __init__(self, modality: Modality, width: int, shared_dim: int, private_dim: int) -> None:
        super().__init__()
        channels, height, width_px = modality.shape
        halvings = num_halvings(height, width_px)
        filters = _filters(width, halvings)
        self.height, self.width_px = height >> halvings, width_px >> halvings
        self.stem = nn.Linear(shared_dim + private_dim, filters[-1] * self.height * self.width_px)
        lowest, *higher = itertools.pairwise([*reversed(filters), width])
        self.layers = nn.Sequential(
            ResidualBlock(*lowest),
            *(UpsampledResidualBlock(*in_out) for in_out in higher),
            LeakyReLU(LEAKY_SLOPE),
            Conv3x3(width, channels),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Map concatenated (z, w), (B, D_z + D_w), to (B, C, H, W)."""
        maps = rearrange(self.stem(latents), "b (h w c) -> b c h w", h=self.height, w=self.width_px)
        return self.layers(maps)


def check_image_size(modality: Modality, name: str) -> None:
    """Check that a modality is an image that can be halved often enough.

    Raises:
        UserError: the modality is not an image, height or width is not divisible by 4, or the smallest map is
            too large because a side becomes odd.
    """
    if len(modality.shape) != 3 or modality.num_categories:
        raise UserError(
            f"model.modalities.{name}.network: resnet takes arrays of (channels, height, width), not a "
            f"modality of kind {modality.kind}. Remove the key to use the default network of this kind"
        )
    _, height, width_px = modality.shape
    if height % 4 or width_px % 4:
        raise UserError(
            f"modality {name!r}: network resnet halves an image at least twice, so height and width must be "
            f"divisible by 4, not {height}×{width_px}. Resize the images when packing"
        )
    halvings = num_halvings(height, width_px)
    rows, columns = height >> halvings, width_px >> halvings
    if max(rows, columns) > _MAX_MAP_SIDE:
        raise UserError(
            f"modality {name!r}: network resnet halves an image until a side is odd or at most "
            f"{_MIN_MAP_SIDE}. It reduces {height}×{width_px} to {rows}×{columns}, but at most "
            f"{_MAX_MAP_SIDE}×{_MAX_MAP_SIDE} is supported. Resize the images when packing, for example to "
            "64×64 or 128×128"
        )
