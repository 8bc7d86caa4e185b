"""What a model makes, as figures: generates with it, then draws."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cmvae.evaluation import figures
from cmvae.model import CMVAE

if TYPE_CHECKING:  # it draws with this module
    from cmvae.evaluation.clustering import EncodedSplit
    from cmvae.refiner import Refiner


def draw_cross_modal(model: CMVAE, inputs: Mapping[str, Tensor], generator: torch.Generator) -> Figure:
    """Inputs, generated from every modality; on the diagonal their reconstructions.

    Only encodes and decodes, so that under ZeRO-3 all ranks may call it in the middle of a training.

    Args:
        model: the model.
        inputs: by modality, images (B, C, H, W) in [0, 1].
        generator: random stream on the model's device.
    """
    generated = {}
    for source, images in inputs.items():
        for target, made in model.generate(given={source: images}, generator=generator).items():
            generated[source, target] = _to_numpy(made)
    for name, images in model.reconstruct(inputs).items():
        generated[name, name] = _to_numpy(images)
    return figures.cross_modal_grid({name: _to_numpy(images) for name, images in inputs.items()}, generated)


def draw_refinements(
    model: CMVAE, refiner: Refiner, inputs: Mapping[str, Tensor], generator: torch.Generator
) -> Figure:
    """Inputs, what the CMVAE generates from every modality, self included, and that refined.

    Args:
        model: the CMVAE.
        refiner: of its images.
        inputs: by modality, images (B, C, H, W) in [0, 1].
        generator: random stream on the model's device.
    """
    generated, refined = {}, {}
    for source, images in inputs.items():
        latents = model.sample_latents(given={source: images}, generator=generator)
        blurred = model.decode(latents.shared, latents.private)
        sharp = refiner.refine(blurred, latents.shared, seeds=range(len(images)))
        for target in inputs:
            generated[source, target] = _to_numpy(blurred[target])
            refined[source, target] = _to_numpy(sharp[target])
    given = {name: _to_numpy(images) for name, images in inputs.items()}
    return figures.cross_modal_grid(given, generated, refined)


def draw_cluster_samples(model: CMVAE, num_samples: int, generator: torch.Generator) -> Figure:
    """Joint generations of every selected cluster, `num_samples` each."""
    clusters = model.cluster_prior.active.nonzero().flatten().tolist()
    samples = [model.generate(num_samples, cluster=c, generator=generator) for c in clusters]
    images = {
        name: np.stack([_to_numpy(sample[name]) for sample in samples]) for name in model.modality_names
    }
    return figures.sample_rows(images, [f"cluster {c}" for c in clusters])


def draw_latent_map(split: EncodedSplit, assignments: np.ndarray, num_samples: int, seed: int) -> Figure:
    """Z by the first modality in two dimensions, of at most `num_samples` samples of an encoded split."""
    shown = slice(0, num_samples)
    points = figures.project_2d(split.shared_loc[shown, 0], seed)
    labels = split.label[shown] if (split.label >= 0).any() else None
    return figures.latent_map(points, assignments[shown], labels)


def _to_numpy(images: Tensor) -> np.ndarray:
    return images.detach().cpu().numpy()
