"""Residual image networks of the PolyMNIST experiment, at any width and any size that halves twice.

Source: the networks released with MMVAE+ and CMVAE. At width 64 on 28×28, with five modalities, 40 clusters
and 32 + 32 latent dimensions, a CMVAE made of them has 22.16 M parameters (22.17 M are published).
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from cmvae.data.schema import ModalitySchema
from cmvae.errors import UserError

LEAKY_SLOPE = 0.2
# A residual branch starts small, so that a block is near the identity at initialisation.
RESIDUAL_SCALE = 0.1


class ResidualBlock(nn.Module):
    """(B, C_in, H, W) to (B, C_out, H, W): shortcut + 0.1 · (lrelu, conv, lrelu, conv)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        hidden = min(in_channels, out_channels)
        self.branch = nn.Sequential(
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(in_channels, hidden, 3, padding=1),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(hidden, out_channels, 3, padding=1),
        )
        self.shortcut = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        return torch.add(self.shortcut(x), self.branch(x), alpha=RESIDUAL_SCALE)


class PosteriorHeads(nn.Module):
    """Location and raw scale of one posterior, each by its own linear map of the features."""

    def __init__(self, in_features: int, latent_dim: int) -> None:
        super().__init__()
        self.loc = nn.Linear(in_features, latent_dim)
        self.raw_scale = nn.Linear(in_features, latent_dim)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F) to two (B, D)."""
        return self.loc(features), self.raw_scale(features)


class ImageTrunk(nn.Module):
    """An image (B, C, H, W) to features (B, 4·width · H/4 · W/4)."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            ResidualBlock(width, width),
            nn.AvgPool2d(3, stride=2, padding=1),
            ResidualBlock(width, 2 * width),
            nn.AvgPool2d(3, stride=2, padding=1),
            ResidualBlock(2 * width, 4 * width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features in the order (h, w, c): with channels-last maps that is no copy."""
        return rearrange(self.layers(x), "b c h w -> b (h w c)")


class ImageEncoder(nn.Module):
    """Two separate trunks, one for q(z|x) and one for q(w|x)."""

    def __init__(self, schema: ModalitySchema, width: int, shared_dim: int, private_dim: int) -> None:
        super().__init__()
        channels, height, width_px = schema.shape
        features = 4 * width * (height // 4) * (width_px // 4)
        self.shared_trunk = ImageTrunk(channels, width)
        self.private_trunk = ImageTrunk(channels, width)
        self.shared_heads = PosteriorHeads(features, shared_dim)
        self.private_heads = PosteriorHeads(features, private_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """An image (B, C, H, W) in [0, 1] to loc and raw scale of q(z|x), then of q(w|x)."""
        x = x.contiguous(memory_format=torch.channels_last)
        return (
            *self.shared_heads(self.shared_trunk(x)),
            *self.private_heads(self.private_trunk(x)),
        )


class ImageDecoder(nn.Module):
    """Latents (B, D_z + D_w) to the location of an image (B, C, H, W)."""

    def __init__(self, schema: ModalitySchema, width: int, shared_dim: int, private_dim: int) -> None:
        super().__init__()
        channels, height, width_px = schema.shape
        self.height, self.width_px = height // 4, width_px // 4
        self.stem = nn.Linear(shared_dim + private_dim, 4 * width * self.height * self.width_px)
        self.layers = nn.Sequential(
            ResidualBlock(4 * width, 2 * width),
            nn.Upsample(scale_factor=2, mode="nearest"),
            ResidualBlock(2 * width, width),
            nn.Upsample(scale_factor=2, mode="nearest"),
            ResidualBlock(width, width),
            nn.LeakyReLU(LEAKY_SLOPE),
            nn.Conv2d(width, channels, 3, padding=1),
        )

    def forward(self, latents: Tensor) -> Tensor:
        """Decode a batch of concatenated (z, w)."""
        maps = rearrange(self.stem(latents), "b (h w c) -> b c h w", h=self.height, w=self.width_px)
        return self.layers(maps)


def check_image_size(schema: ModalitySchema, modality: str) -> None:
    """Refuse images that these networks cannot halve twice.

    Raises:
        UserError: the modality is no image, or its height or width is not divisible by 4.
    """
    if schema.kind != "image" or len(schema.shape) != 3:
        raise UserError(f"modality {modality!r}: network 'resnet' takes images, not {schema.kind}")
    _, height, width = schema.shape
    if height % 4 or width % 4:
        raise UserError(
            f"modality {modality!r}: network 'resnet' halves an image twice, so height and width must be "
            f"divisible by 4, not {height}×{width}. Resize the images when packing"
        )
