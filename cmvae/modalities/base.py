"""What a modality is: how a value is stored in a shard, given to a model, and shown to people.

No module of this package imports torch at import time, so that an error in an index is reported in the first
second. A new kind of modality is one file here and one entry in `cmvae.modalities.AnyModality`; see
docs/extending.md.
"""

from __future__ import annotations

import io
import re
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, PositiveInt, field_validator, model_validator
from typing_extensions import Self, override

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

LikelihoodName = Literal["normal", "laplace", "bernoulli", "categorical"]
MetricName = Literal["generative", "text", "prediction"]
"""`generative`: coherence and distances, from image classifiers and Inception. `text`: comparison of words.
`prediction`: comparison of generated and real values, value by value."""

NAME_PATTERN = r"[a-z][a-z0-9_]*"
# Members of a tar sample that are not modalities, and keys of a batch that are not modalities.
RESERVED_NAMES = frozenset(
    {"cls", "group", "group_name", "key", "label", "mask", "position", "skipped", "valid"}
)


def check_name(name: str) -> str:
    """Return the name of a modality if it is valid.

    Raises:
        ValueError: it has other characters, or is reserved.
    """
    if not re.fullmatch(NAME_PATTERN, name) or name in RESERVED_NAMES:
        raise ValueError(
            f"modality name {name!r} must be lower-case letters, digits and '_', begin with a letter, "
            f"and be none of {sorted(RESERVED_NAMES)}"
        )
    return name


ModalityName = Annotated[str, AfterValidator(check_name)]


class Modality(BaseModel, ABC):
    """One modality of a data set, an entry of `index.json`; a subclass per kind.

    A value has two forms. Stored: a NumPy array as in a shard, of `shape` and `dtype`, in the units of the
    data. Data: a tensor of the same shape that encoders take, likelihoods compare with and models generate.
    `to_stored` and `to_text` take data; the other methods take stored values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    suffix: ClassVar[str]
    """Ending of its member in a tar, `KEY.MODALITY.suffix`."""
    likelihoods: ClassVar[tuple[LikelihoodName, ...]]
    """Families of p(x | z, w) that fit it; the first is the default."""
    network: ClassVar[str]
    """Default encoder and decoder, a name from `cmvae.models.networks.NETWORKS`."""
    metrics: ClassVar[frozenset[MetricName]] = frozenset()
    """Groups of metrics that apply to it, besides those that only need the latents."""
    in_words: ClassVar[bool] = False
    """Whether samples are logged as text, too."""

    kind: str
    """Selects the subclass."""
    shape: tuple[int, ...]
    """Shape of one sample."""
    dtype: str
    """NumPy dtype of a stored value."""
    optional: bool = False
    """Whether samples may lack it."""

    @property
    def num_categories(self) -> int:
        """Number of categories that stored integers index; 0 if values are numbers."""
        return 0

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        """Shape of a decoder's output for one sample: the parameters of the likelihood."""
        return self.shape

    @property
    def drawn_size(self) -> tuple[float, float]:
        """Width and height, in inches, that `draw` needs to be legible."""
        return 0.6, 0.4

    @property
    def table_columns(self) -> tuple[str, ...]:
        """Header of a table of values; empty if each value is written to a file of its own."""
        return ()

    @abstractmethod
    def encode(self, stored: np.ndarray) -> bytes:
        """The member of a tar for one stored value."""

    @abstractmethod
    def decode(self, content: bytes) -> np.ndarray:
        """The stored value that `encode` was given.

        Raises:
            ValueError: the content is damaged or does not fit this modality.
        """

    @abstractmethod
    def to_data(self, stored: Tensor) -> Tensor:
        """Stored values (B, *shape), on the device of the model, as data (B, *shape)."""

    @abstractmethod
    def to_stored(self, data: Tensor | np.ndarray) -> np.ndarray:
        """Data (..., *shape), such as what `CMVAE.generate` returns, as stored values (..., *shape)."""

    @abstractmethod
    def draw(self, ax: Axes, stored: np.ndarray) -> None:
        """Draw one stored value (*shape) into an axis without ticks."""

    @abstractmethod
    def describe(self, stored: np.ndarray) -> str:
        """One stored value (*shape) in one line of text."""

    def table_cells(self, stored: np.ndarray) -> tuple[str, ...]:
        """One stored value (*shape) as a row of a table, one cell per entry of `table_columns`."""
        return (self.describe(stored),)

    def to_text(self, data: Tensor | np.ndarray) -> str:
        """One sample of data (*shape), such as a row of what `CMVAE.generate` returns, in one line of text.

        Numbers are in the units of the data set, not standardised.
        """
        return self.describe(self.to_stored(data))


