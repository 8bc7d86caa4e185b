"""Fully connected networks with two hidden layers, for data of any kind and shape.

Categories are converted to one-hot vectors.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from cmvae.modalities import Modality
from cmvae.models.networks.encoder import TwoTrunkEncoder


def _hidden_layers(in_features: int, width: int) -> nn.Sequential:
    """Two hidden layers, (B, in_features) to (B, width)."""
    return nn.Sequential(
        nn.Linear(in_features, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
    )


class VectorEncoder(TwoTrunkEncoder):
    """Encoder of data (B, *shape), flattened, with two hidden layers of `width` units per trunk."""

    def __init__(self, modality: Modality, width: int, shared_dim: int, private_dim: int) -> None:
        num_categories = modality.num_categories
        in_features = math.prod(modality.shape) * (num_categories or 1)
        super().__init__(
            _hidden_layers(in_features, width),
            _hidden_layers(in_features, width),
            (width, width),
            shared_dim,
            private_dim,
        )
        self.num_categories = num_categories

    @override
    def prepare(self, x: Tensor) -> Tensor:
        """Flatten the data, with categories as one-hot vectors: (B, F) fp32."""
        if self.num_categories:
            x = F.one_hot(x, self.num_categories).float()
        return x.flatten(1)


class VectorDecoder(nn.Module):
    """Decoder with two hidden layers, from latents to the parameters of the likelihood."""

    def __init__(self, modality: Modality, width: int, shared_dim: int, private_dim: int) -> None:
        super().__init__()
        self.parameter_shape = modality.parameter_shape
        self.layers = _hidden_layers(shared_dim + private_dim, width)
        self.out = nn.Linear(width, math.prod(self.parameter_shape))

    def forward(self, latents: Tensor) -> Tensor:
        """Map concatenated (z, w), (B, D_z + D_w), to (B, *parameter_shape), see `cmvae.modalities`."""
        return self.out(self.layers(latents)).unflatten(1, self.parameter_shape)


def check_vector(modality: Modality, name: str) -> None:
    """Accept every modality: data of any shape can be flattened."""
