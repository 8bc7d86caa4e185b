"""p(x | z, w) of one modality: how a decoder's output is compared with data, and what it means as data.

A decoder gives parameters (..., B, *parameter shape), see `cmvae.modalities`; densities are fp32, in nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from cmvae.config import LikelihoodConfig
from cmvae.modalities import Modality
from cmvae.models.distributions import FAMILIES


class Likelihood(ABC):
    """One family of likelihoods."""

    @abstractmethod
    def log_prob(self, x: Tensor, parameters: Tensor, scale: float) -> Tensor:
        """Log-density of every element of `x`.

        Args:
            x: (B, ...).
            parameters: (..., B, ...).
            scale: of families that have one.

        Returns:
            With the leading axes of `parameters` and the event axes of `x`.
        """

    @abstractmethod
    def to_data(self, parameters: Tensor) -> Tensor:
        """The mean of the likelihood as data; the most probable one where there is no mean."""


@dataclass(frozen=True)
class LocationLikelihood(Likelihood):
    """Normal or Laplace around the decoder's output, with a fixed scale."""

    family: str

    def log_prob(self, x: Tensor, parameters: Tensor, scale: float) -> Tensor:
        """As `Likelihood.log_prob`."""
        return FAMILIES[self.family](parameters, parameters.new_full((), scale)).log_prob(x, event_dims=0)

    def to_data(self, parameters: Tensor) -> Tensor:
        """As `Likelihood.to_data`: the location."""
        return parameters


class BernoulliLikelihood(Likelihood):
    """Independent yes or no; parameters are logits. Of values between 0 and 1 it is the cross-entropy."""

    def log_prob(self, x: Tensor, parameters: Tensor, scale: float) -> Tensor:
        """As `Likelihood.log_prob`."""
        return -F.binary_cross_entropy_with_logits(parameters, x.expand_as(parameters), reduction="none")

    def to_data(self, parameters: Tensor) -> Tensor:
        """As `Likelihood.to_data`: the probability."""
        return parameters.sigmoid()


class CategoricalLikelihood(Likelihood):
    """One of several at every position; parameters have an axis of logits more than the data."""

    def log_prob(self, x: Tensor, parameters: Tensor, scale: float) -> Tensor:
        """As `Likelihood.log_prob`."""
        places = x.expand(parameters.shape[:-1]).unsqueeze(-1)
        return parameters.log_softmax(-1).gather(-1, places).squeeze(-1)

    def to_data(self, parameters: Tensor) -> Tensor:
        """As `Likelihood.to_data`: the most probable place."""
        return parameters.argmax(-1)


LIKELIHOODS: dict[str, Likelihood] = {
    "normal": LocationLikelihood("normal"),
    "laplace": LocationLikelihood("laplace"),
    "bernoulli": BernoulliLikelihood(),
    "categorical": CategoricalLikelihood(),
}


def likelihood_of(config: LikelihoodConfig, modality: Modality) -> Likelihood:
    """The family that a config asks for, or the default one of the modality's kind."""
    return LIKELIHOODS[config.family or modality.likelihoods[0]]
