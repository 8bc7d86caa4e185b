"""What all encoders have in common: two separate trunks, and linear heads on each."""

from __future__ import annotations

from torch import Tensor, nn


class PosteriorHeads(nn.Module):
    """Location and raw scale of one posterior, each by its own linear map of the features."""

    def __init__(self, in_features: int, latent_dim: int) -> None:
        super().__init__()
        self.loc = nn.Linear(in_features, latent_dim)
        self.raw_scale = nn.Linear(in_features, latent_dim)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """(B, F) to two (B, D)."""
        return self.loc(features), self.raw_scale(features)


class TwoTrunkEncoder(nn.Module):
    """Two separate trunks, one for q(z|x) and one for q(w|x).

    Args:
        shared_trunk: what `prepare` gives to features (B, F).
        private_trunk: the same for w.
        num_features: F of the shared and of the private trunk.
        shared_dim: D_z.
        private_dim: D_w.
    """

    def __init__(
        self,
        shared_trunk: nn.Module,
        private_trunk: nn.Module,
        num_features: tuple[int, int],
        shared_dim: int,
        private_dim: int,
    ) -> None:
        super().__init__()
        self.shared_trunk = shared_trunk
        self.private_trunk = private_trunk
        self.shared_heads = PosteriorHeads(num_features[0], shared_dim)
        self.private_heads = PosteriorHeads(num_features[1], private_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Data (B, *shape), see `cmvae.modalities`, to loc and raw scale of q(z|x), then of q(w|x)."""
        x = self.prepare(x)
        return (
            *self.shared_heads(self.shared_trunk(x)),
            *self.private_heads(self.private_trunk(x)),
        )

    def encode_shared(self, x: Tensor) -> Tensor:
        """The location of q(z|x) alone, (B, D_z), without the trunk of w."""
        return self.shared_heads(self.shared_trunk(self.prepare(x)))[0]

    def prepare(self, x: Tensor) -> Tensor:
        """Data as both trunks take it."""
        return x
