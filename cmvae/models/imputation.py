"""Generate what samples lack from what they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from cmvae.models.cmvae import CMVAE


@torch.no_grad()
def generate_from_present(
    model: CMVAE,
    inputs: Mapping[str, Tensor],
    mask: Tensor,
    names: Sequence[str],
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Generate modalities of B samples, each from the modalities that it has, or unconditionally without any.

    Args:
        model: a model in evaluation mode.
        inputs: data (B, *shape) by modality, see `cmvae.modalities`.
        mask: (B, number of inputs) bool, False where a sample lacks a modality.
        names: modalities to generate.
        generator: random number generator on the model's device; None uses the default one of torch.

    Returns:
        Data (B, *shape) for every modality in `names`.
    """
    latents = model.sample_latents(len(mask), generator=generator)
    given = mask.any(1)
    if given.any():
        present = {name: x[given] for name, x in inputs.items()}
        drawn = model.sample_latents(given=present, mask=mask[given], generator=generator)
        latents.shared[given] = drawn.shared
        for name in names:
            latents.private[name][given] = drawn.private[name]
    return model.decode(latents.shared, {name: latents.private[name] for name in names})


def predictive_deviation(means: np.ndarray, noise_variance: np.ndarray) -> np.ndarray:
    """Standard deviation of p(x | present) by the law of total variance.

    Args:
        means: (S, D), means of p(x | z, w) for S draws of z and w.
        noise_variance: (D,), variance of p(x | z, w) in the same units.

    Returns:
        (D,): the root of the unbiased variance between the draws plus the noise; of the noise alone, if there
        is a single draw.
    """
    between = means.var(axis=0, ddof=1, dtype=np.float64) if len(means) > 1 else 0.0
    deviation: np.ndarray = np.sqrt(between + noise_variance)
    return deviation
