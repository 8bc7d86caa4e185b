"""Generations of an evaluation, on any number of ranks: every sample has its own noise.

Conditional, for every sample of a split and every source that it has: z ~ q(z|x_source), w ~ p(w) for every
target, also where the target is the source; of several sources, all of which a sample must have, each
sample's z comes from one of them, drawn uniformly, which is the mixture that is the joint posterior.
Unconditional: c ~ π over the selected clusters, z ~ p(z|c), w ~ p(w). What is generated is what
`CMVAE.decode` gives.
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
from cmvae.evaluation.result import REFINED
from cmvae.models.cmvae import CMVAE, Latents
from cmvae.utils.progress import progress_bar

Reader = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Data (B, *shape) by modality to whatever is read from it, (B, ...) by name."""


def encode_sources(model: CMVAE, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """What `Generations.conditional` starts from.

    Args:
        model: in evaluation mode.
        batch: on its device.

    Returns:
        `label` (B,), `loc/SOURCE` and `scale/SOURCE` (B, D_z) of q(z|x), `has/SOURCE` (B,) bool.
    """
    encoded = {"label": batch["label"]}
    posteriors = model.encode({name: batch[name] for name in model.modality_names})
    for (name, posterior), there in zip(posteriors.items(), batch["mask"].T, strict=True):
        encoded[f"loc/{name}"], encoded[f"scale/{name}"] = posterior.shared.loc, posterior.shared.scale
        encoded[f"has/{name}"] = there
    return encoded


def having(encoded: Mapping[str, np.ndarray], modalities: Sequence[str]) -> IntArray:
    """The rows of an encoded split that have all of some modalities."""
    return np.flatnonzero(np.all([encoded[f"has/{name}"] for name in modalities], axis=0))


class Generations:
    """Generates on all ranks and reads what it made, as it is and refined."""

    def __init__(self, context: EvaluationContext, progress: tqdm) -> None:
        self._context, self._progress = context, progress

    def conditional(
        self,
        encoded: Mapping[str, np.ndarray],
        sources: Sequence[str],
        targets: Sequence[str],
        read: Reader,
        refine: bool,
    ) -> dict[str, np.ndarray]:
        """Readings of what is generated from the mixture of the sources.

        Args:
            encoded: a split, see `encode_sources`.
            sources: what is generated from.
            targets: what is generated.
            read: what is wanted of it.
            refine: whether a refiner, if there is one, shows its own version, too, below `refined/`.

        Returns:
            By name, a row for each of `having(encoded, sources)`.
        """
        context = self._context
        stream = f"conditional/{'+'.join(sources)}"
        loc, scale = (
            torch.from_numpy(np.stack([encoded[f"{part}/{source}"] for source in sources], axis=1))
            for part in ("loc", "scale")
        )  # (N, S, D_z)
        chosen = torch.from_numpy(having(encoded, sources))

        def compute(batch: Mapping[str, Any]) -> dict[str, Tensor]:
            rows = chosen[batch["position"].cpu()]
            component = (context.draw_uniform(f"{stream}/source", rows) * len(sources)).long()
            shared_noise, private = _draw_latents(context, stream, rows)
            posterior = context.model.family(
                loc[rows, component].to(context.device), scale[rows, component].to(context.device)
            )
            latents = Latents(posterior.sample(shared_noise), {name: private[name] for name in targets})
            return self._read(latents, stream, rows, read, refine)

        return self._collect(len(chosen), compute)

    def unconditional(self, targets: Sequence[str], read: Reader) -> dict[str, np.ndarray]:
        """Readings of the targets of `num_generated` joint generations."""
        context = self._context
        prior = context.model.cluster_prior
        cumulative = prior.log_weights.double().exp().cpu().cumsum(0)
        cumulative /= cumulative[-1].clone()

        def compute(batch: Mapping[str, Any]) -> dict[str, Tensor]:
            rows = batch["position"].cpu()
            uniform = context.draw_uniform("unconditional/cluster", rows)
            clusters = torch.searchsorted(cumulative, uniform, right=True).to(context.device)
            shared_noise, private = _draw_latents(context, "unconditional", rows)
            latents = Latents(prior.sample(clusters, shared_noise), {name: private[name] for name in targets})
            return self._read(latents, "unconditional", rows, read, refine=True)

        return self._collect(context.settings.num_generated, compute)

    def _read(
        self, latents: Latents, stream: str, positions: Tensor, read: Reader, refine: bool
    ) -> dict[str, Tensor]:
        context = self._context
        values = context.model.decode(latents.shared, latents.private)
        readings = read(values)
        if refine and context.dcmvae is not None:
            seeds = context.draw_seeds(f"{stream}/refine", positions)
            refined = context.dcmvae.refine(values, latents.shared, seeds=seeds)
            readings |= {f"{REFINED}{key}": value for key, value in read(refined).items()}
        return readings

    def _collect(
        self, num_samples: int, compute: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
    ) -> dict[str, np.ndarray]:
        def count(batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
            computed = compute(batch)
            # All ranks have equally much to do.
            self._progress.update(int(batch["valid"].sum()) * self._context.accelerator.num_processes)
            return computed

        return self._context.collect(self._context.positions(num_samples), count)


@dataclass(frozen=True)
class Pair:
    """What was generated from one modality beside what is really there; n samples that have both."""

    source: str
    target: str
    generated: np.ndarray
    """(n, *shape), as stored."""
    real: np.ndarray
    """(n, *shape), as stored."""


def generate_pairs(context: EvaluationContext, targets: Sequence[str]) -> Iterator[Pair]:
    """Every target generated from every modality, self included, for every sample of the split that has both.

    Args:
        context: model, data and settings.
        targets: modalities to generate.

    Yields:
        Pairs of at least one sample each; the same on every rank.
    """
    model, settings = context.model, context.settings

    def read(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {f"value/{name}": values[name] for name in targets}

    encoded = context.collect(
        context.batches(settings.split), lambda batch: encode_sources(model, batch) | read(batch)
    )
    rows = {source: having(encoded, [source]) for source in model.modality_names}
    with progress_bar(
        total=sum(map(len, rows.values())),
        desc=f"generate {', '.join(targets)}",
        unit=" samples",
        disable=not context.accelerator.is_main_process,
        leave=False,
    ) as progress:
        generations = Generations(context, progress)
        for source, of_source in rows.items():
            if len(of_source) == 0:
                continue
            made = generations.conditional(encoded, (source,), targets, read, refine=False)
            for target in targets:
                both = encoded[f"has/{target}"][of_source]
                if not both.any():
                    continue
                generated, real = (
                    model.modalities[target].to_stored(values[both])
                    for values in (made[f"value/{target}"], encoded[f"value/{target}"][of_source])
                )
                yield Pair(source, target, generated, real)


def _draw_latents(
    context: EvaluationContext, stream: str, positions: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise of z (B, D_z), and w ~ p(w) (B, D_w) of every modality."""
    model = context.model
    names, config = model.modality_names, model.config
    size = config.shared_dim + len(names) * config.private_dim
    # One draw a sample: most of its cost is in seeding.
    noise = context.draw_noise(f"{stream}/latents", positions, (size,))
    shared, private = noise.split([config.shared_dim, size - config.shared_dim], dim=1)
    w = model.private_prior.sample(rearrange(private, "b (m d) -> m b d", m=len(names)))
    return shared, dict(zip(names, w, strict=True))