def as_array(data: Tensor | np.ndarray) -> np.ndarray:
    """Data as a NumPy array; a tensor is detached and copied to the CPU."""
    return np.asarray(data) if isinstance(data, np.ndarray | np.generic) else data.detach().cpu().numpy()


class ArrayModality(Modality):
    """A modality that is stored as a NumPy file; pickles are refused when reading."""

    suffix = "npy"

    @override
    def encode(self, stored: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, np.asarray(stored, dtype=self.dtype, order="C"), allow_pickle=False)
        return buffer.getvalue()

    @override
    def decode(self, content: bytes) -> np.ndarray:
        try:
            stored = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"cannot be read as a NumPy array ({error})") from error
        if not isinstance(stored, np.ndarray) or stored.shape != self.shape or stored.dtype != self.dtype:
            found = f"{getattr(stored, 'dtype', 'an archive')} of shape {getattr(stored, 'shape', '?')}"
            raise ValueError(f"{found}, its index says {self.dtype} of shape {self.shape}")
        self.check_values(stored)
        return stored

    @abstractmethod
    def check_values(self, stored: np.ndarray) -> None:
        """Refuse values that this modality cannot have.

        Raises:
            ValueError: the array has such values.
        """


class CategoriesModality(ArrayModality):
    """Integers that index `categories`."""

    likelihoods = ("categorical",)
    in_words = True

    dtype: Literal["int64"] = "int64"
    categories: tuple[str, ...]
    """Names of the categories, or words of the vocabulary."""

    @field_validator("categories")
    @classmethod
    def _check_categories(cls, categories: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(categories)) != len(categories):
            raise ValueError("a name is there twice")
        return categories

    @property
    @override
    def num_categories(self) -> int:
        return len(self.categories)

    @property
    @override
    def parameter_shape(self) -> tuple[int, ...]:
        """Logits of every category at every position."""
        return (*self.shape, len(self.categories))

    @property
    @override
    def table_columns(self) -> tuple[str, ...]:
        return (self.kind,)

    @override
    def check_values(self, stored: np.ndarray) -> None:
        if stored.min() < 0 or stored.max() >= len(self.categories):
            raise ValueError(f"{stored.min()}..{stored.max()}, its index has {len(self.categories)} names")

    @override
    def to_data(self, stored: Tensor) -> Tensor:
        """The same integers, int64."""
        return stored

    @override
    def to_stored(self, data: Tensor | np.ndarray) -> np.ndarray:
        return as_array(data).astype(np.int64)


class ColumnsModality(ArrayModality):
    """Several named numbers, one per column of a table."""

    network = "mlp"
    metrics = frozenset({"prediction"})

    shape: tuple[PositiveInt]
    columns: tuple[str, ...] | None = None
    """Names of the dimensions, if they have names."""

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        self.check_lengths("columns")
        return self

    def check_lengths(self, *keys: str) -> None:
        """Refuse fields that do not have one entry per dimension.

        Raises:
            ValueError: a field that is not None has another number of entries.
        """
        for key in keys:
            values = getattr(self, key)
            if values is not None and len(values) != self.shape[0]:
                raise ValueError(f"{key}: must have one entry for each of the {self.shape[0]} dimensions")

    @property
    def column_names(self) -> tuple[str, ...]:
        """Names of the dimensions; their indices if they have no names."""
        return self.columns or tuple(str(index) for index in range(self.shape[0]))

    @property
    @override
    def table_columns(self) -> tuple[str, ...]:
        return self.column_names

    @override
    def table_cells(self, stored: np.ndarray) -> tuple[str, ...]:
        return tuple(str(value) for value in stored)
