"""Joint log-likelihood log p(x_1, …, x_M) of a split, by importance sampling.

For each of S importance samples, z comes from the mixture of the modalities' posteriors, equally often from
each (stratified, with the balance heuristic of Veach and Guibas, 1995), and every w_m from its own posterior.
With

    lw[s] = log p(z) + Σ_m log p(w_m) + Σ_m log p(x_m | z, w_m)
            − log (1/M) Σ_j q(z|x_j) − Σ_m log q(w_m|x_m)

the mean of exp lw is unbiased for p(x_1, …, x_M), and its logarithm is a lower bound in expectation that
rises with S (Burda et al., IWAE, 2016). Neither the weights s_n of the modalities nor β enter: they belong to
the objective, not to the density of the data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor
from tqdm import tqdm

from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.report import GroupResult
from cmvae.models.cmvae import CMVAE, Posterior
from cmvae.models.objectives import cluster_log_prob, data_log_prob, mixture_log_prob
from cmvae.utils.progress import progress_bar

# Importance samples that are drawn together. The noise depends on it, so it must not depend on the memory.
_CHUNK_SAMPLES = 120
DECODED_TOGETHER = 512
"""Pairs (z, w) that are decoded together: 2 GB of feature maps at 64×64 pixels and width 64."""


def evaluate_likelihood(context: EvaluationContext) -> GroupResult:
    """Estimate the mean of log p(x_1, …, x_M) over the split, in nats, and its standard error over samples.

    `likelihood/effective_samples`, the mean of (Σ w)² / Σ w² over the split, is between one and the number of
    importance samples, and shows whether they were enough.
    """
    settings, model = context.settings, context.model
    num_modalities = len(model.modality_names)
    chunks = chunk_sizes(settings.likelihood_samples, num_modalities)
    num_samples = sum(chunks) * num_modalities
    ranks = context.accelerator.num_processes
    with progress_bar(
        total=math.ceil(context.index.split(settings.split, context.shards).num_samples / ranks),
        desc="log-likelihood",
        unit=" samples",
        disable=not context.accelerator.is_main_process,
        leave=False,
    ) as progress:

        def compute(batch: Mapping[str, Any]) -> dict[str, Tensor]:
            log_weights = _log_weights_of_batch(context, batch, chunks, progress)
            num_proposed = np.isfinite(log_weights).sum(axis=0)
            return {
                "log_likelihood": torch.from_numpy(logsumexp(log_weights, axis=0) - np.log(num_proposed)),
                "effective_samples": torch.from_numpy(_effective_samples(log_weights)),
            }

        collected = context.collect(context.batches(settings.split), compute)
    log_likelihood = collected["log_likelihood"]
    result = GroupResult(
        metrics={
            "likelihood/joint": float(log_likelihood.mean()),
            "likelihood/effective_samples": float(collected["effective_samples"].mean()),
        },
        protocol={
            "likelihood.split": settings.split,
            "likelihood.num_samples": len(log_likelihood),
            "likelihood.importance_samples": num_samples,
            "likelihood.importance_samples_per_chunk": chunks[0] * num_modalities,
            "likelihood.proposal": "z: mixture of q(z|x_m), stratified; w_m: q(w_m|x_m)",
            "likelihood.unit": "nats per sample, all modalities together",
            "likelihood.weighted_by_s_n_or_beta": False,
        },
    )
    if len(log_likelihood) > 1:
        error = log_likelihood.std(ddof=1) / math.sqrt(len(log_likelihood))
        result.metrics["likelihood/joint_standard_error"] = float(error)
    else:
        result.left_out["likelihood/joint_standard_error"] = "a single sample has no standard error"
    return result


def chunk_sizes(num_samples: int, num_modalities: int) -> list[int]:
    """Number of importance samples from each modality's posterior, per chunk.

    Args:
        num_samples: number of importance samples; rounded up to a multiple of `num_modalities`.
        num_modalities: M.
    """
    each = math.ceil(num_samples / num_modalities)
    largest = max(1, _CHUNK_SAMPLES // num_modalities)
    return [min(largest, each - start) for start in range(0, each, largest)]


@torch.no_grad()
def importance_log_weights(
    model: CMVAE,
    inputs: Mapping[str, Tensor],
    posteriors: Mapping[str, Posterior],
    present: Tensor,
    shared_noise: Tensor,
    private_noise: Tensor,
) -> Tensor:
    """Log-weights lw[s] of a chunk, (M·k, B), over the present modalities; −∞ where z is from a missing one.

    Args:
        model: the model.
        inputs: modality → (B, ...).
        posteriors: modality → posteriors with parameters (B, D).
        present: (M, B) bool, the modalities that a sample has; at least one.
        shared_noise: (M, k, B, D_z), for k samples of z from each modality's posterior.
        private_noise: (M, M·k, B, D_w), for a w of every modality per sample of z.
    """
    sources = list(posteriors.values())
    shared = torch.cat([source.shared.sample(shared_noise[m]) for m, source in enumerate(sources)])
    private = {
        name: source.private.sample(private_noise[m]) for m, (name, source) in enumerate(posteriors.items())
    }
    # Log-likelihoods of hundreds of pixels are large against their differences, so the terms are added in
    # double precision (on the CPU, because some devices lack it).
    terms = [
        cluster_log_prob(*model.cluster_prior(shared)),
        -mixture_log_prob([source.shared for source in sources], shared, present),
    ]
    parameters = model.decode_parameters(shared, private)
    for name, there in zip(parameters, present, strict=True):
        scale = model.config.modalities[name].likelihood.scale
        of_modality = [
            data_log_prob(model.likelihoods[name], scale, inputs[name], parameters[name]),
            model.private_prior.log_prob(private[name]),
            -posteriors[name].private.log_prob(private[name]),
        ]
        terms += [torch.where(there, term, 0) for term in of_modality]
    log_weights = torch.stack([term.cpu().double() for term in terms]).sum(0)
    proposed = present.repeat_interleave(shared_noise.shape[1], dim=0).cpu()
    return log_weights.masked_fill(~proposed, -torch.inf)


def _log_weights_of_batch(
    context: EvaluationContext, batch: Mapping[str, Any], chunks: Sequence[int], progress: tqdm
) -> np.ndarray:
    """Log-weights (S, B) of a batch, over all chunks."""
    model = context.model
    num_modalities = len(model.modality_names)
    inputs = {name: batch[name] for name in model.modality_names}
    with torch.no_grad():
        posteriors = model.encode(inputs)
    columns = []
    for rows in _row_blocks(len(batch["position"]), DECODED_TOGETHER // (chunks[0] * num_modalities)):
        chosen_inputs = {name: x[rows] for name, x in inputs.items()}
        chosen_posteriors = {name: _take(posterior, rows) for name, posterior in posteriors.items()}
        parts = [
            importance_log_weights(
                model,
                chosen_inputs,
                chosen_posteriors,
                batch["mask"][rows].T,
                *_draw_noise(context, f"likelihood/{chunk}", batch["position"][rows], size),
            )
            for chunk, size in enumerate(chunks)
        ]
        columns.append(torch.cat(parts))
        progress.update(int(batch["valid"][rows].sum()))
    return torch.cat(columns, dim=1).numpy()


def _draw_noise(
    context: EvaluationContext, stream: str, positions: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """Noise of a chunk: (M, k, B, D_z) for z and (M, M·k, B, D_w) for the w's."""
    config = context.model.config
    num_modalities = len(config.modalities)
    shared = context.draw_noise(f"{stream}/z", positions, (num_modalities, size, config.shared_dim))
    private = context.draw_noise(
        f"{stream}/w", positions, (num_modalities, num_modalities * size, config.private_dim)
    )
    return shared.permute(1, 2, 0, 3), private.permute(1, 2, 0, 3)


def _row_blocks(num_rows: int, size: int) -> Iterator[slice]:
    step = max(1, size)
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def _take(posterior: Posterior, rows: slice) -> Posterior:
    return Posterior(
        *(type(part)(part.loc[rows], part.scale[rows]) for part in (posterior.shared, posterior.private))
    )


def _effective_samples(log_weights: np.ndarray) -> np.ndarray:
    """(Σ w)² / Σ w² of log-weights (S, B), (B,) (Kong, 1992)."""
    return np.exp(2 * logsumexp(log_weights, axis=0) - logsumexp(2 * log_weights, axis=0))
