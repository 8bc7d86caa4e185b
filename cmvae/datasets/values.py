"""Values of samples before they are stored, and the modality that fits them or that they must fit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from cmvae.data.index import OnError
from cmvae.datasets.columns import (
    ArrayImageColumn,
    Column,
    ImageColumn,
    TextColumn,
    categorical_column,
    channels_first,
    find_outlier,
    fit_binary,
    fit_categorical,
    fit_image,
    fit_text,
    fit_vector,
    number_column,
)
from cmvae.datasets.embedding import embed_column
from cmvae.modalities import (
    BinaryModality,
    CategoricalModality,
    ImageModality,
    Modality,
    TextModality,
    VectorModality,
)
from cmvae.modalities.tokenizer import split_words
from cmvae.utils.errors import UserError

Kind = Literal["image", "text", "vector", "binary", "categorical"]

_MAX_EXAMPLES = 5


@dataclass(frozen=True)
class Values:
    """One modality of N samples, as given."""

    kind: Kind
    data: np.ndarray | list[Any]
    """vector, binary: (N, D) float64, NaN where missing. text, categorical: N str or None. image: N arrays
    (height, width) or with channels first or last, or N `ImageFile`s, or None."""
    names: tuple[str, ...] | None = None
    """Names of the D dimensions."""
    places: Sequence[str] | None = None
    """N names of the samples in messages."""
    exact: bool = False
    """Whether numbers are stored in double precision whatever they are."""

    def __len__(self) -> int:
        return len(self.data)

    @property
    def present(self) -> np.ndarray:
        """(N,) bool, whether each sample has this modality."""
        if isinstance(self.data, np.ndarray):
            return ~np.isnan(self.data).any(axis=1)
        return np.array([value is not None for value in self.data])

    def at(self, rows: np.ndarray) -> Values:
        """The values of some rows; without their places."""
        data = self.data[rows] if isinstance(self.data, np.ndarray) else [self.data[row] for row in rows]
        return replace(self, data=data, places=None)

    @property
    def are_files(self) -> bool:
        """Whether the values are files of images."""
        return any(hasattr(value, "read_bytes") for value in self.data)


@dataclass(frozen=True)
class FitSettings:
    """Settings of modalities that are made from data."""

    image_size: int = 64
    """Height and width of images from files."""
    channels: int = 3
    """Channels of images from files: 1 for grey, 3 for colour."""
    min_count: int = 3
    """Words that are rarer in the train split become `<unk>`."""
    text_length: int = 32
    """Maximum number of tokens of a text."""


def fit_modality(name: str, values: Values, train: np.ndarray, settings: FitSettings) -> Modality:
    """The modality of values; statistics and vocabulary come from the rows `train`.

    Args:
        name: what the values are, for messages.
        values: values of N samples.
        train: rows of the train split.
        settings: settings of the modality.

    Raises:
        UserError: the values do not make a modality.
    """
    data: Any = values.data
    if values.kind == "vector":
        return _fit_vector(name, values, train)
    if values.kind == "binary":
        return fit_binary(data, values.names or tuple(str(index) for index in range(data.shape[1])))
    if values.kind == "text":
        return fit_text(data, train, settings.min_count, settings.text_length)
    if values.kind == "categorical":
        return fit_categorical(data, name)
    if values.are_files:
        return fit_image(data, settings.image_size, settings.channels)
    first = next((image for image in data if image is not None), None)
    if first is None:
        raise UserError(f"{name}: all images are missing. Leave it out")
    return ImageModality(
        shape=channels_first(np.asarray(first)).shape, optional=not bool(values.present.all())
    )


def _fit_vector(name: str, values: Values, train: np.ndarray) -> VectorModality:
    data = np.asarray(values.data)
    modality = fit_vector(data, values.names, train, exact=values.exact)
    outlier = find_outlier(data, modality)
    if outlier is not None:
        row, dimension, problem = outlier
        place = f"{name}: sample {row}" if values.places is None else values.places[row]
        raise UserError(f"{place}, column {modality.column_names[dimension]}: {problem}")
    return modality


def make_column(name: str, values: Values, modality: Modality, on_error: OnError = "error") -> Column:
    """The values as a column of a modality, which may come from other data.

    Words that the modality does not know become `<unk>`, categories that it does not know are missing; see
    `count_unknown`. Where a pretrained network made the modality, it computes the numbers from images or
    sentences.

    Raises:
        UserError: they are of another kind or have another number of dimensions, or the network is not
            available.
    """
    if isinstance(modality, VectorModality) and modality.embedding is not None and values.kind != "vector":
        return embed_column(list(values.data), _places(name, values), modality, on_error)
    if values.kind != modality.kind:
        raise UserError(f"{name}: is of kind {values.kind}, but the model was trained on {modality.kind}")
    data: Any = values.data
    if isinstance(modality, (VectorModality, BinaryModality)):
        if data.shape[1] != modality.shape[0]:
            raise UserError(
                f"{name}: has {data.shape[1]} dimensions, but the model was trained on {modality.shape[0]}"
            )
        return number_column(data, modality)
    if isinstance(modality, TextModality):
        return TextColumn(data, modality)
    if isinstance(modality, CategoricalModality):
        return categorical_column(data, modality)
    assert isinstance(modality, ImageModality)  # noqa: S101 (there are no other kinds)
    if values.are_files:
        return ImageColumn(data, _places(name, values), modality, on_error)
    return ArrayImageColumn(data, _places(name, values), modality)


def _places(name: str, values: Values) -> Sequence[str]:
    return values.places or [f"{name}: sample {row}" for row in range(len(values))]


class Unknown(NamedTuple):
    """Words or categories of some samples that a modality does not know."""

    number: int
    """How many there are, counted as often as they occur."""
    total: int
    """Number of all words or categories."""
    examples: tuple[str, ...]
    """A few, each once."""

    def merged(self, other: Unknown) -> Unknown:
        """Of the samples of both."""
        examples = tuple(dict.fromkeys((*self.examples, *other.examples)))[:_MAX_EXAMPLES]
        return Unknown(self.number + other.number, self.total + other.total, examples)


def count_unknown(values: Values, modality: Modality) -> Unknown:
    """Count the words or categories that a modality does not know; none for other kinds of modalities."""
    if isinstance(modality, TextModality):
        texts = (text for text in values.data if text is not None)
        counts = Counter(word for text in texts for word in split_words(text))
    elif isinstance(modality, CategoricalModality):
        counts = Counter(name for name in values.data if name is not None)
    else:
        return Unknown(0, 0, ())
    total = counts.total()
    for known in modality.categories:
        del counts[known]
    examples = tuple(word for word, _ in counts.most_common(_MAX_EXAMPLES))
    return Unknown(counts.total(), total, examples)


def count_cut(values: Values, modality: TextModality) -> int:
    """Number of texts with more words than the modality has tokens."""
    return sum(len(split_words(text)) >= modality.shape[0] for text in values.data if text is not None)


def describe_unknown(name: str, unknown: Unknown, modality: Modality) -> str | None:
    """What a user is told about unknown words or categories of a modality; None if there are none."""
    if not unknown.number:
        return None
    kind, becomes = ("words", "<unk>") if isinstance(modality, TextModality) else ("categories", "missing")
    return (
        f"{name}: {unknown.number:,} of {unknown.total:,} {kind} are unknown to the model and read as "
        f"{becomes}, for example {', '.join(map(repr, unknown.examples))}"
    )
