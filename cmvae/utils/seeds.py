"""Seeds that do not depend on the batch, the rank or the order of draws."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One generator for all samples, one per sample, or None for the default generator of torch."""


def derive_seed(seed: int, stream: str, *position: int) -> int:
    """Derive a 63-bit seed for `torch.Generator.manual_seed` from the arguments.

    Args:
        seed: not negative.
        stream: name of the purpose; different streams are independent.
        position: further non-negative integers, such as the position of a sample.
    """
    state = np.random.SeedSequence((seed, zlib.crc32(stream.encode()), *position)).generate_state(
        1, np.uint64
    )
    return int(state[0]) >> 1


def sample_generators(seed: int, places: Sequence[int], device: torch.device) -> list[torch.Generator]:
    """One generator per sample, each a function of (seed, place), as `StackedRandomGenerator` of EDM2.

    Args:
        seed: seed of a batch, which may be spread over ranks; not negative.
        places: positions of the samples in that batch.
        device: device of the generators. A GPU gives other numbers than the CPU, without synchronization.
    """
    # The first n numbers of a SeedSequence do not depend on how many are generated.
    seeds = np.random.SeedSequence(seed).generate_state(max(places) + 1, np.uint64)[np.asarray(places)] >> 1
    return [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]


def draw_normal(shape: Sequence[int], device: torch.device, generators: Generators = None) -> Tensor:
    """Draw standard normal numbers, fp32.

    Args:
        shape: shape of the result; (B, ...) with one generator per sample.
        device: device of the result and of the generators.
        generators: random number generators.
    """
    return _draw(Tensor.normal_, shape, device, generators)


def draw_uniform(shape: Sequence[int], device: torch.device, generators: Generators = None) -> Tensor:
    """Draw uniform numbers in [0, 1), fp32. Arguments as in `draw_normal`."""
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
