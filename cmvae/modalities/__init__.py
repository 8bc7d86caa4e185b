"""The kinds of modalities, found by name."""

from __future__ import annotations

from cmvae.modalities.base import Kind
from cmvae.modalities.binary import Binary
from cmvae.modalities.categorical import Categorical
from cmvae.modalities.image import Image
from cmvae.modalities.text import Text
from cmvae.modalities.vector import Vector

KINDS: dict[str, Kind] = {
    "image": Image(),
    "text": Text(),
    "vector": Vector(),
    "binary": Binary(),
    "categorical": Categorical(),
}
