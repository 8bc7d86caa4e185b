"""Text: tokens of a vocabulary, at most so many, stored as their numbers."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING

import numpy as np

from cmvae.modalities.base import ArrayKind

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from cmvae.data.index import ModalitySchema

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, EOS, UNKNOWN)
"""Begin every vocabulary, in this order: their places are the numbers 0, 1 and 2."""

# Of a drawing: characters of a line, points of the type, and inches that a line and a character take.
_LINE_LENGTH, _FONT_SIZE = 24, 6
_LINE_HEIGHT, _CHARACTER_WIDTH = 0.105, 0.052


class Text(ArrayKind):
    """(length,) int64, places in `categories`, the vocabulary; `<eos>` ends it, `<pad>` fills it up."""

    name = "text"
    dtype = "int64"
    likelihoods = ("categorical",)
    network = "caption"
    metrics = frozenset({"text"})
    in_words = True

    def check(self, schema: ModalitySchema) -> None:
        """As `Kind.check`."""
        if len(schema.shape) != 1 or schema.shape[0] < 1:
            raise ValueError(f"shape {schema.shape} is no (length,)")
        if schema.categories is None or schema.categories[: len(SPECIAL_TOKENS)] != SPECIAL_TOKENS:
            raise ValueError(f"categories: a vocabulary begins with {', '.join(SPECIAL_TOKENS)}")

    def to_data(self, stored: Tensor, schema: ModalitySchema) -> Tensor:
        """As `Kind.to_data`: the tokens' numbers, (B, length) int64."""
        return stored

    def to_stored(self, data: np.ndarray, schema: ModalitySchema) -> np.ndarray:
        """As `Kind.to_stored`."""
        return data.astype(np.int64)

    def draw(self, ax: Axes, stored: np.ndarray, schema: ModalitySchema) -> None:
        """As `Kind.draw`."""
        words = textwrap.fill(self.to_text(stored, schema), _LINE_LENGTH)
        ax.text(0.5, 0.5, words, ha="center", va="center", fontsize=_FONT_SIZE, transform=ax.transAxes)

    def drawn_size(self, schema: ModalitySchema) -> tuple[float, float]:
        """As `Kind.drawn_size`: of a text that is as long as there is room for, of words of usual length."""
        usual = 1 + float(np.mean([len(word) for word in schema.categories or ()]))
        characters = schema.shape[0] * usual
        # Where lines break between words, the last sixth of them stays empty.
        num_lines = math.ceil(characters / _LINE_LENGTH * 6 / 5)
        width = min(characters, _LINE_LENGTH) * _CHARACTER_WIDTH
        return max(0.4, width), max(0.3, (num_lines + 1.2) * _LINE_HEIGHT)

    def to_text(self, stored: np.ndarray, schema: ModalitySchema) -> str:
        """As `Kind.to_text`: the words up to the first `<eos>`."""
        vocabulary = schema.categories or ()
        words = [vocabulary[number] for number in stored.tolist()]
        if EOS in words:
            words = words[: words.index(EOS)]
        return " ".join(word for word in words if word != PAD)

    def table_columns(self, schema: ModalitySchema) -> tuple[str, ...]:
        """As `Kind.table_columns`: the words."""
        return (self.name,)

    def parameter_shape(self, schema: ModalitySchema) -> tuple[int, ...]:
        """As `Kind.parameter_shape`: logits of every word at every position."""
        return (*schema.shape, len(schema.categories or ()))
