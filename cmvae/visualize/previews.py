"""What a model makes, as figures and texts: generates with it, then draws and writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from cmvae.modalities import Modality
from cmvae.models.cmvae import CMVAE
from cmvae.visualize import figures
from cmvae.visualize.listing import cross_modal_listing

if TYPE_CHECKING:  # it draws with this module
    from cmvae.models.dcmvae import DCMVAE
    from cmvae.models.encoding import EncodedSplit


@dataclass(frozen=True)
class CrossModal:
    """Samples, and every modality generated from every modality; on the diagonal their reconstructions."""

    inputs: Mapping[str, np.ndarray]
    """Modality → (N, *shape), as stored."""
    generated: Mapping[tuple[str, str], np.ndarray]
    """(source, target) → (N, *shape), as stored."""
    present: Mapping[str, np.ndarray]
    """Modality → (N,) bool."""
    modalities: Mapping[str, Modality]

    def draw(self) -> Figure:
        """As a figure."""
        return figures.cross_modal_grid(
            self.inputs, self.generated, modalities=self.modalities, present=self.present
        )

    def write(self) -> str | None:
        """As text, of the modalities that are read in words; None if there are none."""
        return cross_modal_listing(
            self.inputs, self.generated, modalities=self.modalities, present=self.present
        )


def generate_cross_modal(
    model: CMVAE, inputs: Mapping[str, Tensor], mask: Tensor, generator: torch.Generator
) -> CrossModal:
    """Generate every modality of some samples from every one.

    Only encodes and decodes, so that under ZeRO-3 all ranks may call it in the middle of a training.

    Args:
        model: the model.
        inputs: by modality, data (B, *shape).
        mask: (B, M) bool, the modalities that each sample has.
        generator: random stream on the model's device.
    """
    generated = {}
    for source, x in inputs.items():
        for target, made in model.generate(given={source: x}, generator=generator).items():
            generated[source, target] = model.modalities[target].to_stored(made)
    for name, x in model.reconstruct(inputs).items():
        generated[name, name] = model.modalities[name].to_stored(x)
    return CrossModal(
        {name: model.modalities[name].to_stored(x) for name, x in inputs.items()},
        generated,
        _by_modality(model, mask),
        model.modalities,
    )


def draw_refinements(
    dcmvae: DCMVAE, inputs: Mapping[str, Tensor], mask: Tensor, generator: torch.Generator
) -> Figure:
    """Inputs, what the CMVAE generates from every modality, self included, and its images refined.

    Args:
        dcmvae: the CMVAE and its refiner.
        inputs: by modality, data (B, *shape).
        mask: (B, M) bool, the modalities that each sample has.
        generator: random stream on the model's device.
    """
    model = dcmvae.cmvae
    generated, refined = {}, {}
    for source, x in inputs.items():
        latents = model.sample_latents(given={source: x}, generator=generator)
        blurred = model.decode(latents.shared, latents.private)
        sharp = dcmvae.refine(blurred, latents.shared, seeds=range(len(x)))
        for target in inputs:
            generated[source, target] = model.modalities[target].to_stored(blurred[target])
        for target in dcmvae.refiner.modality_names:
            refined[source, target] = model.modalities[target].to_stored(sharp[target])
    return figures.cross_modal_grid(
        {name: model.modalities[name].to_stored(x) for name, x in inputs.items()},
        generated,
        refined,
        modalities=model.modalities,
        present=_by_modality(model, mask),
    )


def draw_cluster_samples(model: CMVAE, num_samples: int, generator: torch.Generator) -> Figure:
    """Joint generations of every selected cluster, `num_samples` each."""
    clusters = model.cluster_prior.active.nonzero().flatten().tolist()
    samples = [model.generate(num_samples, cluster=c, generator=generator) for c in clusters]
    values = {
        name: np.stack([modality.to_stored(sample[name]) for sample in samples])
        for name, modality in model.modalities.items()
    }
    return figures.sample_rows(values, [f"cluster {c}" for c in clusters], modalities=model.modalities)


def draw_latent_map(split: EncodedSplit, assignments: np.ndarray, num_samples: int, seed: int) -> Figure:
    """Z in two dimensions, of at most `num_samples` samples: each by the first modality that it has."""
    shown = slice(0, num_samples)
    first = split.present[shown].argmax(axis=1)
    points = figures.project_2d(split.shared_loc[shown][np.arange(len(first)), first], seed)
    labels = split.label[shown] if (split.label >= 0).any() else None
    return figures.latent_map(points, assignments[shown], labels)


def _by_modality(model: CMVAE, mask: Tensor) -> dict[str, np.ndarray]:
    """A mask (B, M) as columns (B,) by modality."""
    return dict(zip(model.modality_names, mask.T.cpu().numpy(), strict=True))
