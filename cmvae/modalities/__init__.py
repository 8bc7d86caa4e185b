"""The kinds of modalities, and their union, which pydantic reads by `kind`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from cmvae.modalities.base import RESERVED_NAMES, Modality, ModalityName, check_name
from cmvae.modalities.binary import BinaryModality
from cmvae.modalities.categorical import CategoricalModality
from cmvae.modalities.image import ImageModality
from cmvae.modalities.text import TextModality
from cmvae.modalities.vector import Embedding, VectorModality, embedding_of

__all__ = [
    "RESERVED_NAMES",
    "AnyModality",
    "BinaryModality",
    "CategoricalModality",
    "Embedding",
    "ImageModality",
    "Modality",
    "ModalityName",
    "TextModality",
    "VectorModality",
    "check_name",
    "embedding_of",
]

AnyModality = Annotated[
    ImageModality | TextModality | VectorModality | BinaryModality | CategoricalModality,
    Field(discriminator="kind"),
]
"""What `index.json` and exports hold."""
