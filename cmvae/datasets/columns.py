"""Rows of one modality: raw values in, stored values out.

The sources of users' own data consist of columns: tables, folders, data in memory, captions of birds. A
column stores its values as a modality says. `fit_text`, `fit_vector` and so on make the modality of new data
from its train split; data for a trained model takes the modality of the model instead.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cmvae.data.index import OnError, SplitName, TableSchema
from cmvae.datasets.base import DamagedSampleError, Sample
from cmvae.datasets.boxes import square_around
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
from cmvae.utils.errors import UserError, raise_all

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
LENGTH_STEP = 8
"""Number of tokens of a text is a multiple of this: caption networks halve the length three times."""
MAX_NUMBER = float(np.finfo(np.float32).max)
"""Standardised numbers are in single precision."""
_MAX_DEVIATIONS = 1e6
"""Numbers of other splits this many standard deviations from the mean of the train split are refused."""
_ROUNDING_ERROR = 1e-3
"""Vectors are stored in double precision if single precision has a larger error, in standard deviations."""
_MAX_SINGLE = 1e30
"""... or if numbers are larger than this, so that generated ones would overflow."""


class Column(Protocol):
    """One modality of every row."""

    @property
    def modality(self) -> Modality:
        """How the values are stored."""

    def has(self, row: int) -> bool:
        """Whether the row has this modality."""

    def read(self, row: int) -> np.ndarray:
        """The stored value of a row that has this modality.

        Raises:
            DamagedSampleError: the file that the row names is missing or damaged.
        """


def read_row(columns: Mapping[str, Column], row: int) -> dict[str, np.ndarray]:
    """Stored values of a row by modality, without the modalities that it lacks."""
    return {name: column.read(row) for name, column in columns.items() if column.has(row)}


class ArrayColumn:
    """Stored values in memory.

    Args:
        values: (N, *shape) stored value of each row; anything where it is missing.
        has: (N,) bool, whether each row has a value; None if all have one.
        modality: how the values are stored.
    """

    def __init__(self, values: np.ndarray, has: np.ndarray | None, modality: Modality) -> None:
        self._values = values.astype(modality.dtype, copy=False)
        self._has = has
        self.modality = modality

    def has(self, row: int) -> bool:
        """Whether the row has a value."""
        return self._has is None or bool(self._has[row])

    def read(self, row: int) -> np.ndarray:
        """The shape and dtype of the modality."""
        return self._values[row]


class ImageFile(Protocol):
    """A `Path`, or a member of a tar."""

    def read_bytes(self) -> bytes:
        """The content of the file."""


class BoxedFile(NamedTuple):
    """An image file, of which the square around a box is used."""

    path: Path
    box: Sequence[float]
    """Left, top, width and height, in pixels of the file."""

    def __str__(self) -> str:
        return str(self.path)

    def read_bytes(self) -> bytes:
        """The content of the file."""
        return self.path.read_bytes()


class ImageColumn:
    """Image files of any size: the largest square in the middle, or around a box, resized.

    Args:
        files: (N,) file of each row, None where it is missing.
        places: (N,) name of each row for messages: file, row and column.
        modality: size and number of channels.
        on_error: `skip` finds missing files when they are read.

    Raises:
        UserError: a file does not exist.
    """

    def __init__(
        self,
        files: Sequence[ImageFile | None],
        places: Sequence[str],
        modality: ImageModality,
        on_error: OnError = "error",
    ) -> None:
        if on_error == "error":
            raise_all(
                f"{place}: {path}: no such file. Fix the path, or leave the cell empty: no image"
                for path, place in zip(files, places, strict=True)
                if isinstance(path, Path) and not path.is_file()
            )
        self.originals, self.places, self.modality = files, places, modality

    def has(self, row: int) -> bool:
        """Whether the row has an image."""
        return self.originals[row] is not None

    def read(self, row: int) -> np.ndarray:
        """(channels, height, width) uint8."""
        file = self.originals[row]
        assert file is not None  # noqa: S101 (`has` was asked)
        try:
            return read_image(file, self.modality)
        except ValueError as error:
            raise DamagedSampleError(f"{name_original(self.places[row], file)}: {error}") from error


class DamagedColumn:
    """A column of which some values could not be read from their files.

    Args:
        column: the column.
        damaged: what is wrong, by row.
    """

    def __init__(self, column: Column, damaged: Mapping[int, str]) -> None:
        self._column, self._damaged, self.modality = column, damaged, column.modality
        self.originals = originals_of(column)

    def has(self, row: int) -> bool:
        """Whether the row has a value, damaged or not."""
        return row in self._damaged or self._column.has(row)

    def read(self, row: int) -> np.ndarray:
        """The shape and dtype of the modality."""
        if row in self._damaged:
            raise DamagedSampleError(self._damaged[row])
        return self._column.read(row)


def originals_of(column: Column) -> Sequence[Any] | None:
    """(N,) what a column was made from, `ImageFile`, array or sentence, None where it is missing.

    None for columns that keep stored values only.
    """
    return getattr(column, "originals", None)


def name_original(place: str, original: Any) -> str:
    """Name of an original value for messages: that of its sample, and its path if it is a file."""
    return f"{place}: {original}" if isinstance(original, (Path, BoxedFile)) else place


def fit_image(files: Sequence[ImageFile | None], size: int, channels: int = 3) -> ImageModality:
    """Images of `size` × `size` pixels; 3 channels, or 1 for grey."""
    return ImageModality(shape=(channels, size, size), optional=None in files)


class ArrayImageColumn:
    """Images in memory, which keep their size.

    Args:
        images: (N,) array of each row, None where it is missing: (height, width), (height, width, channels)
            or (channels, height, width); uint8, or floating point in [0, 1].
        places: (N,) name of each row for messages.
        modality: size and number of channels.
    """

    def __init__(
        self, images: Sequence[np.ndarray | None], places: Sequence[str], modality: ImageModality
    ) -> None:
        self.originals, self._places, self.modality = images, places, modality

    def has(self, row: int) -> bool:
        """Whether the row has an image."""
        return self.originals[row] is not None

    def read(self, row: int) -> np.ndarray:
        """(channels, height, width) uint8.

        Raises:
            UserError: the image has another size or other values.
        """
        try:
            image = to_pixels(np.asarray(self.originals[row]))
        except ValueError as error:
            raise UserError(f"{self._places[row]}: {error}") from error
        if image.shape != self.modality.shape:
            raise UserError(f"{self._places[row]}: has shape {image.shape}, others {self.modality.shape}")
        return image


def to_pixels(image: np.ndarray) -> np.ndarray:
    """An image in memory as (channels, height, width) uint8.

    Raises:
        ValueError: its values are neither uint8 nor floating point in [0, 1].
    """
    image = channels_first(image)
    if image.dtype == np.uint8:
        return image
    if not np.issubdtype(image.dtype, np.floating) or not (image.min() >= 0 and image.max() <= 1):
        raise ValueError(
            f"{image.dtype} from {image.min()} to {image.max()}. Give uint8, or floating point in [0, 1]"
        )
    return (image * 255).round().astype(np.uint8)


def channels_first(image: np.ndarray) -> np.ndarray:
    """An image as (channels, height, width); (height, width) is grey."""
    if image.ndim == 2:
        return image[None]
    if image.ndim == 3 and image.shape[0] not in (1, 3) and image.shape[2] in (1, 3):
        return image.transpose(2, 0, 1)
    return image


class TextColumn:
    """Sentences as tokens of a vocabulary.

    Args:
        sentences: (N,) sentence of each row, None where it is missing.
        modality: vocabulary and number of tokens.
    """

    def __init__(self, sentences: Sequence[str | None], modality: TextModality) -> None:
        self.originals, self.modality = sentences, modality
        self._tokenizer = Tokenizer(modality.categories, modality.shape[0])

    def has(self, row: int) -> bool:
        """Whether the row has a sentence."""
        return self.originals[row] is not None

    def read(self, row: int) -> np.ndarray:
        """(length,) int64."""
        sentence = self.originals[row]
        assert sentence is not None  # noqa: S101 (`has` was asked)
        return self._tokenizer.encode(split_words(sentence))


def fit_text(
    sentences: Sequence[str | None], train: np.ndarray, min_count: int, max_length: int
) -> TextModality:
    """Vocabulary and length of the sentences of the train split.

    Args:
        sentences: (N,) sentence of each row, None where it is missing.
        train: rows of the train split.
        min_count: rarer words become `<unk>`.
        max_length: maximum number of tokens, `<eos>` included, a multiple of `LENGTH_STEP`; fewer if all
            sentences of the train split are shorter.
    """
    of_train = [split_words(text) for text in (sentences[row] for row in train.tolist()) if text is not None]
    longest = max((len(words) for words in of_train), default=0)
    length = min(LENGTH_STEP * math.ceil((longest + 1) / LENGTH_STEP), max_length)
    vocabulary = build_vocabulary(of_train, min_count)
    return TextModality(shape=(length,), categories=vocabulary, optional=None in sentences)


def number_column(values: np.ndarray, modality: VectorModality | BinaryModality) -> ArrayColumn:
    """A column of numbers, in the units of the data.

    Args:
        values: (N, D) float64, 0 or 1 for a binary modality; a row with NaN lacks the modality.
        modality: how the values are stored.
    """
    has = ~np.isnan(values).any(axis=1)
    return ArrayColumn(np.where(has[:, None], values, 0), has, modality)


def fit_vector(
    values: np.ndarray, names: Sequence[str] | None, train: np.ndarray, *, exact: bool = False
) -> VectorModality:
    """A vector with the means and standard deviations of the train split.

    A constant dimension, equal up to rounding errors, is not scaled: its standard deviation is stored as 1.

    Args:
        values: (N, D) float64; a row with NaN lacks the modality.
        names: (D,) names of the dimensions, if they have names.
        train: rows of the train split.
        exact: store double precision whatever the numbers.

    Raises:
        UserError: no row of the train split has all of its numbers.
    """
    has = ~np.isnan(values).any(axis=1)
    of_train = values[train[has[train]]]
    if len(of_train) == 0:
        what = ", ".join(names) if names is not None else "a vector"
        raise UserError(f"{what}: no row of the train split has all of its numbers; leave it out")
    mean, std = of_train.mean(axis=0), of_train.std(axis=0)
    largest = np.abs(of_train).max(axis=0)
    # The squares of tiny deviations are 0.
    std = np.where(std > 0, std, np.ptp(of_train, axis=0))
    std = np.where(is_constant(of_train), 1.0, std)
    single = np.finfo(np.float32)
    fits = (single.eps * largest <= _ROUNDING_ERROR * std) & (std >= single.tiny) & (largest <= _MAX_SINGLE)
    return VectorModality(
        shape=values.shape[1:],
        optional=not bool(has.all()),
        dtype="float32" if fits.all() and not exact else "float64",
        columns=None if names is None else tuple(names),
        mean=tuple(mean.tolist()),
        std=tuple(std.tolist()),
    )


def is_constant(values: np.ndarray) -> np.ndarray:
    """(D,) bool: the columns of (N, D) whose numbers are equal up to rounding errors; NaN is ignored."""
    there = values[~np.isnan(values).any(axis=1)]
    return np.ptp(there, axis=0) <= 8 * np.finfo(np.float64).eps * np.abs(there).max(axis=0)


def find_outlier(values: np.ndarray, modality: VectorModality) -> tuple[int, int, str] | None:
    """The first number that no training can standardise, because it is far from those of the train split.

    Args:
        values: (N, D) float64; a row with NaN lacks the modality.
        modality: the statistics of the train split.

    Returns:
        Its row, its dimension, and what is wrong.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        deviations = np.abs(values - np.array(modality.mean)) / np.array(modality.std)
    far = np.argwhere((deviations > _MAX_DEVIATIONS) & ~np.isnan(values).any(axis=1, keepdims=True))
    if len(far) == 0:
        return None
    row, dimension = far[0].tolist()
    return (
        row,
        dimension,
        f"{values[row, dimension]:g} is {deviations[row, dimension]:.1g} standard deviations from the mean "
        "of the train split. Fix it, or make it a missing value",
    )


