"""Likelihoods p(x | z, w) of one modality, given the output of its decoder.

A decoder returns parameters (..., B, *parameter_shape), see `cmvae.modalities`. Densities are fp32, in nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from cmvae.config import LikelihoodConfig
from cmvae.modalities import Modality
from cmvae.models.distributions import FAMILIES


class Likelihood(ABC):
    """A family of likelihoods."""

    @abstractmethod
    def log_prob(self, x: Tensor, parameters: Tensor, scale: float) -> Tensor:
        """Log-density of every element of `x`.

        Args:
            x: data, (B, *shape).
            parameters: output of the decoder, (..., B, *parameter_shape).
            scale: scale of the density; ignored by families without a scale.

        Returns:
            (..., B, *shape), in nats.
        """

    @abstractmethod
    def to_data(self, parameters: Tensor) -> Tensor:
        """Mean of the likelihood, or mode if values are categories: data (..., *shape)."""


@dataclass(frozen=True)
class LocationLikelihood(Likelihood):
    """Normal or Laplace around the decoder's output, with a fixed scale."""

    family: str

    @override
    def log_prob(self, x: Tensor, parameters: Tensor, scale: float) -> Tensor:
        return FAMILIES[self.family](parameters, parameters.new_full((), scale)).log_prob(x, event_dims=0)

    @override
    def to_data(self, parameters: Tensor) -> Tensor:
        return parameters

    def variance(self, scale: float) -> float:
        """Variance of every element around the decoder's output: σ², or 2b² of a Laplace."""
        return float(FAMILIES[self.family].variance_of(torch.tensor(scale)))


class BernoulliLikelihood(Likelihood):
    """Independent binary values; parameters are logits.

    For values between 0 and 1, the log-density is the negative cross-entropy.
    """

    @override
    def log_prob(self, x: Tensor, parameters: Tensor, scale: float) -> Tensor:
        return -F.binary_cross_entropy_with_logits(parameters, x.expand_as(parameters), reduction="none")

    @override
    def to_data(self, parameters: Tensor) -> Tensor:
        return parameters.sigmoid()


class CategoricalLikelihood(Likelihood):
    """Independent categories; the last axis of the parameters holds one logit per category."""

    @override
    def log_prob(self, x: Tensor, parameters: Tensor, scale: float) -> Tensor:
        indices = x.expand(parameters.shape[:-1]).unsqueeze(-1)
        return parameters.log_softmax(-1).gather(-1, indices).squeeze(-1)

    @override
    def to_data(self, parameters: Tensor) -> Tensor:
        return parameters.argmax(-1)


LIKELIHOODS: dict[str, Likelihood] = {
    "normal": LocationLikelihood("normal"),
    "laplace": LocationLikelihood("laplace"),
    "bernoulli": BernoulliLikelihood(),
    "categorical": CategoricalLikelihood(),
}


def likelihood_of(config: LikelihoodConfig, modality: Modality) -> Likelihood:
    """Likelihood family that the config sets, or the default of the modality."""
    return LIKELIHOODS[config.family or modality.likelihoods[0]]
