"""A data set of all kinds, in which every modality tells the class, and which lacks some of its values."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cmvae.data.schema import ModalitySchema
from cmvae.data.sources.source import Sample
from cmvae.kinds.text import SPECIAL_TOKENS

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220)}
VOCABULARY = (*SPECIAL_TOKENS, "a", "the", "bird", "fish", "with", "wings", *COLOURS)
LENGTH = 6
SCHEMAS: Mapping[str, ModalitySchema] = {
    "photo": ModalitySchema(kind="image", shape=(3, 8, 8), dtype="uint8", optional=True),
    "caption": ModalitySchema(
        kind="text", shape=(LENGTH,), dtype="int64", categories=VOCABULARY, optional=True
    ),
    "sizes": ModalitySchema(
        kind="vector",
        shape=(2,),
        dtype="float32",
        columns=("wing", "beak"),
        mean=(50.0, 3.0),
        std=(20.0, 1.5),
        optional=True,
    ),
    "marks": ModalitySchema(
        kind="binary", shape=(3,), dtype="uint8", columns=("crest", "stripe", "spot"), optional=True
    ),
    "habitat": ModalitySchema(
        kind="categorical", shape=(), dtype="int64", categories=("shore", "forest", "field"), optional=True
    ),
}


def encode_words(words: list[str]) -> np.ndarray:
    """Words as they are stored: their places, `<eos>`, `<pad>`."""
    places = [VOCABULARY.index(word) for word in words] + [1]
    return np.array(places + [0] * (LENGTH - len(places)), dtype=np.int64)


class Mixed:
    """A source for `write_shards`: photographs, captions, sizes, marks and habitats of three classes.

    Args:
        missing: share of values that are missing; every sample keeps one modality at least.
    """

    name = "mixed"
    class_names = tuple(COLOURS)
    settings: Mapping[str, str] = {}
    modalities = SCHEMAS
    split_sizes: Mapping[str, int] = {"train": 120, "validation": 24, "test": 60}

    def __init__(self, missing: float = 0.0) -> None:
        self.missing = missing

    def sample(self, split: str, index: int) -> Sample:
        rng = np.random.default_rng([len(split), index])
        label = int(index % len(COLOURS))
        colour = self.class_names[label]
        photo = np.array(COLOURS[colour])[:, None, None] + rng.normal(0, 12, (3, 8, 8))
        words = [rng.choice(["a", "the"]), colour, rng.choice(["bird", "fish"])]
        if rng.random() < 0.5:
            words += ["with", "wings"]
        values = {
            "photo": photo.clip(0, 255).astype(np.uint8),
            "caption": encode_words(words),
            "sizes": np.array([30.0, 1.5]) + label * np.array([20.0, 1.5]) + rng.normal(0, [2.0, 0.1]),
            "marks": (np.arange(3) == label).astype(np.uint8),
            "habitat": np.array(label),
        }
        there = rng.random(len(values)) >= self.missing
        there[rng.integers(len(values))] = True
        kept = [name for name, yes in zip(values, there, strict=True) if yes]
        return Sample({name: values[name].astype(SCHEMAS[name].dtype) for name in kept}, label)