def fit_binary(values: np.ndarray, names: Sequence[str]) -> BinaryModality:
    """Names of the dimensions (D,) of `values` (N, D), and whether some rows lack the modality."""
    return BinaryModality(shape=values.shape[1:], columns=tuple(names), optional=bool(np.isnan(values).any()))


def categorical_column(names: Sequence[str | None], modality: CategoricalModality) -> ArrayColumn:
    """A column of one of several names.

    Args:
        names: (N,) name of each row, None where it is missing; a name that is no category is missing, too.
        modality: the categories.
    """
    numbers = {name: number for number, name in enumerate(modality.categories)}
    values = np.array([-1 if name is None else numbers.get(name, -1) for name in names], dtype=np.int64)
    return ArrayColumn(values, values >= 0, modality)


def fit_categorical(names: Sequence[str | None], what: str) -> CategoricalModality:
    """All names as categories.

    Args:
        names: (N,) name of each row, None where it is missing.
        what: file and column, for messages.

    Raises:
        UserError: there are fewer than two.
    """
    _, categories = number_classes([name for name in names if name is not None])
    if len(categories) < 2:
        raise UserError(f"{what}: has a single value, which carries no information. Leave it out")
    return CategoricalModality(categories=categories, optional=None in names)


@dataclass(frozen=True)
class ColumnSource:
    """A data set of columns, a `Source`."""

    name: str
    columns: Mapping[str, Column]
    """By modality, N rows each."""
    splits: Splits
    labels: np.ndarray | None
    """(N,) class of each row, −1 for none; None if the data has no labels."""
    class_names: tuple[str, ...] | None
    keys: Sequence[str]
    """(N,) key of each row in the shards."""
    settings: Mapping[str, str | int | float | bool | None]
    groups: Sequence[str] | None = None
    """(N,) name of the group of each row; None if rows have no groups."""
    table: TableSchema | None = None
    """How the rows of a table were read; None for other data."""

    @property
    def modalities(self) -> dict[str, Modality]:
        """The modality of each column."""
        return {name: column.modality for name, column in self.columns.items()}

    @property
    def split_sizes(self) -> dict[SplitName, int]:
        """Number of rows of each split."""
        return {split: len(rows) for split, rows in self.splits.items()}

    def sample(self, split: SplitName, index: int) -> Sample:
        """Row number `index` of `split`."""
        row = int(self.splits[split][index])
        return Sample(
            read_row(self.columns, row),
            label=None if self.labels is None or self.labels[row] < 0 else int(self.labels[row]),
            key=self.keys[row],
            group=None if self.groups is None else self.groups[row],
        )


