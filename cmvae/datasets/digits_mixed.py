"""The embedded data set of three kinds: an image of a digit, statistics of another, a sentence about it.

Sentences and images share only the digit: a model could also cluster by a colour that a sentence mentions.
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
"""Number of tokens; the longest sentence has nine, `<eos>` included."""

_WHITE = 16.0
"""Value of full ink in the originals."""
_SENTENCE_STREAM = 100  # not one of the streams of the digits, which have the same seed
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
    """The experiment configs/digits_mixed.yaml."""
    return Path("configs/digits_mixed.yaml")


def from_arguments(arguments: argparse.Namespace) -> DigitsMixedSource:
    """Open the source that the flags describe."""
    return DigitsMixedSource(arguments.seed, arguments.pairings, arguments.held_out_pairings)


class DigitsMixedSource:
    """Samples of `image`, `statistics` and `caption`, the first two of different originals of a class.

    Splits, partners and images are those of `DigitsSource`: no original is in two splits.

    Args:
        seed: seed of splits, partners, backgrounds and sentences.
        pairings: number of samples per train image.
        held_out_pairings: number of samples per validation or test image.

    Raises:
        UserError: a number of pairings is below 1.
    """

    name = "digits_mixed"
    class_names = DigitsSource.class_names

    def __init__(self, seed: int = 0, pairings: int = 4, held_out_pairings: int = 5) -> None:
        self._digits = DigitsSource(seed, pairings, held_out_pairings)
        self.split_sizes = self._digits.split_sizes
        self.settings = self._digits.settings
        self.partners = {split: partners[:2] for split, partners in self._digits.partners.items()}
        """By split, (2, number of samples): the originals of the images and of the statistics."""
        statistics = pixel_statistics(self._digits.grey)
        modality = fit_vector(statistics, STATISTICS, self.partners["train"][1])
        self._statistics = number_column(statistics, modality)
        # One row per sample, split after split.
        self._first_row: dict[SplitName, int] = {}
        sentences: list[str | None] = []
        for split, size in self.split_sizes.items():
            self._first_row[split] = len(sentences)
            sentences += [self._write(seed, split, index) for index in range(size)]
        train = self._first_row["train"] + np.arange(self.split_sizes["train"])
        self._captions = TextColumn(sentences, fit_text(sentences, train, min_count=1, max_length=MAX_LENGTH))
        self.modalities = {
            "image": self._digits.modalities["m0"],
            "statistics": self._statistics.modality,
            "caption": self._captions.modality,
        }

    def sample(self, split: SplitName, index: int) -> Sample:
        """An image, statistics of another original of the class, and a sentence that names the class."""
        digit = self._digits.sample(split, index)
        values = {
            "image": digit.values["m0"],
            "statistics": self._statistics.read(int(self.partners[split][1, index])),
            "caption": self._captions.read(self._first_row[split] + index),
        }
        return Sample(values, digit.label)

    def _write(self, seed: int, split: SplitName, index: int) -> str:
        rng = random_stream(seed, _SENTENCE_STREAM, SPLIT_NUMBERS[split], index)
        label = self._digits.labels[self.partners[split][0, index]]
        sentence, adjective = rng.choice(SENTENCES), rng.choice(ADJECTIVES)
        return sentence.format(adjective=adjective, number=NUMBER_NAMES[label])


def pixel_statistics(images: np.ndarray) -> np.ndarray:
    """Compute the numbers named in `STATISTICS`.

    Args:
        images: (N, 8, 8), ink from 0 to 16.

    Returns:
        (N, 22) float64: share of ink; means, variances and covariance of the row and column numbers of the
        ink, in pixels and squared pixels; ink per row and per column.
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
