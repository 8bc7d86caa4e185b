"""The caption networks of the CUBICC experiment, at any width, vocabulary and length that halves three times.

An embedded text is a one-channel picture, length by embedding, that 2-D convolutions read and write. Source
of kernels, strides, padding, biases and order of layers: the networks released with MMVAE+ and CMVAE, as kept
in github.com/srl-ethz/mmvaeplus, src/models/encoder_decoder_blocks/cnn_cub_text.py; published are width 32,
length 32 and a vocabulary of 1,590. Here the embedding is looked up instead of multiplied with one-hot
vectors, which is the same function, and the decoder gives logits where the released one gives probabilities.

Batch norm: in training, statistics are those of one call on one rank, so a rank's batch should not be tiny.
A decoder is called once a step for all sources and samples, M · K · B rows, and normalises over all of them;
the released code decodes one source at a time. With several ranks each keeps running statistics of its own
part of the data, and those of rank 0 go into the export. Samples without a text are encoded with that of
others in their batch, see `cmvae.training.cmvae_task.fill_missing`, so that statistics are of real texts.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmvae.modalities import Modality
from cmvae.models.networks.encoder import TwoTrunkEncoder
from cmvae.models.networks.one_pixel import Conv2d, ConvTranspose2d
from cmvae.utils.errors import UserError

_HALVINGS = 3
# The trunk of z halves the embedding alone twice more.
_EMBEDDING_HALVINGS = _HALVINGS + 2


def embedding_dim(width: int) -> int:
    """Four times the width, as published, rounded up so that it halves five times."""
    step = 2**_EMBEDDING_HALVINGS
    return step * math.ceil(4 * width / step)


class TokenEmbedding(nn.Module):
    """Tokens (B, L) int64 to (B, L, E): a linear map of their one-hot vectors, and initialised as one."""

    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        bound = num_tokens**-0.5
        self.weight = nn.Parameter(torch.empty(num_tokens, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))

    def forward(self, tokens: Tensor) -> Tensor:
        """Look the tokens up."""
        return F.embedding(tokens, self.weight) + self.bias


def _normalised(convolution: Conv2d | ConvTranspose2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU())


def _halve(in_channels: int, out_channels: int) -> nn.Sequential:
    return _normalised(Conv2d(in_channels, out_channels, 4, stride=2, padding=1))


def _halve_embedding(in_channels: int, out_channels: int) -> nn.Sequential:
    return _normalised(Conv2d(in_channels, out_channels, (1, 4), stride=(1, 2), padding=(0, 1)))


def _double(in_channels: int, out_channels: int) -> nn.Sequential:
    return _normalised(ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1))


def _double_embedding(in_channels: int, out_channels: int) -> nn.Sequential:
    return _normalised(ConvTranspose2d(in_channels, out_channels, (1, 4), stride=(1, 2), padding=(0, 1)))


def _same(in_channels: int, out_channels: int) -> nn.Sequential:
    return _normalised(ConvTranspose2d(in_channels, out_channels, 3, padding=1))


def private_trunk(width: int) -> nn.Sequential:
    """Embedded texts (B, 1, L, E) to features of w, (B, F)."""
    return nn.Sequential(
        _halve(1, width),
        _halve(width, 2 * width),
        _halve(2 * width, 4 * width),
        nn.Flatten(),
    )


def num_private_features(length: int, width: int) -> int:
    """F of `private_trunk`, for texts of `length` tokens."""
    return 4 * width * (length // 2**_HALVINGS) * (embedding_dim(width) // 2**_HALVINGS)


class CaptionEncoder(TwoTrunkEncoder):
    """Tokens (B, L) int64; both trunks read one embedding, that of z goes deeper."""

    def __init__(self, modality: Modality, width: int, shared_dim: int, private_dim: int) -> None:
        (length,), dim = modality.shape, embedding_dim(width)
        rows = length // 2**_HALVINGS
        super().__init__(
            # (1, L, E) → (16·width, L/8, E/32) for z, (4·width, L/8, E/8) for w.
            shared_trunk=nn.Sequential(
                _halve(1, width),
                _halve(width, 2 * width),
                _halve(2 * width, 4 * width),
                _halve_embedding(4 * width, 8 * width),
                _halve_embedding(8 * width, 16 * width),
                nn.Flatten(),
            ),
            private_trunk=private_trunk(width),
            num_features=(
                16 * width * rows * (dim // 2**_EMBEDDING_HALVINGS),
                num_private_features(length, width),
            ),
            shared_dim=shared_dim,
            private_dim=private_dim,
        )
        self.embedding = TokenEmbedding(modality.num_categories, dim)

    def prepare(self, x: Tensor) -> Tensor:
        """As `TwoTrunkEncoder.prepare`: (B, 1, L, E)."""
        return self.embedding(x).unsqueeze(1)


class CaptionDecoder(nn.Module):
    """Separate stems for z and w, joined at (L/8, E/8), then up to a vector a position and logits of it."""

    def __init__(self, modality: Modality, width: int, shared_dim: int, private_dim: int) -> None:
        super().__init__()
        (length,), dim = modality.shape, embedding_dim(width)
        lowest = (length // 2**_HALVINGS, dim // 2**_EMBEDDING_HALVINGS)
        self.latent_dims = (shared_dim, private_dim)
        # (D, 1, 1) → (16·width, L/8, E/32) → (4·width, L/8, E/8)
        self.shared_stem = nn.Sequential(
            _normalised(ConvTranspose2d(shared_dim, 16 * width, lowest)),
            _double_embedding(16 * width, 8 * width),
            _same(8 * width, 8 * width),
            _double_embedding(8 * width, 4 * width),
        )
        self.private_stem = nn.Sequential(
            _normalised(ConvTranspose2d(private_dim, 16 * width, lowest)),
            _double_embedding(16 * width, 8 * width),
            _double_embedding(8 * width, 4 * width),
        )
        # (8·width, L/8, E/8) → (1, L, E); the last stage is not normalised.
        self.layers = nn.Sequential(
            _same(8 * width, 4 * width),
            _double(4 * width, 2 * width),
            _double(2 * width, width),
            ConvTranspose2d(width, 1, 4, stride=2, padding=1),
            nn.ReLU(),
        )
        self.logits = nn.Linear(dim, modality.num_categories)

    def forward(self, latents: Tensor) -> Tensor:
        """Concatenated (z, w), (B, D_z + D_w), to logits (B, L, vocabulary)."""
        shared, private = latents[..., None, None].split(self.latent_dims, dim=1)
        joined = torch.cat([self.private_stem(private), self.shared_stem(shared)], dim=1)
        return self.logits(self.layers(joined).squeeze(1))


def check_caption(modality: Modality, name: str) -> None:
    """Refuse what is not text, or of a length that does not halve three times.

    Raises:
        UserError: it does not fit.
    """
    if modality.kind != "text":
        raise UserError(
            f"model.modalities.{name}.network: 'caption' takes text, not a modality of kind "
            f"{modality.kind}; leave network out for what fits it"
        )
    step = 2**_HALVINGS
    (length,) = modality.shape
    if length % step:
        raise UserError(
            f"modality {name!r}: network 'caption' halves a text three times, so its length must be a "
            f"multiple of {step}, not {length}. Pack the data with {step * math.ceil(length / step)} tokens "
            f"a text, or set model.modalities.{name}.network to mlp"
        )
