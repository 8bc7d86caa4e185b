"""Seeds that do not depend on the batch, the rank or the order of draws."""

from __future__ import annotations

import zlib

import numpy as np


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
