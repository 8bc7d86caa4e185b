"""Generate the samples of an evaluation, on any number of ranks: every sample has its own noise.

- Conditional, for every sample of a split that has the source: z ~ q(z|x_source), and w ~ p(w) for every
  target, also where the target is the source. With several sources, z comes from one of them, drawn uniformly
  per sample: the mixture that is the joint posterior.
- Unconditional: c ~ π over the selected clusters, z ~ p(z|c), w ~ p(w).

`CMVAE.decode` makes the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from cmvae.clustering import IntArray
from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.report import REFINED
from cmvae.models.cmvae import CMVAE, Latents
from cmvae.utils.progress import progress_bar

Extract = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Modality → data (B, *shape), to name → what is kept of it (B, ...)."""


def encode_sources(model: CMVAE, batch: Mapping[str, Any], with_private: bool = False) -> dict[str, Tensor]:
    """Encode a batch for `SampleGenerator.conditional` and for probes.

    Args:
        model: model in evaluation mode.
        batch: batch on its device.
        with_private: whether to return q(w|x), which `SampleGenerator.conditional` needs to reconstruct.

    Returns:
        `label` (B,), `loc/SOURCE` and `scale/SOURCE` (B, D_z) of q(z|x), `has/SOURCE` (B,) bool; with
        `with_private` also `private_loc/SOURCE` and `private_scale/SOURCE` (B, D_w) of q(w|x).
    """
    encoded = {"label": batch["label"]}
    posteriors = model.encode({name: batch[name] for name in model.modality_names})
    for (name, posterior), there in zip(posteriors.items(), batch["mask"].T, strict=True):
        encoded[f"loc/{name}"], encoded[f"scale/{name}"] = posterior.shared.loc, posterior.shared.scale
        encoded[f"has/{name}"] = there
        if with_private:
            encoded[f"private_loc/{name}"] = posterior.private.loc
            encoded[f"private_scale/{name}"] = posterior.private.scale
    return encoded


def samples_with(encoded: Mapping[str, np.ndarray], modalities: Sequence[str]) -> IntArray:
    """Rows of an encoded split that have all of the modalities."""
    return np.flatnonzero(np.all([encoded[f"has/{name}"] for name in modalities], axis=0))


