"""Generate what samples lack from what they have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
