"""Residual image networks of the PolyMNIST and CUBICC experiments, at any width and of many sizes.

Source: the networks released with MMVAE+ and CMVAE. At width 64 on five modalities of 28×28, with 40 clusters
and 32 + 32 latent dimensions, a CMVAE made of them has 22.16 M parameters (22.17 M are published). Those for
CUBICC, from 64×64 down to 2×2, are kept in github.com/srl-ethz/mmvaeplus,
src/models/encoder_decoder_blocks/resnet_cub_image.py.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from cmvae.modalities import Modality
from cmvae.models.networks.convolutions import Conv3x3, LeakyReLU, PooledConv, UpsampledConv
from cmvae.models.networks.encoder import TwoTrunkEncoder
from cmvae.models.networks.one_pixel import Conv2d
from cmvae.utils.errors import UserError

LEAKY_SLOPE = 0.2
# A residual branch starts small, so that a block is near the identity at initialisation.
RESIDUAL_SCALE = 0.1

_MIN_HALVINGS = 2
# Images of up to so many pixels a side halve twice, as those of PolyMNIST.
_SMALL = 32
# Larger ones halve down to this, as those of CUBICC, or as far as both sides are even.
_LOWEST = 2
# What is left after that must not be larger: linear maps go from and to all of it.
_MAX_LOWEST = 16


def num_halvings(height: int, width_px: int) -> int:
    """How often an image is halved: PolyMNIST's 28×28 twice, to 7×7; CUBICC's 64×64 five times, to 2×2."""
    halvings = _MIN_HALVINGS
    if max(height, width_px) > _SMALL:
        while all(
            side % 2 ** (halvings + 1) == 0 and side >> halvings > _LOWEST for side in (height, width_px)
        ):
            halvings += 1
    return halvings


def _filters(width: int, halvings: int) -> list[int]:
    """Filters after each halving, none included: doubled twice, then constant."""
    return [width * min(2**stage, 4) for stage in range(halvings + 1)]


class ResidualBlock(nn.Module):
    """(B, C_in, H, W) to (B, C_out, H, W): shortcut + 0.1 · (lrelu, conv, lrelu, conv)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.branch = _branch(in_channels, out_channels, Conv3x3, Conv3x3)
        self.shortcut = _shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return torch.add(self.shortcut(x), self.branch(x), alpha=RESIDUAL_SCALE)


class PooledResidualBlock(nn.Module):
    """A `ResidualBlock`, then means of 3×3 pixels at every other; what commutes with them comes after."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.branch = _branch(in_channels, out_channels, Conv3x3, PooledConv)
        self.shortcut = _shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block and pool."""
        shortcut = self.shortcut(F.avg_pool2d(x, 3, stride=2, padding=1))
        # In place, as nobody keeps what was pooled.
        return shortcut.add_(self.branch(x), alpha=RESIDUAL_SCALE)


class UpsampledResidualBlock(nn.Module):
    """Nearest ×2, then a `ResidualBlock`; what commutes with the upsampling is done before it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.branch = _branch(in_channels, out_channels, UpsampledConv, Conv3x3)
        self.shortcut = _shortcut(in_channels, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample and apply the block."""
        shortcut = F.interpolate(self.shortcut(x), scale_factor=2.0, mode="nearest")
        # In place, as nobody keeps what was upsampled.
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
    """An image (B, C, H, W) to features (B, F) of a map that is halved `len(filters) − 1` times."""

    def __init__(self, channels: int, filters: list[int]) -> None:
        super().__init__()
        *pooled, last = itertools.pairwise([filters[0], *filters])
        layers: list[nn.Module] = [Conv3x3(channels, filters[0])]
        layers += [*(PooledResidualBlock(*way) for way in pooled), ResidualBlock(*last)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Features in the order (h, w, c): with channels-last maps that is no copy."""
        return rearrange(self.layers(x), "b c h w -> b (h w c)")


class ImageEncoder(TwoTrunkEncoder):
    """Images (B, C, H, W) in [0, 1]."""

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

    def prepare(self, x: Tensor) -> Tensor:
        """As `TwoTrunkEncoder.prepare`."""
        return x.contiguous(memory_format=torch.channels_last)


class ImageDecoder(nn.Module):
    """Latents (B, D_z + D_w) to the likelihood's parameters for an image (B, C, H, W)."""

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
            *(UpsampledResidualBlock(before, after) for before, after in higher),
            LeakyReLU(LEAKY_SLOPE),
            Conv3x3(width, channels),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Decode a batch of concatenated (z, w)."""
        maps = rearrange(self.stem(latents), "b (h w c) -> b c h w", h=self.height, w=self.width_px)
        return self.layers(maps)


def check_image_size(modality: Modality, name: str) -> None:
    """Refuse images that these networks cannot halve often enough.

    Raises:
        UserError: the modality is no image, its height or width is not divisible by 4, or what is left where
            a side is odd is too large.
    """
    if len(modality.shape) != 3 or modality.num_categories:
        raise UserError(
            f"model.modalities.{name}.network: 'resnet' takes maps of (channels, height, width), not a "
            f"modality of kind {modality.kind}; leave network out for what fits it"
        )
    _, height, width_px = modality.shape
    if height % 4 or width_px % 4:
        raise UserError(
            f"modality {name!r}: network 'resnet' halves an image twice or more, so height and width "
            f"must be divisible by 4, not {height}×{width_px}. Resize the images when packing"
        )
    halvings = num_halvings(height, width_px)
    rows, columns = height >> halvings, width_px >> halvings
    if max(rows, columns) > _MAX_LOWEST:
        raise UserError(
            f"modality {name!r}: network 'resnet' halves an image while both sides are even and above "
            f"{_LOWEST}, which leaves {rows}×{columns} of {height}×{width_px}; more than {_MAX_LOWEST} a "
            "side are too many. Resize the images when packing, for example to 64×64 or 128×128"
        )