class SampleGenerator:
    """Generates samples on all ranks and extracts values from them, before and after refinement.

    Args:
        context: model, settings and optionally a refiner.
        progress: bar that counts the samples.
    """

    def __init__(self, context: EvaluationContext, progress: tqdm) -> None:
        self._context, self._progress = context, progress

    def conditional(
        self,
        encoded: Mapping[str, np.ndarray],
        sources: Sequence[str],
        targets: Sequence[str],
        extract: Extract,
        refine: bool,
        reconstruct: bool = False,
    ) -> dict[str, np.ndarray]:
        """Generate from the mixture of the sources.

        Args:
            encoded: a split, see `encode_sources`; with q(w|x) to reconstruct.
            sources: modalities to generate from.
            targets: modalities to generate.
            extract: what to keep of the generated data.
            refine: whether to refine as well, if there is a refiner; the results are named `refined/…`.
            reconstruct: whether w of the targets, which must be sources, comes from q(w|x) instead of p(w).
                The noise is the same.

        Returns:
            Name → values, one row per `samples_with(encoded, sources)`.
        """
        context = self._context
        family, device = context.model.family, context.device
        stream = f"conditional/{'+'.join(sources)}"
        loc, scale = (
            torch.from_numpy(np.stack([encoded[f"{part}/{source}"] for source in sources], axis=1))
            for part in ("loc", "scale")
        )  # (N, S, D_z)
        chosen = torch.from_numpy(samples_with(encoded, sources))

        def compute(batch: Mapping[str, Any]) -> dict[str, Tensor]:
            rows = chosen[batch["position"].cpu()]
            component = (context.draw_uniform(f"{stream}/source", rows) * len(sources)).long()
            shared_noise, private_noise = _draw_noise(context, stream, rows)
            shared = family(loc[rows, component].to(device), scale[rows, component].to(device))
            private = dict.fromkeys(targets, context.model.private_prior)
            if reconstruct:
                for name in targets:
                    parts = (encoded[f"private_{part}/{name}"][rows.numpy()] for part in ("loc", "scale"))
                    private[name] = family(*(torch.from_numpy(part).to(device) for part in parts))
            private_samples = {name: w.sample(private_noise[name]) for name, w in private.items()}
            latents = Latents(shared.sample(shared_noise), private_samples)
            return self._decode(latents, stream, rows, extract, refine)

        return self._collect(len(chosen), compute)

    def unconditional(self, targets: Sequence[str], extract: Extract) -> dict[str, np.ndarray]:
        """Generate the targets of `num_generated` joint samples; name → values, one row per sample."""
        context = self._context
        prior = context.model.cluster_prior
        cumulative = prior.log_weights.double().exp().cpu().cumsum(0)
        cumulative /= cumulative[-1].clone()

        def compute(batch: Mapping[str, Any]) -> dict[str, Tensor]:
            rows = batch["position"].cpu()
            uniform = context.draw_uniform("unconditional/cluster", rows)
            clusters = torch.searchsorted(cumulative, uniform, right=True).to(context.device)
            shared_noise, private_noise = _draw_noise(context, "unconditional", rows)
            private = {name: context.model.private_prior.sample(private_noise[name]) for name in targets}
            latents = Latents(prior.sample(clusters, shared_noise), private)
            return self._decode(latents, "unconditional", rows, extract, refine=True)

        return self._collect(context.settings.num_generated, compute)

    def _decode(
        self, latents: Latents, stream: str, positions: Tensor, extract: Extract, refine: bool
    ) -> dict[str, Tensor]:
        context = self._context
        values = context.model.decode(latents.shared, latents.private)
        extracted = extract(values)
        if refine and context.dcmvae is not None:
            seeds = context.draw_seeds(f"{stream}/refine", positions)
            refined = context.dcmvae.refine(values, latents.shared, latents.private, seeds=seeds)
            extracted |= {f"{REFINED}{key}": value for key, value in extract(refined).items()}
        return extracted

    def _collect(
        self, num_samples: int, compute: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
    ) -> dict[str, np.ndarray]:
        def count(batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
            computed = compute(batch)
            # All ranks have the same number of samples.
            self._progress.update(int(batch["valid"].sum()) * self._context.accelerator.num_processes)
            return computed

        return self._context.collect(self._context.positions(num_samples), count)


@dataclass(frozen=True)
class Pair:
    """One modality generated from another, and the real values; n samples that have both."""

    source: str
    target: str
    generated: np.ndarray
    """(n, *shape), as stored."""
    real: np.ndarray
    """(n, *shape), as stored."""


def generate_pairs(context: EvaluationContext, targets: Sequence[str]) -> Iterator[Pair]:
    """Generate every target from every modality, self included, for the samples of the split that have both.

    Args:
        context: model, data and settings.
        targets: modalities to generate.

    Yields:
        Pairs with at least one sample; the same on every rank.
    """
    model, settings = context.model, context.settings

    def extract(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"value/{name}": values[name] for name in targets}

    encoded = context.collect(
        context.batches(settings.split), lambda batch: encode_sources(model, batch) | extract(batch)
    )
    rows = {source: samples_with(encoded, [source]) for source in model.modality_names}
    with progress_bar(
        total=sum(map(len, rows.values())),
        desc=f"generate {', '.join(targets)}",
        unit=" samples",
        disable=not context.accelerator.is_main_process,
        leave=False,
    ) as progress:
        generator = SampleGenerator(context, progress)
        for source, of_source in rows.items():
            if len(of_source) == 0:
                continue
            made = generator.conditional(encoded, (source,), targets, extract, refine=False)
            for target in targets:
                both = encoded[f"has/{target}"][of_source]
                if not both.any():
                    continue
                generated, real = (
                    model.modalities[target].to_stored(values[both])
                    for values in (made[f"value/{target}"], encoded[f"value/{target}"][of_source])
                )
                yield Pair(source, target, generated, real)


def _draw_noise(
    context: EvaluationContext, stream: str, positions: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise of z (B, D_z), and modality → noise of w (B, D_w)."""
    model = context.model
    names, config = model.modality_names, model.config
    size = config.shared_dim + len(names) * config.private_dim
    # One draw per sample: seeding is most of the cost.
    noise = context.draw_noise(f"{stream}/latents", positions, (size,))
    shared, private = noise.split([config.shared_dim, size - config.shared_dim], dim=1)
    return shared, dict(zip(names, rearrange(private, "b (m d) -> m b d", m=len(names)), strict=True))
