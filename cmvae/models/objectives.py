"""Log-weights and the bounds IWAE and DReG, as pure functions of tensors.

Axes: M source modalities, K samples, B samples of the batch, D dimensions. All in fp32, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cmvae.models.distributions import LocationScale, sum_event_axes
from cmvae.models.likelihoods import Likelihood


@dataclass(frozen=True)
class LogWeightTerms:
    """The terms of lw[m, k], each (M, K, B): source modality, sample, member of the batch."""

    log_likelihood: Mapping[str, Tensor]
    """Of each target n: log p(x_n | z, w_m if n = m else w̃_n), not yet multiplied by s_n."""
    log_prior_shared: Tensor
    """log p(z)."""
    log_prior_private: Tensor
    """log p(w_m)."""
    log_posterior_shared: Tensor
    """log (1/M) Σ_j q(z|x_j)."""
    log_posterior_private: Tensor
    """log q(w_m|x_m)."""


def mixture_log_prob(components: Sequence[LocationScale], value: Tensor, present: Tensor) -> Tensor:
    """Log (1/J) Σ_j q_j(value): the joint posterior of the modalities that are there (paper, section 3).

    Args:
        components: M posteriors with parameters (B, D).
        value: (..., B, D).
        present: (M, B) bool, which of them are there; at least one for each member of the batch.

    Returns:
        (..., B)
    """
    # (M, ..., B)
    log_densities = torch.stack([component.log_prob(value) for component in components])
    absent = ~present.view(len(components), *[1] * (log_densities.ndim - 2), -1)
    counted = log_densities.masked_fill(absent, -torch.inf)
    return counted.logsumexp(0) - present.sum(0).to(log_densities.dtype).log()


def cluster_log_prob(log_weights: Tensor, log_density: Tensor) -> Tensor:
    """Log p(z) = logsumexp_c(log π_c + log p(z|c)).

    With the optimal q(c|z) = p(c|z) this equals the paper's E_q(c|z)[log p(c) p(z|c) / q(c|z)].

    Args:
        log_weights: log π, (C,).
        log_density: log p(z|c), (..., C).

    Returns:
        (...)
    """
    return (log_weights + log_density).logsumexp(-1)


def data_log_prob(likelihood: Likelihood, scale: float, x: Tensor, parameters: Tensor) -> Tensor:
    """Log p(x_n | z, w_n) of one modality, not multiplied by its weight s_n.

    Args:
        likelihood: family of the density.
        scale: of the density, where the family has one.
        x: (B, ...).
        parameters: what the decoder makes of z and w_n, (..., B, ...).

    Returns:
        The leading axes of `parameters`, B included.
    """
    return sum_event_axes(likelihood.log_prob(x, parameters, scale), event_dims=x.ndim - 1)


def log_weights(terms: LogWeightTerms, likelihood_weights: Mapping[str, float], beta: float) -> Tensor:
    """lw[m, k] of the objective, (M, K, B).

    Args:
        terms: the summands.
        likelihood_weights: s_n of each target modality.
        beta: weight of the prior and posterior terms.
    """
    likelihood = sum(
        likelihood_weights[name] * log_likelihood for name, log_likelihood in terms.log_likelihood.items()
    )
    regularisation = (
        terms.log_prior_shared
        + terms.log_prior_private
        - terms.log_posterior_private
        - terms.log_posterior_shared
    )
    return likelihood + beta * regularisation


def iwae(log_weights: Tensor, present: Tensor) -> Tensor:
    """The looser importance-weighted bound: mean over m of log (1/K) Σ_k exp lw[m, k]; K = 1 is the ELBO.

    Args:
        log_weights: (M, K, B).
        present: (M, B) bool, the sources that are there; at least one for each member of the batch.

    Returns:
        (B,), to be maximised.
    """
    num_samples = log_weights.shape[1]
    return mean_over_sources(log_weights.logsumexp(1) - math.log(num_samples), present)


def mean_over_sources(values: Tensor, present: Tensor) -> Tensor:
    """The mean of `values` (M, B) over those sources that are `present` (M, B), (B,)."""
    return (values * present).sum(0) / present.sum(0)


def dreg(log_weights: Tensor, latents: Sequence[Tensor], present: Tensor) -> Tensor:
    """The value of `iwae` with the doubly reparametrised gradient (Tucker et al., ICLR 2019).

    The caller has cut the posteriors' parameters out of every log q in `log_weights`; what is left of their
    gradient flows through `latents`, where it is multiplied once more by the self-normalised weight.

    For M = 1 the gradient agrees with IWAE's in expectation. For M > 1 it does not: the identity behind it
    integrates by parts against the density that z was drawn from, q(z|x_m), while the denominator here holds
    the mixture of all modalities. MMVAE and its successors use it all the same, and so does this.

    Args:
        log_weights: (M, K, B), with posterior parameters detached in its denominators.
        latents: reparametrised samples (M, K, B, D) of the posteriors.
        present: as of `iwae`.

    Returns:
        (B,), to be maximised. Calling it installs gradient hooks on `latents`.
    """
    normalised = log_weights.detach().softmax(1)
    for latent in latents:
        if latent.requires_grad:
            latent.register_hook(lambda gradient: gradient * normalised.unsqueeze(-1))
    surrogate = mean_over_sources((normalised * log_weights).sum(1), present)
    # The surrogate has the right gradient but not the bound's value: swap the value in.
    return surrogate + (iwae(log_weights, present) - surrogate).detach()
