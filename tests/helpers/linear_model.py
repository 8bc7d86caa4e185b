"""A CMVAE with linear encoders and decoders, whose marginals are known for normal densities."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch import Tensor, nn

from cmvae.config import LikelihoodConfig, ModalityConfig, ModelConfig
from cmvae.modalities import ImageModality
from cmvae.models.cmvae import CMVAE

NUM_PIXELS = 3
LIKELIHOOD_SCALE = 0.6
PRIOR_SCALE = math.log(2)  # softplus(0)


class LinearEncoder(nn.Module):
    """Locations are linear in the pixels; raw scales are constant."""

    def __init__(self, shared_dim: int, private_dim: int, raw_scale: float) -> None:
        super().__init__()
        self.shared = nn.Linear(NUM_PIXELS, shared_dim)
        self.private = nn.Linear(NUM_PIXELS, private_dim)
        self.raw_scale = raw_scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shared, private = self.shared(x.flatten(1)), self.private(x.flatten(1))
        raw_scales = [torch.full_like(loc, self.raw_scale) for loc in (shared, private)]
        return shared, raw_scales[0], private, raw_scales[1]


class LinearDecoder(nn.Module):
    """A linear map of (z, w) to an image of one row."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.map = nn.Linear(latent_dim, NUM_PIXELS)

    def forward(self, latents: Tensor) -> Tensor:
        return self.map(latents)[:, None, None, :]


def linear_model(names: Sequence[str], num_clusters: int, raw_scale: float = 0.0) -> CMVAE:
    """A linear-Gaussian CMVAE with 2-dimensional z and w, `num_clusters` active clusters and an inactive one.

    Its posteriors have the exact means for a single cluster at the origin, and larger scales.
    """
    torch.manual_seed(0)
    # The weight must not enter the density, so it is not 1.
    likelihood = LikelihoodConfig(family="normal", scale=LIKELIHOOD_SCALE, weight=7.0)
    config = ModelConfig(
        family="normal",
        shared_dim=2,
        private_dim=2,
        num_clusters=num_clusters + 1,
        modalities={name: ModalityConfig(width=2, likelihood=likelihood) for name in names},
    )
    modality = ImageModality(shape=(1, 8, 8))
    model = CMVAE(config, dict.fromkeys(names, modality))
    for name in names:
        model.encoders[name] = LinearEncoder(2, 2, raw_scale)
        model.decoders[name] = LinearDecoder(4)
    with torch.no_grad():
        model.cluster_prior.logits.copy_(torch.randn(num_clusters + 1))
        for name in names:
            _set_posterior_locations(model.encoders[name], model.decoders[name])
    model.cluster_prior.active[-1] = False
    return model.eval()


def _set_posterior_locations(encoder: LinearEncoder, decoder: LinearDecoder) -> None:
    """Set the locations to the mean of (z, w) given x, for a prior with mean 0."""
    weight, bias = decoder.map.weight, decoder.map.bias
    covariance = PRIOR_SCALE**2 * weight @ weight.T + LIKELIHOOD_SCALE**2 * torch.eye(NUM_PIXELS)
    gain = PRIOR_SCALE**2 * weight.T @ torch.linalg.inv(covariance)
    for head, rows in ((encoder.shared, slice(0, 2)), (encoder.private, slice(2, 4))):
        head.weight.copy_(gain[rows])
        head.bias.copy_(-gain[rows] @ bias)


def exact_log_likelihood(model: CMVAE, inputs: dict[str, Tensor]) -> np.ndarray:
    """Log p(x_1, …, x_M), (N,): a mixture of multivariate normal densities, one per cluster."""
    names = list(inputs)
    num_pixels = NUM_PIXELS * len(names)
    from_z = np.zeros((num_pixels, 2))
    from_w = np.zeros((num_pixels, 2 * len(names)))
    bias = np.zeros(num_pixels)
    for m, name in enumerate(names):
        rows = slice(m * NUM_PIXELS, (m + 1) * NUM_PIXELS)
        linear = model.decoders[name].map
        weight = linear.weight.detach().double().numpy()
        from_z[rows], from_w[rows, 2 * m : 2 * m + 2] = weight[:, :2], weight[:, 2:]
        bias[rows] = linear.bias.detach().double().numpy()
    covariance = PRIOR_SCALE**2 * (from_z @ from_z.T + from_w @ from_w.T) + LIKELIHOOD_SCALE**2 * np.eye(
        num_pixels
    )
    x = torch.cat([inputs[name].flatten(1) for name in names], dim=1).double().numpy()
    active = model.cluster_prior.active.numpy()
    logits = model.cluster_prior.logits.detach().double().numpy()[active]
    means = model.cluster_prior.means.detach().double().numpy()[active]
    log_weights = logits - logsumexp(logits)
    parts = [
        log_weight + np.atleast_1d(multivariate_normal(from_z @ mean + bias, covariance).logpdf(x))
        for log_weight, mean in zip(log_weights, means, strict=True)
    ]
    return logsumexp(parts, axis=0)
