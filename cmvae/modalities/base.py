"""What a kind of modality is: how a value lies in a shard, reaches a model, and is shown to people.

No module of this package imports torch, so that what is wrong with an index is reported in the first second.
A new kind is one file here and one line in `cmvae.modalities.KINDS`; docs/extending.md shows one.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

    from cmvae.data.index import ModalitySchema

LikelihoodName = Literal["normal", "laplace", "bernoulli", "categorical"]
MetricName = Literal["generative", "text", "prediction"]
"""`generative`: image classifiers and Inception read it, for coherence and distances. `text`: it is read as
words. `prediction`: what is generated can be compared with what is there, value by value."""


class Kind(ABC):
    """One kind of modality.

    A value has three forms: stored, a numpy array as it lies in a shard; data, a tensor that encoders take
    and likelihoods compare with; and something for people to look at.
    """

    name: ClassVar[str]
    dtype: ClassVar[str]
    """Of the stored array."""
    suffix: ClassVar[str]
    """Ending of its member in a tar, `KEY.MODALITY.suffix`."""
    likelihoods: ClassVar[tuple[LikelihoodName, ...]]
    """Families of p(x | z, w) that fit it; the first is the default."""
    network: ClassVar[str]
    """Default encoder and decoder, a name from `cmvae.models.networks.NETWORKS`."""
    metrics: ClassVar[frozenset[MetricName]] = frozenset()
    """Groups of metrics that can be computed of it, besides those that need the latents only."""
    in_words: ClassVar[bool] = False
    """Whether a value is read rather than looked at: what is generated is then written down, too."""

    @abstractmethod
    def check(self, schema: ModalitySchema) -> None:
        """Refuse a schema that is none of this kind.

        Raises:
            ValueError: with what is wrong.
        """

    @abstractmethod
    def encode(self, stored: np.ndarray) -> bytes:
        """The member of a tar."""

    @abstractmethod
    def decode(self, content: bytes, schema: ModalitySchema) -> np.ndarray:
        """What `encode` was given.

        Raises:
            ValueError: the content is damaged or not of this schema.
        """

    @abstractmethod
    def to_data(self, stored: Tensor, schema: ModalitySchema) -> Tensor:
        """A stored batch (B, *shape), on the device of the model, as data (B, *shape)."""

    @abstractmethod
    def to_stored(self, data: np.ndarray, schema: ModalitySchema) -> np.ndarray:
        """Data (B, *shape), such as what a model generates, as it would be stored."""

    @abstractmethod
    def draw(self, ax: Axes, stored: np.ndarray, schema: ModalitySchema) -> None:
        """Draw one value into an axis without ticks."""

    def drawn_size(self, schema: ModalitySchema) -> tuple[float, float]:
        """Width and height, in inches, that `draw` needs to be legible."""
        return 0.6, 0.4

    @abstractmethod
    def to_text(self, stored: np.ndarray, schema: ModalitySchema) -> str:
        """One value in one line, for tables."""

    def table_columns(self, schema: ModalitySchema) -> tuple[str, ...]:
        """Headings of a table of values; none where each value is a file of its own, as in a shard."""
        return ()

    def table_cells(self, stored: np.ndarray, schema: ModalitySchema) -> tuple[str, ...]:
        """One value in such a table, as many cells as there are columns."""
        return (self.to_text(stored, schema),)

    def parameter_shape(self, schema: ModalitySchema) -> tuple[int, ...]:
        """Shape of what a decoder makes of one sample: the parameters of the likelihood."""
        return schema.shape


def column_names(schema: ModalitySchema) -> tuple[str, ...]:
    """Names of the dimensions of a vector; their places where they have none."""
    return schema.columns or tuple(str(place) for place in range(schema.shape[0]))


class ArrayKind(Kind):
    """A kind that lies in a shard as a NumPy file; pickles are refused on reading."""

    suffix = "npy"

    def encode(self, stored: np.ndarray) -> bytes:
        """As `Kind.encode`."""
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(stored, dtype=self.dtype, order="C"), allow_pickle=False)
        return buffer.getvalue()

    def decode(self, content: bytes, schema: ModalitySchema) -> np.ndarray:
        """As `Kind.decode`."""
        try:
            stored = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"cannot be read as a NumPy array ({error})") from error
        if not isinstance(stored, np.ndarray) or stored.shape != schema.shape or stored.dtype != self.dtype:
            found = f"{getattr(stored, 'dtype', 'an archive')} of shape {getattr(stored, 'shape', '?')}"
            raise ValueError(f"{found}, its index says {self.dtype} of shape {schema.shape}")
        self.check_values(stored, schema)
        return stored

    def check_values(self, stored: np.ndarray, schema: ModalitySchema) -> None:
        """Refuse values that this kind cannot have.

        Raises:
            ValueError: with what is wrong.
        """
        if schema.categories is not None and (stored.min() < 0 or stored.max() >= len(schema.categories)):
            raise ValueError(f"{stored.min()}..{stored.max()}, its index has {len(schema.categories)} names")


class ColumnsKind(ArrayKind):
    """A kind of several named numbers, one a column of a table."""

    network = "mlp"
    metrics = frozenset({"prediction"})

    def check(self, schema: ModalitySchema) -> None:
        """As `Kind.check`."""
        if len(schema.shape) != 1 or schema.shape[0] < 1:
            raise ValueError(f"shape {schema.shape} is no (dimensions,)")
        check_lengths(schema, columns=schema.columns)

    def table_columns(self, schema: ModalitySchema) -> tuple[str, ...]:
        """As `Kind.table_columns`: one a dimension."""
        return column_names(schema)

    def table_cells(self, stored: np.ndarray, schema: ModalitySchema) -> tuple[str, ...]:
        """As `Kind.table_cells`."""
        return tuple(str(value) for value in stored)


def check_lengths(schema: ModalitySchema, **entries: Sequence[object] | None) -> None:
    """Refuse what has not one entry a dimension, where it is given.

    Raises:
        ValueError: with the key.
    """
    for key, values in entries.items():
        if values is not None and len(values) != schema.shape[0]:
            raise ValueError(f"{key}: must have one entry for each of the {schema.shape[0]} dimensions")
