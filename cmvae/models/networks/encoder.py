"""Base class of encoders: two separate trunks, each with linear heads."""

from __future__ import annotations

from torch import Tensor, nn


class PosteriorHeads(nn.Module):
    """Linear heads for the location and the raw scale of one posterior.

    Args:
        in_features: F.
        latent_dim: D.
    """

    def __init__(self, in_features: int, latent_dim: int) -> None:
        super().__init__()
        self.loc = nn.Linear(in_features, latent_dim)
        self.raw_scale = nn.Linear(in_features, latent_dim)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Map features (B, F) to loc (B, D) and raw scale (B, D)."""
        return self.loc(features), self.raw_scale(features)


class TwoTrunkEncoder(nn.Module):
    """Encoder with two separate trunks, one for q(z|x) and one for q(w|x).

    Args:
        shared_trunk: maps the output of `prepare` to features (B, F) for z.
        private_trunk: maps the output of `prepare` to features (B, F) for w.
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
        """Map data to the parameters of the posteriors.

        Args:
            x: (B, *shape), see `cmvae.modalities`.

        Returns:
            loc and raw scale of q(z|x), (B, D_z), then of q(w|x), (B, D_w).
        """
        x = self.prepare(x)
        return (
            *self.shared_heads(self.shared_trunk(x)),
            *self.private_heads(self.private_trunk(x)),
        )

    def encode_shared(self, x: Tensor) -> Tensor:
        """Map data (B, *shape) to the location of q(z|x), (B, D_z), without the trunk of w."""
        return self.shared_heads(self.shared_trunk(self.prepare(x)))[0]

    def prepare(self, x: Tensor) -> Tensor:
        """Convert data (B, *shape) to the input of both trunks; by default unchanged."""
        return x
