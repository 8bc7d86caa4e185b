"""Log-weights and the bounds IWAE and DReG, as pure functions of tensors.

Axes: M source modalities, K samples of the latents, B samples of the batch, D dimensions. Everything is in
fp32 and in nats. "Paper" is Palumbo et al. (ICLR 2024).
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
    """Terms of the log-weight lw[m, k], each (M, K, B)."""

    log_likelihood: Mapping[str, Tensor]
    """log p(x_n | z, w_m if n = m else w̃_n) by target modality n, not multiplied by s_n."""
    log_prior_shared: Tensor
    """log p(z)."""
    log_prior_private: Tensor
    """log p(w_m)."""
    log_posterior_shared: Tensor
    """log (1/M) Σ_j q(z|x_j)."""
    log_posterior_private: Tensor
    """log q(w_m|x_m)."""


def mixture_log_prob(components: Sequence[LocationScale], value: Tensor, present: Tensor) -> Tensor:
    """Log-density of the joint posterior, log (1/J) Σ_j q_j(value) over the J present modalities.

    Source: paper, section 3.

    Args:
        components: M posteriors with parameters (B, D).
        value: (..., B, D).
        present: (M, B) bool, the modalities that a sample has; at least one per sample.

    Returns:
        (..., B)
    """
    # (M, ..., B)
    log_densities = torch.stack([component.log_prob(value) for component in components])
    missing = ~present.view(len(components), *[1] * (log_densities.ndim - 2), -1)
    log_densities = log_densities.masked_fill(missing, -torch.inf)
    return log_densities.logsumexp(0) - present.sum(0).to(log_densities.dtype).log()


def cluster_log_prob(log_weights: Tensor, log_density: Tensor) -> Tensor:
    """Log-density of the mixture prior, log p(z) = logsumexp_c(log π_c + log p(z|c)).

    It equals E_q(c|z)[log p(c) p(z|c) / q(c|z)] of the paper for the optimal q(c|z) = p(c|z).

    Args:
        log_weights: log π, (C,).
        log_density: log p(z|c), (..., C).

    Returns:
        (...)
    """
    return (log_weights + log_density).logsumexp(-1)


def data_log_prob(likelihood: Likelihood, scale: float, x: Tensor, parameters: Tensor) -> Tensor:
    """Log-likelihood log p(x_n | z, w_n) of one modality, not multiplied by its weight s_n.

    Args:
        likelihood: family of the likelihood.
        scale: scale of the likelihood, if the family has one.
        x: x_n, (B, *shape).
        parameters: output of the decoder for z and w_n, (..., B, *parameter_shape).

    Returns:
        (..., B)
    """
    return sum_event_axes(likelihood.log_prob(x, parameters, scale), event_dims=x.ndim - 1)


def log_weights(terms: LogWeightTerms, likelihood_weights: Mapping[str, float], beta: float) -> Tensor:
    """Log-weights lw[m, k] of the objective.

    Args:
        terms: terms of the log-weights.
        likelihood_weights: weight s_n by target modality.
        beta: weight β of the prior and posterior terms.

    Returns:
        (M, K, B)
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
    """Looser importance-weighted bound: mean over m of log (1/K) Σ_k exp lw[m, k]. K = 1 gives the ELBO.

    Args:
        log_weights: (M, K, B).
        present: (M, B) bool, the modalities that a sample has; at least one per sample.

    Returns:
        (B,), to be maximised.
    """
    num_samples = log_weights.shape[1]
    return mean_over_sources(log_weights.logsumexp(1) - math.log(num_samples), present)


def mean_over_sources(values: Tensor, present: Tensor) -> Tensor:
    """Mean of `values` (M, B) over the `present` (M, B) sources: (B,)."""
    return (values * present).sum(0) / present.sum(0)


def dreg(log_weights: Tensor, latents: Sequence[Tensor], present: Tensor) -> Tensor:
    """Value of `iwae` with the doubly reparametrised gradient, DReG (Tucker et al., ICLR 2019).

    The caller must detach the posteriors' parameters in every log q of `log_weights`. Their gradient then
    flows only through `latents`, where hooks multiply it by the self-normalised weights once more.

    For M = 1 the gradient equals that of IWAE in expectation. For M > 1 it does not: its derivation
    integrates by parts against the density of z, q(z|x_m), while the denominator here is the mixture over all
    modalities. MMVAE and its successors use it nevertheless, and so does CMVAE.

    Args:
        log_weights: (M, K, B), with posterior parameters detached in the denominators.
        latents: reparametrised samples of the posteriors, each (M, K, B, D). Gradient hooks are registered on
            them.
        present: (M, B) bool, see `iwae`.

    Returns:
        (B,), to be maximised.
    """
    normalised = log_weights.detach().softmax(1)
    for latent in latents:
        if latent.requires_grad:
            latent.register_hook(lambda gradient: gradient * normalised.unsqueeze(-1))
    surrogate = mean_over_sources((normalised * log_weights).sum(1), present)
    # The surrogate has the right gradient but not the value of the bound.
    return surrogate + (iwae(log_weights, present) - surrogate).detach()