def read_image(file: ImageFile, modality: Modality) -> np.ndarray:
    """Read the largest square, or rectangle of the modality's proportions, in the middle of an image file.

    Of a `BoxedFile` it reads the square around the box instead.

    Returns:
        (channels, height, width) uint8.

    Raises:
        ValueError: the file is not an image, or has more than 8 bits per channel.
    """
    channels, height, width = modality.shape
    image = open_image(file, "L" if channels == 1 else "RGB")
    size, filter_ = (width, height), Image.Resampling.LANCZOS
    if isinstance(file, BoxedFile):
        pixels = np.asarray(image.resize(size, filter_, square_around(file.box, image.size)))
    else:
        pixels = np.asarray(ImageOps.fit(image, size, filter_))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def open_image(file: ImageFile, mode: str) -> Image.Image:
    """Read an image file; it is rotated as its EXIF data says, transparent pixels become white.

    Args:
        file: the file.
        mode: mode of Pillow, `L` or `RGB`.

    Raises:
        ValueError: the file is not an image, or has more than 8 bits per channel.
    """
    try:
        with Image.open(io.BytesIO(file.read_bytes()), formats=IMAGE_FORMATS) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"has mode {image.mode}, more than 8 bits per channel. Save it with 8 bits")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                # The colour of fully transparent pixels is arbitrary.
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert(mode)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        # Pillow's own message names an address in memory.
        what = "unknown format" if isinstance(error, UnidentifiedImageError) else error
        raise ValueError(
            f"cannot be read as an image ({what}). Replace it; supported formats are "
            f"{', '.join(IMAGE_FORMATS)}"
        ) from error


def number_classes(names: Sequence[str | None]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Number class names in alphabetical order, or by value if all names are numbers.

    Returns:
        (N,) int64 number of each name, −1 for None, and the name of each number.
    """
    found = {name for name in names if name is not None}

    def value(name: str) -> tuple[float, str]:
        number = float(name)
        if math.isnan(number):  # has no place in an order
            raise ValueError
        return number, name

    try:
        class_names = tuple(sorted(found, key=value))
    except ValueError:
        class_names = tuple(sorted(found))
    numbers: dict[str | None, int] = {name: number for number, name in enumerate(class_names)}
    return np.array([numbers.get(name, -1) for name in names], dtype=np.int64), class_names


def resolve_inside(folder: Path, text: str) -> Path:
    """A path from a data file: absolute, or relative to the folder of that file.

    Backslashes, as Windows writes them, separate folders if there is no file of that name.

    Raises:
        ValueError: a relative path leads out of the folder.
    """
    if "\\" in text and not (folder / text).exists():
        text = text.replace("\\", "/")
    inside = os.path.normpath(text)
    if inside == os.pardir or inside.startswith(os.pardir + os.sep):
        raise ValueError(f"{text} leads out of {folder}. Write an absolute path if this is intended")
    return folder / inside
