"""Rows of one modality, a class a kind: raw values in, what is stored out, statistics from train alone.

The sources of people's own data are made of these: a table, a folder, captions of birds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cmvae.data.index import SplitName
from cmvae.datasets.base import Sample
from cmvae.datasets.splits import Splits
from cmvae.modalities import (
    BinaryModality,
    CategoricalModality,
    ImageModality,
    Modality,
    TextModality,
    VectorModality,
)
from cmvae.modalities.tokenizer import Tokenizer, build_vocabulary, split_words
from cmvae.utils.errors import UserError

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
LENGTH_STEP = 8
"""Texts are as long as a multiple of this: networks of captions halve the length three times."""
CONSTANT = 1e-5
"""A dimension with a smaller ratio of deviation to mean is constant: in single precision little is left."""


class Column(Protocol):
    """One modality of every row."""

    @property
    def modality(self) -> Modality:
        """What is stored."""

    def has(self, row: int) -> bool:
        """Whether the row has this modality."""

    def read(self, row: int) -> np.ndarray:
        """What is stored of a row that has it.

        Raises:
            UserError: what the row names is missing or damaged.
        """


class ImageColumn:
    """Photographs of any size: the largest square in the middle, resized.

    Args:
        paths: of every row, None where there is none.
        places: what to call each row in a message: file, row and column.
        size: height and width in pixels.
        channels: 3, or 1 for grey.

    Raises:
        UserError: a file is missing.
    """

    def __init__(
        self, paths: Sequence[Path | None], places: Sequence[str], size: int, channels: int = 3
    ) -> None:
        for path, place in zip(paths, places, strict=True):
            if path is not None and not path.is_file():
                raise UserError(f"{place}: {path} is no file. Mend the path, or leave it empty: no image")
        self.paths, self.places = paths, places
        self.modality = ImageModality(shape=(channels, size, size), optional=None in paths)

    def has(self, row: int) -> bool:
        """As `Column.has`."""
        return self.paths[row] is not None

    def read(self, row: int) -> np.ndarray:
        """As `Column.read`: (channels, size, size) uint8."""
        path = self.paths[row]
        assert path is not None  # noqa: S101 (`has` was asked)
        try:
            return read_image(path, self.modality)
        except ValueError as error:
            raise UserError(f"{self.places[row]}: {path}: {error}") from error


class TextColumn:
    """Sentences; the vocabulary is that of the train split.

    Args:
        sentences: of every row, None where there is none.
        train: rows of the train split.
        min_count: rarer words become `<unk>`.
        max_length: tokens of a sentence, its end included, a multiple of `LENGTH_STEP`; less where all of
            train are shorter.
    """

    def __init__(
        self, sentences: Sequence[str | None], train: np.ndarray, min_count: int, max_length: int
    ) -> None:
        self._words = [None if sentence is None else split_words(sentence) for sentence in sentences]
        of_train = [words for words in (self._words[row] for row in train.tolist()) if words is not None]
        longest = max((len(words) for words in of_train), default=0)
        length = min(LENGTH_STEP * math.ceil((longest + 1) / LENGTH_STEP), max_length)
        self._tokenizer = Tokenizer(build_vocabulary(of_train, min_count), length)
        self.modality = TextModality(
            shape=(self._tokenizer.length,),
            categories=self._tokenizer.vocabulary,
            optional=None in self._words,
        )

    def has(self, row: int) -> bool:
        """As `Column.has`."""
        return self._words[row] is not None

    def read(self, row: int) -> np.ndarray:
        """As `Column.read`: (length,) int64."""
        words = self._words[row]
        assert words is not None  # noqa: S101 (`has` was asked)
        return self._tokenizer.encode(words)


class VectorColumn:
    """Numbers, to be standardised by the train split's mean and deviation; constant dimensions keep theirs.

    Args:
        values: (N, D) float64; a row with NaN in it lacks the modality.
        names: of the dimensions, if they have some.
        train: rows of the train split.

    Raises:
        UserError: no row of train has it.
    """

    def __init__(self, values: np.ndarray, names: Sequence[str] | None, train: np.ndarray) -> None:
        self._values = values.astype(np.float32)
        self._has = ~np.isnan(values).any(axis=1)
        of_train = values[train[self._has[train]]]
        if len(of_train) == 0:
            what = ", ".join(names) if names is not None else "a vector"
            raise UserError(f"{what}: no row of the train split has all of its numbers; leave it out")
        mean, std = of_train.mean(axis=0), of_train.std(axis=0)
        constant = std <= CONSTANT * np.maximum(np.abs(mean), np.finfo(np.float32).tiny)
        self.constant = tuple(
            names[place] if names is not None else str(place) for place in np.flatnonzero(constant).tolist()
        )
        """Dimensions that do not vary over the train split."""
        self.modality = VectorModality(
            shape=values.shape[1:],
            optional=not bool(self._has.all()),
            columns=None if names is None else tuple(names),
            mean=tuple(mean.tolist()),
            std=tuple(np.where(constant, 1.0, std).tolist()),
        )

    def has(self, row: int) -> bool:
        """As `Column.has`."""
        return bool(self._has[row])

    def read(self, row: int) -> np.ndarray:
        """As `Column.read`: (D,) float32 in the units of the data."""
        return self._values[row]


class BinaryColumn:
    """Yes and no.

    Args:
        values: (N, D) float64 of 0 and 1; a row with NaN in it lacks the modality.
        names: of the dimensions.
    """

    def __init__(self, values: np.ndarray, names: Sequence[str]) -> None:
        self._values = values
        self._has = ~np.isnan(values).any(axis=1)
        self.modality = BinaryModality(
            shape=values.shape[1:],
            columns=tuple(names),
            optional=not bool(self._has.all()),
        )

    def has(self, row: int) -> bool:
        """As `Column.has`."""
        return bool(self._has[row])

    def read(self, row: int) -> np.ndarray:
        """As `Column.read`: (D,) uint8."""
        return self._values[row].astype(np.uint8)


class CategoricalColumn:
    """One of several names.

    Args:
        names: of every row, None where there is none.
        categories: all there are.
    """

    def __init__(self, names: Sequence[str | None], categories: Sequence[str]) -> None:
        places = {name: place for place, name in enumerate(categories)}
        self._places = [None if name is None else places[name] for name in names]
        self.modality = CategoricalModality(
            categories=tuple(categories),
            optional=None in self._places,
        )

    def has(self, row: int) -> bool:
        """As `Column.has`."""
        return self._places[row] is not None

    def read(self, row: int) -> np.ndarray:
        """As `Column.read`: () int64."""
        return np.array(self._places[row], dtype=np.int64)


@dataclass(frozen=True)
class ColumnSource:
    """A data set of columns, a `Source`."""

    name: str
    columns: Mapping[str, Column]
    """By modality."""
    splits: Splits
    labels: np.ndarray | None
    """(N,) class of each row."""
    class_names: tuple[str, ...] | None
    keys: Sequence[str]
    """(N,) what each row is called in the shards."""
    settings: Mapping[str, str | int | float | bool | None]
    groups: Sequence[str] | None = None
    """(N,) name of the group of each row; None where rows have no groups."""

    @property
    def modalities(self) -> dict[str, Modality]:
        """As `Source.modalities`."""
        return {name: column.modality for name, column in self.columns.items()}

    @property
    def split_sizes(self) -> dict[SplitName, int]:
        """As `Source.split_sizes`."""
        return {split: len(rows) for split, rows in self.splits.items()}

    def sample(self, split: SplitName, index: int) -> Sample:
        """As `Source.sample`."""
        row = int(self.splits[split][index])
        return Sample(
            {name: column.read(row) for name, column in self.columns.items() if column.has(row)},
            label=None if self.labels is None else int(self.labels[row]),
            key=self.keys[row],
            group=None if self.groups is None else self.groups[row],
        )


def read_image(path: Path, modality: Modality) -> np.ndarray:
    """A picture file as (channels, height, width) uint8: turned as its EXIF says, its middle, resized.

    Raises:
        ValueError: it is no picture, or one of more than eight bits; with what to do.
    """
    channels, height, width = modality.shape
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"a picture of mode {image.mode}, more than 8 bits a pixel. Save it with 8")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                # What lies below full transparency is arbitrary.
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            image = image.convert("L" if channels == 1 else "RGB")
            pixels = np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(
            f"cannot be read as a picture ({error}); {', '.join(IMAGE_FORMATS)} can be. Replace it"
        ) from error
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def number_classes(names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels and class names of what is called so: by the alphabet, or by size where all are numbers.

    Returns:
        (N,) int64, and the name of every number.
    """
    found = set(names)
    try:
        class_names = tuple(sorted(found, key=lambda name: (float(name), name)))
    except ValueError:
        class_names = tuple(sorted(found))
    places = {name: place for place, name in enumerate(class_names)}
    return np.array([places[name] for name in names], dtype=np.int64), class_names


def resolve_inside(folder: Path, text: str) -> Path:
    """A path that a data file names: absolute, or below the folder of that file.

    Raises:
        ValueError: a relative one leads out of the folder.
    """
    inside = os.path.normpath(text)
    if inside == os.pardir or inside.startswith(os.pardir + os.sep):
        raise ValueError(f"{text} leads out of {folder}. Write an absolute path if that is meant")
    return folder / inside
