"""Caption network for small data sets: its encoder of z ignores the order of words.

Convolutions over embedded words (`caption.py`) learn from tens of thousands of sentences, but memorise a few
hundred. What modalities share is mostly which words occur, so the encoder of z is a bag of words with two
hidden layers. The encoder of w and the decoder are those of `caption.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmvae.modalities import Modality
from cmvae.modalities.text import SPECIAL_TOKENS
from cmvae.models.networks.caption import TokenEmbedding, embedding_dim, num_private_features, private_trunk
from cmvae.models.networks.encoder import TwoTrunkEncoder

# Hidden units of both layers, as a multiple of the width.
_HIDDEN = 8


class BagOfWords(nn.Module):
    """Linear map of a bag of words.

    Args:
        num_tokens: size of the vocabulary.
        hidden: H.
    """

    def __init__(self, num_tokens: int, hidden: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.layer = nn.Linear(num_tokens, hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens (B, L) int64 to (B, H)."""
        bag = torch.zeros(len(tokens), self.num_tokens, device=tokens.device).scatter_(1, tokens, 1.0)
        bag[:, : len(SPECIAL_TOKENS)] = 0
        # Normalised, so that long and short texts have equal weight.
        return self.layer(F.normalize(bag))


class BagOfWordsEncoder(TwoTrunkEncoder):
    """Encoder of tokens (B, L) int64: z from a bag of words, w from the embedded text."""

    def __init__(self, modality: Modality, width: int, shared_dim: int, private_dim: int) -> None:
        num_tokens, hidden = modality.num_categories, _HIDDEN * width
        super().__init__(
            shared_trunk=nn.Sequential(
                BagOfWords(num_tokens, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
            ),
            private_trunk=nn.Sequential(
                TokenEmbedding(num_tokens, embedding_dim(width)),
                nn.Unflatten(1, (1, -1)),
                *private_trunk(width),
            ),
            num_features=(hidden, num_private_features(modality.shape[0], width)),
            shared_dim=shared_dim,
            private_dim=private_dim,
        )
