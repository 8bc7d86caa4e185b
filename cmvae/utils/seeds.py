"""Random numbers that belong to a sample, whatever the batch, the rank or the order they are drawn in."""

from __future__ import annotations

import zlib

import numpy as np


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
