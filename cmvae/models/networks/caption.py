"""Caption networks of the CUBICC experiment, for any width and vocabulary, and any length divisible by 8.

2-D convolutions treat an embedded text as an image with one channel, of size length × embedding. Source of
kernels, strides, padding, biases and order of layers: the networks released with MMVAE+ and CMVAE, as kept in
github.com/srl-ethz/mmvaeplus, src/models/encoder_decoder_blocks/cnn_cub_text.py. The published settings are
width 32, length 32 and a vocabulary of 1,590. There are two differences: the embedding is a lookup instead of
a product with one-hot vectors, which is the same function, and the decoder returns logits instead of
probabilities.

Batch norm: in training, statistics are those of one call on one rank, so the batch size per rank should not
be tiny. A decoder is called once per step for all sources and samples, M · K · B rows, and normalises over
all of them; the released code decodes one source at a time. With several ranks, each rank keeps the running
statistics of its own part of the data, and the export has those of rank 0. For samples without a text, the
text of another sample of the batch is encoded, see `cmvae.training.cmvae_task.fill_missing`, so that
statistics are computed from real texts only.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from cmvae.modalities import Modality
from cmvae.models.networks.encoder import TwoTrunkEncoder
from cmvae.models.networks.one_pixel import Conv2d, ConvTranspose2d
from cmvae.utils.errors import UserError

_HALVINGS = 3
# The trunk of z halves only the embedding twice more.
_EMBEDDING_HALVINGS = _HALVINGS + 2


def embedding_dim(width: int) -> int:
    """Embedding dimension E: four times the width, as published, rounded up to a multiple of 32."""
    step = 2**_EMBEDDING_HALVINGS
    return step * math.ceil(4 * width / step)


class TokenEmbedding(nn.Module):
    """Embedding that equals `nn.Linear` on one-hot vectors, including its initialisation.

    Args:
        num_tokens: size of the vocabulary.
        dim: E.
    """

    def __init__(self, num_tokens: int, dim: int) -> None:
        super().__init__()
        bound = num_tokens**-0.5
        self.weight = nn.Parameter(torch.empty(num_tokens, dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, L) int64 to (B, L, E)."""
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
    """Trunk of w, from embedded texts (B, 1, L, E) to features (B, F)."""
    return nn.Sequential(
        _halve(1, width),
        _halve(width, 2 * width),
        _halve(2 * width, 4 * width),
        nn.Flatten(),
    )


def num_private_features(length: int, width: int) -> int:
    """Number of features F of `private_trunk` for texts of `length` tokens."""
    return 4 * width * (length // 2**_HALVINGS) * (embedding_dim(width) // 2**_HALVINGS)


class CaptionEncoder(TwoTrunkEncoder):
    """Encoder of tokens (B, L) int64. Both trunks share one embedding; the trunk of z has more layers."""

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

    @override
    def prepare(self, x: Tensor) -> Tensor:
        """Embed the tokens: (B, 1, L, E)."""
        return self.embedding(x).unsqueeze(1)


class CaptionDecoder(nn.Module):
    """Decoder with separate stems for z and w, whose outputs are concatenated at size (L/8, E/8).

    Further layers upsample them to one embedding per position, from which logits are computed.
    """

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
        # (8·width, L/8, E/8) → (1, L, E), with no normalisation in the last stage.
        self.layers = nn.Sequential(
            _same(8 * width, 4 * width),
            _double(4 * width, 2 * width),
            _double(2 * width, width),
            ConvTranspose2d(width, 1, 4, stride=2, padding=1),
            nn.ReLU(),
        )
        self.logits = nn.Linear(dim, modality.num_categories)

    def forward(self, latents: Tensor) -> Tensor:
        """Map concatenated (z, w), (B, D_z + D_w), to logits (B, L, vocabulary)."""
        shared, private = latents[..., None, None].split(self.latent_dims, dim=1)
        joined = torch.cat([self.private_stem(private), self.shared_stem(shared)], dim=1)
        return self.logits(self.layers(joined).squeeze(1))


def check_caption(modality: Modality, name: str) -> None:
    """Check that a modality is text of a length that can be halved three times.

    Raises:
        UserError: the modality does not fit.
    """
    if modality.kind != "text":
        raise UserError(
            f"model.modalities.{name}.network: caption networks take text, not a modality of kind "
            f"{modality.kind}. Remove the key to use the default network of this kind"
        )
    step = 2**_HALVINGS
    (length,) = modality.shape
    if length % step:
        raise UserError(
            f"modality {name!r}: caption networks halve a text {_HALVINGS} times, so its length must be a "
            f"multiple of {step}, not {length}. Pack the data with {step * math.ceil(length / step)} tokens "
            f"per text, or set model.modalities.{name}.network to mlp"
        )
