"""Text: tokens of a vocabulary, up to a fixed length, stored as their indices."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import PositiveInt, field_validator
from typing_extensions import override

from cmvae.modalities.base import CategoriesModality

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, EOS, UNKNOWN)
"""Begin every vocabulary, in this order: their indices are 0, 1 and 2."""

# Of a drawing: characters of a line, points of the type, and inches that a line and a character take.
_LINE_LENGTH, _FONT_SIZE = 24, 6
_MAX_DRAWN = 480
"""Characters of a text in a drawing."""
_LINE_HEIGHT, _CHARACTER_WIDTH = 0.105, 0.052


class TextModality(CategoriesModality):
    """(length,) int64, indices into `categories`, the vocabulary; after `<eos>` there is only `<pad>`."""

    network = "caption"
    metrics = frozenset({"text"})

    kind: Literal["text"] = "text"
    shape: tuple[PositiveInt]

    @field_validator("categories")
    @classmethod
    def _check_vocabulary(cls, categories: tuple[str, ...]) -> tuple[str, ...]:
        if categories[: len(SPECIAL_TOKENS)] != SPECIAL_TOKENS:
            raise ValueError(f"a vocabulary begins with {', '.join(SPECIAL_TOKENS)}")
        return categories

    @override
    def draw(self, ax: Axes, stored: np.ndarray) -> None:
        words = self.describe(stored)
        if len(words) > _MAX_DRAWN:
            words = f"{words[: _MAX_DRAWN - 1]}…"
        words = textwrap.fill(words, _LINE_LENGTH)
        ax.text(0.5, 0.5, words, ha="center", va="center", fontsize=_FONT_SIZE, transform=ax.transAxes)

    @property
    @override
    def drawn_size(self) -> tuple[float, float]:
        """Room for a text of the full length, in words of average length."""
        usual = 1 + float(np.mean([len(word) for word in self.categories]))
        characters = min(self.shape[0] * usual, _MAX_DRAWN)
        # Where lines break between words, the last sixth of them stays empty.
        num_lines = math.ceil(characters / _LINE_LENGTH * 6 / 5)
        width = min(characters, _LINE_LENGTH) * _CHARACTER_WIDTH
        return max(0.4, width), max(0.3, (num_lines + 1.2) * _LINE_HEIGHT)

    @override
    def describe(self, stored: np.ndarray) -> str:
        """The words up to the first `<eos>`."""
        words = [self.categories[number] for number in stored.tolist()]
        if EOS in words:
            words = words[: words.index(EOS)]
        return " ".join(word for word in words if word != PAD)
