"""The embedded data set: scikit-learn's handwritten digits in several colour modalities; needs no download.

A background is one dark colour with slight noise. With photographs behind digits this small, a model would
cluster the backgrounds, not the digits.
"""

from __future__ import annotations

import argparse
import colorsys
from pathlib import Path

import numpy as np

from cmvae.data.index import SplitName
from cmvae.datasets.base import SPLIT_NUMBERS, Sample, random_stream
from cmvae.datasets.pairing import invert_under, pair_within_classes
from cmvae.modalities import ImageModality
from cmvae.utils.arguments import fraction_below_one
from cmvae.utils.errors import UserError

DESCRIPTION = "scikit-learn's 1,797 digits in three colour modalities of 3×16×16, or more; needs no download"

MAX_MODALITIES = 8
"""With more, the hues would be too similar to distinguish."""
PALETTE_SIZE = 8
NUM_TRAIN_IMAGES = 1500
INK_THRESHOLD = 7
"""Pixels above are ink, in the range 0..16 of the originals. Half of the range keeps the strokes closed."""
NOISE_STD = 4.0
"""Standard deviation of the noise of the background, in grey levels 0..255."""

# First part of the key of each random stream.
_SPLIT_STREAM, _PARTNER_STREAM, _BACKGROUND_STREAM, _MISSING_STREAM = range(4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `cmvae pack digits`."""
    add_pairing_arguments(parser)
    parser.add_argument(
        "--modalities",
        type=int,
        default=3,
        choices=range(2, MAX_MODALITIES + 1),
        help="number of modalities m0, m1, …, each with its part of the colour circle (default: 3, as in "
        "configs/digits.yaml)",
    )
    parser.add_argument(
        "--missing",
        type=fraction_below_one,
        default=0.0,
        metavar="SHARE",
        help="probability that a train or validation sample lacks a modality; at least one stays, and the "
        "test split is complete (default: 0)",
    )


def add_pairing_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags for the number of samples per original image."""
    parser.add_argument(
        "--pairings",
        type=int,
        default=4,
        metavar="N",
        help="samples per train image, each with other partners and backgrounds (default: 4)",
    )
    parser.add_argument(
        "--held-out-pairings",
        type=int,
        default=5,
        metavar="N",
        help="the same for validation and test; few samples would make noisy metrics (default: 5)",
    )


def config_for(arguments: argparse.Namespace) -> Path:
    """The experiment configs/digits.yaml."""
    return Path("configs/digits.yaml")


def from_arguments(arguments: argparse.Namespace) -> DigitsSource:
    """Open the source that the flags describe."""
    return DigitsSource(
        arguments.seed,
        arguments.pairings,
        arguments.held_out_pairings,
        arguments.missing,
        arguments.modalities,
    )


def make_palettes(num_modalities: int) -> np.ndarray:
    """Eight dark colours per modality: (M, 8, 3) RGB values 0..255.

    Each modality has a part of the colour circle, with gaps between the parts, so modalities share no hue.
    """
    return np.array(
        [
            [
                colorsys.hsv_to_rgb((modality + 0.75 * colour / PALETTE_SIZE) / num_modalities, 0.85, 0.35)
                for colour in range(PALETTE_SIZE)
            ]
            for modality in range(num_modalities)
        ]
    ) * np.float64(255)


class DigitsSource:
    """M images of a class per sample: digits, binarised and enlarged to 16×16, on coloured backgrounds.

    Args:
        seed: seed of splits, partners and backgrounds.
        pairings: number of samples per train image.
        held_out_pairings: number of samples per validation or test image.
        missing: probability that a train or validation sample lacks a modality. Clusters are selected on data
            with as many missing modalities as in training, and evaluated on complete data. A sample that
            would have no modality keeps one, so the share of missing values is missing − missing^M / M.
        num_modalities: M, number of modalities.

    Raises:
        UserError: a number of pairings is below 1.
    """

    name = "digits"
    class_names = tuple(str(digit) for digit in range(10))

    def __init__(
        self,
        seed: int = 0,
        pairings: int = 4,
        held_out_pairings: int = 5,
        missing: float = 0.0,
        num_modalities: int = 3,
    ) -> None:
        if min(pairings, held_out_pairings) < 1:
            raise UserError(
                f"--pairings {pairings}, --held-out-pairings {held_out_pairings}: must be at least 1"
            )
        # Slow to import, and only needed by this source.
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        self.seed = seed
        self.missing = missing
        self.grey = digits.images
        """(1797, 8, 8): the originals, with ink from 0 to 16."""
        self.labels = digits.target.astype(np.int64)
        self.masks = (digits.images > INK_THRESHOLD).repeat(2, axis=1).repeat(2, axis=2)
        """(1797, 16, 16) bool: where the ink is."""
        self.palettes = make_palettes(num_modalities)
        self.modalities = {
            f"m{modality}": ImageModality(shape=(3, *self.masks.shape[1:]), optional=missing > 0)
            for modality in range(num_modalities)
        }
        self.settings: dict[str, str | int | float | bool | None] = {
            "source": "sklearn.datasets.load_digits",
            "pairings": pairings,
            "held_out_pairings": held_out_pairings,
            "missing": missing,
            "modalities": num_modalities,
        }

        split_seeds = random_stream(seed, _SPLIT_STREAM).integers(2**32, size=2).tolist()
        train, held_out = train_test_split(
            np.arange(len(self.labels)),
            train_size=NUM_TRAIN_IMAGES,
            stratify=self.labels,
            random_state=split_seeds[0],
        )
        validation, test = train_test_split(
            held_out, train_size=0.5, stratify=self.labels[held_out], random_state=split_seeds[1]
        )
        self.partners: dict[SplitName, np.ndarray] = {
            "train": self._pair("train", train, pairings),
            "validation": self._pair("validation", validation, held_out_pairings),
            "test": self._pair("test", test, held_out_pairings),
        }
        """By split, (M, number of samples): the underlying image of each modality and sample."""
        self.split_sizes = {split: partners.shape[1] for split, partners in self.partners.items()}

    def sample(self, split: SplitName, index: int) -> Sample:
        """One image per present modality, all of one class, each on a colour of its modality's palette."""
        images = {}
        underlying = self.partners[split][:, index]
        for modality in self._present(split, index):
            image = int(underlying[modality])
            rng = random_stream(self.seed, _BACKGROUND_STREAM, SPLIT_NUMBERS[split], modality, index)
            colour = self.palettes[modality, rng.integers(PALETTE_SIZE)]
            mask = self.masks[image]
            noisy = rng.normal(colour, NOISE_STD, size=(*mask.shape, 3))
            background = noisy.round().clip(0, 255).astype(np.uint8)
            images[f"m{modality}"] = invert_under(background, mask)
        return Sample(images, label=int(self.labels[underlying[0]]))

    def _present(self, split: SplitName, index: int) -> list[int]:
        """Modalities of a sample; with a larger `missing` a subset of those with a smaller one."""
        if split == "test":
            return list(range(len(self.modalities)))
        stream = random_stream(self.seed, _MISSING_STREAM, SPLIT_NUMBERS[split], index)
        luck = stream.random(len(self.modalities))
        kept = np.flatnonzero(luck >= self.missing)
        return kept.tolist() if len(kept) else [int(luck.argmax())]

    def _pair(self, split: SplitName, images: np.ndarray, pairings: int) -> np.ndarray:
        rng = random_stream(self.seed, _PARTNER_STREAM, SPLIT_NUMBERS[split])
        rounds = [
            images[pair_within_classes(self.labels[images], len(self.modalities), rng)]
            for _ in range(pairings)
        ]
        return np.concatenate(rounds, axis=1)
