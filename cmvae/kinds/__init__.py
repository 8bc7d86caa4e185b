"""The kinds of modalities, found by name."""

from __future__ import annotations

from cmvae.kinds.binary import Binary
from cmvae.kinds.categorical import Categorical
from cmvae.kinds.image import Image
from cmvae.kinds.kind import Kind
from cmvae.kinds.text import Text
from cmvae.kinds.vector import Vector

KINDS: dict[str, Kind] = {
    "image": Image(),
    "text": Text(),
    "vector": Vector(),
    "binary": Binary(),
    "categorical": Categorical(),
}
