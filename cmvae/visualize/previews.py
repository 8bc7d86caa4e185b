"""Previews of a model: generate with it, then draw figures and write texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cmvae.modalities import Modality
from cmvae.models.cmvae import CMVAE
from cmvae.visualize import grids
from cmvae.visualize.style import Figure

if TYPE_CHECKING:  # diffusers takes seconds to import
    from cmvae.models.dcmvae import DCMVAE

_TEXT_HEAD = "Real samples, and what is generated from each of their modalities (from itself: reconstructed)."


@dataclass(frozen=True)
class CrossModal:
    """Samples, and every modality generated from every modality; on the diagonal their reconstructions."""

    inputs: Mapping[str, np.ndarray]
    """Modality → (N, *shape), as stored."""
    generated: Mapping[tuple[str, str], np.ndarray]
    """(source, target) → (N, *shape), as stored."""
    present: Mapping[str, np.ndarray]
    """Modality → (N,) bool, the samples that have it."""
    modalities: Mapping[str, Modality]
    """The modalities by name."""
    refined: Mapping[tuple[str, str], np.ndarray] | None = None
    """(source, target) → (N, *shape) after refinement, of the targets that are refined."""

    def draw(self) -> Figure:
        """The samples as a figure, see `grids.cross_modal_grid`."""
        return grids.cross_modal_grid(
            self.inputs, self.generated, self.refined, modalities=self.modalities, present=self.present
        )

    def write(self) -> str | None:
        """The modalities that have words, sample by sample, real and generated from each modality.

        Returns:
            Plain text, without what a missing modality would generate; None if no modality has words.
        """
        targets = [name for name in self.inputs if self.modalities[name].in_words]
        if not targets:
            return None
        width = max(map(len, self.inputs)) + len("from ")
        lines = [_TEXT_HEAD]
        for sample in range(len(self.inputs[targets[0]])):
            lines += ["", f"sample {sample + 1}"]
            for target in targets:
                describe = self.modalities[target].describe
                is_there = self.present[target][sample]
                texts = {"real": describe(self.inputs[target][sample]) if is_there else "(missing)"}
                texts |= {
                    f"from {source}": describe(self.generated[source, target][sample])
                    for source in self.inputs
                    if self.present[source][sample]
                }
                lines.append(f"  {target}")
                lines += [f"    {title:<{width}}  {text}".rstrip() for title, text in texts.items()]
        return "\n".join(lines) + "\n"


def generate_cross_modal(
    model: CMVAE, inputs: Mapping[str, Tensor], mask: Tensor, generator: torch.Generator
) -> CrossModal:
    """Generate every modality of some samples from every modality.

    Only encodes and decodes, so under ZeRO-3 all ranks may call it during training.

    Args:
        model: the model.
        inputs: modality → data (B, *shape).
        mask: (B, M) bool, the modalities that each sample has.
        generator: random generator on the model's device.
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


def generate_refinements(
    dcmvae: DCMVAE, inputs: Mapping[str, Tensor], mask: Tensor, generator: torch.Generator
) -> CrossModal:
    """Inputs, what the CMVAE generates from every modality (itself included), and its images refined.

    Args:
        dcmvae: the CMVAE and its refiner.
        inputs: modality → data (B, *shape).
        mask: (B, M) bool, the modalities that each sample has.
        generator: random generator on the model's device.
    """
    model = dcmvae.cmvae
    generated, refined = {}, {}
    for source, x in inputs.items():
        latents = model.sample_latents(given={source: x}, generator=generator)
        blurred = model.decode(latents.shared, latents.private)
        sharp = dcmvae.refine(blurred, latents.shared, latents.private, seeds=range(len(x)))
        for target in inputs:
            generated[source, target] = model.modalities[target].to_stored(blurred[target])
        for target in dcmvae.refiner.modality_names:
            refined[source, target] = model.modalities[target].to_stored(sharp[target])
    return CrossModal(
        {name: model.modalities[name].to_stored(x) for name, x in inputs.items()},
        generated,
        _by_modality(model, mask),
        model.modalities,
        refined,
    )


def draw_cluster_samples(model: CMVAE, num_samples: int, generator: torch.Generator) -> Figure:
    """Draw `num_samples` joint generations of every selected cluster."""
    clusters = model.cluster_prior.active.nonzero().flatten().tolist()
    samples = [model.generate(num_samples, cluster=c, generator=generator) for c in clusters]
    values = {
        name: np.stack([modality.to_stored(sample[name]) for sample in samples])
        for name, modality in model.modalities.items()
    }
    return grids.sample_rows(values, [f"cluster {c}" for c in clusters], modalities=model.modalities)


def _by_modality(model: CMVAE, mask: Tensor) -> dict[str, np.ndarray]:
    """A mask (B, M) as one column (B,) per modality."""
    return dict(zip(model.modality_names, mask.T.cpu().numpy(), strict=True))
