"""The embedded data set of three kinds: a picture of a digit, statistics of another, a sentence naming it.

The sentences share nothing with the picture but the digit: a colour told in them would be as good a reason
for a cluster as the digit is.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from cmvae.data.index import SplitName
from cmvae.datasets import digits
from cmvae.datasets.base import SPLIT_NUMBERS, Sample, random_stream
from cmvae.datasets.columns import TextColumn, fit_text, fit_vector, number_column
from cmvae.datasets.digits import DigitsSource

DESCRIPTION = "scikit-learn's digits as image, pixel statistics and sentence; needs no download"

NUMBER_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SENTENCES = (
    "a {adjective} {number}",
    "this is the number {number}",
    "someone wrote a {number} here",
    "the digit {number} in {adjective} writing",
    "it looks like a {adjective} {number} to me",
)
ADJECTIVES = ("neat", "hasty", "clear", "shaky", "plain", "large")
MAX_LENGTH = 16
"""Tokens; the longest sentence has nine, its end included."""

_WHITE = 16.0
"""Full ink in the originals."""
_SENTENCE_STREAM = 100  # far from those of the digits, which share the seed
STATISTICS = (
    "ink",
    "mean_row",
    "mean_column",
    "spread_rows",
    "spread_columns",
    "slant",
    *(f"row_{row}" for row in range(8)),
    *(f"column_{column}" for column in range(8)),
)

add_arguments = digits.add_pairing_arguments


def config_for(arguments: argparse.Namespace) -> Path:
    """As `SourceModule.config_for`."""
    return Path("configs/digits_mixed.yaml")


def from_arguments(arguments: argparse.Namespace) -> DigitsMixedSource:
    """The source that the flags describe."""
    return DigitsMixedSource(arguments.seed, arguments.pairings, arguments.held_out_pairings)


class DigitsMixedSource:
    """Samples of `image`, `statistics` and `caption`, of one class, the first two from different originals.

    Splits, partners and pictures are those of `DigitsSource`: no original is in two splits.

    Args:
        seed: as of `DigitsSource`, and of the sentences.
        pairings: as of `DigitsSource`.
        held_out_pairings: likewise.

    Raises:
        UserError: as of `DigitsSource`.
    """

    name = "digits_mixed"
    class_names = DigitsSource.class_names

    def __init__(self, seed: int = 0, pairings: int = 4, held_out_pairings: int = 5) -> None:
        self._pictures = DigitsSource(seed, pairings, held_out_pairings)
        self.split_sizes = self._pictures.split_sizes
        self.settings = self._pictures.settings
        self.partners = {split: partners[:2] for split, partners in self._pictures.partners.items()}
        """Of each split (2, number of samples): the originals of the image and of the statistics."""
        statistics = pixel_statistics(self._pictures.grey)
        modality, _ = fit_vector(statistics, STATISTICS, self.partners["train"][1])
        self._statistics = number_column(statistics, modality)
        # A row a sample, one split after another.
        self._first_row: dict[SplitName, int] = {}
        sentences: list[str | None] = []
        for split, size in self.split_sizes.items():
            self._first_row[split] = len(sentences)
            sentences += [self._write(seed, split, index) for index in range(size)]
        train = self._first_row["train"] + np.arange(self.split_sizes["train"])
        self._captions = TextColumn(sentences, fit_text(sentences, train, min_count=1, max_length=MAX_LENGTH))
        self.modalities = {
            "image": self._pictures.modalities["m0"],
            "statistics": self._statistics.modality,
            "caption": self._captions.modality,
        }

    def sample(self, split: SplitName, index: int) -> Sample:
        """A picture, statistics of another original of the class, and a sentence that names the class."""
        picture = self._pictures.sample(split, index)
        values = {
            "image": picture.values["m0"],
            "statistics": self._statistics.read(int(self.partners[split][1, index])),
            "caption": self._captions.read(self._first_row[split] + index),
        }
        return Sample(values, picture.label)

    def _write(self, seed: int, split: SplitName, index: int) -> str:
        rng = random_stream(seed, _SENTENCE_STREAM, SPLIT_NUMBERS[split], index)
        label = self._pictures.labels[self.partners[split][0, index]]
        sentence, adjective = rng.choice(SENTENCES), rng.choice(ADJECTIVES)
        return sentence.format(adjective=adjective, number=NUMBER_NAMES[label])


def pixel_statistics(images: np.ndarray) -> np.ndarray:
    """The numbers named in `STATISTICS`.

    Args:
        images: (N, 8, 8), ink between 0 and 16.

    Returns:
        (N, 22) float64: share of ink; mean and variance of the ink's rows and columns and their covariance,
        in pixels; ink of every row and column.
    """
    ink = images / _WHITE
    total = ink.sum(axis=(1, 2))
    places = np.arange(8.0)
    rows, columns = ink.sum(axis=2), ink.sum(axis=1)
    mean_row, mean_column = rows @ places / total, columns @ places / total
    from_row, from_column = places - mean_row[:, None], places - mean_column[:, None]
    moments = [
        total / 64,
        mean_row,
        mean_column,
        (rows * from_row**2).sum(axis=1) / total,
        (columns * from_column**2).sum(axis=1) / total,
        np.einsum("nrc,nr,nc->n", ink, from_row, from_column) / total,
    ]
    return np.concatenate([np.stack(moments, axis=1), rows, columns], axis=1)
