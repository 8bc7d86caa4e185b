"""Random numbers that belong to a sample, whatever the batch, the rank or the order they are drawn in."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One random stream for all samples, one per sample, or None for torch's default stream."""


def derive_seed(seed: int, stream: str, *position: int) -> int:
    """A number of 63 bits for `torch.Generator.manual_seed`: a function of its arguments.

    Args:
        seed: not negative.
        stream: what the numbers are for, so that two uses are independent.
        position: of the sample, where a stream has several.
    """
    state = np.random.SeedSequence((seed, zlib.crc32(stream.encode()), *position)).generate_state(
        1, np.uint64
    )
    return int(state[0]) >> 1


def sample_generators(seed: int, places: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """One random stream per sample, each a function of (seed, place); compare edm2's StackedRandomGenerator.

    Args:
        seed: of a batch that may be spread over ranks; not negative.
        places: of the samples in that batch.
        device: where the numbers are drawn. A GPU draws other numbers than a CPU; nothing waits for it.
    """
    # The first n numbers of a state do not depend on how many are generated.
    seeds = np.random.SeedSequence(seed).generate_state(max(places) + 1, np.uint64)[np.asarray(places)] >> 1
    return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]


def draw_normal(shape: Sequence[int], device: torch.device, generators: Generators = None) -> Tensor:
    """Standard normal numbers, fp32.

    Args:
        shape: with one generator per sample (B, ...).
        device: of the result and of the generators.
        generators: where from.
    """
    return _draw(Tensor.normal_, shape, device, generators)


def draw_uniform(shape: Sequence[int], device: torch.device, generators: Generators = None) -> Tensor:
    """Uniform numbers in [0, 1), fp32; arguments as for `draw_normal`."""
    return _draw(Tensor.uniform_, shape, device, generators)


def _draw(
    fill: Callable[..., Tensor], shape: Sequence[int], device: torch.device, generators: Generators
) -> Tensor:
    values = torch.empty(tuple(shape), device=device)
    if isinstance(generators, Sequence):
        for sample, generator in zip(values, generators, strict=True):
            fill(sample, generator=generator)
    else:
        fill(values, generator=generators)
    return values
