"""The index of a packed data set, `index.json`: its modalities, splits and shards.

This module imports neither torch nor webdataset, so that a wrong path or a missing modality is reported
in the first second.
"""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from cmvae.data.remote import Location, is_remote, read_file
from cmvae.modalities import AnyModality, Modality, ModalityName
from cmvae.modalities.base import NAME_PATTERN
from cmvae.utils.errors import UserError

INDEX_NAME = "index.json"
TABLE_NAME = "table.json"
"""The `TableSchema` of a run, in its folder."""
CLASSIFIERS_FOLDER = "classifiers"
FORMAT_VERSION: Final = 1
# Fields of a modality that may differ between the data of a model and other data.
_FREE_FIELDS: dict[str, bool | set[str]] = {
    **dict.fromkeys(("optional", "mean", "std", "dtype"), True),
    "embedding": {"of", "weights", "version"},
}
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.tar")
_CLASSIFIER_FILE = re.compile(rf"{CLASSIFIERS_FOLDER}/{NAME_PATTERN}\.safetensors")


def _check_shard_name(name: str) -> str:
    # Shards are in the folder of their index. A name with a slash or `..` could open any file.
    if not _SHARD_NAME.fullmatch(name):
        raise ValueError(f"shard name {name!r} must be a plain file name that ends in .tar")
    return name


def _check_classifier_file(file: str) -> str:
    if not _CLASSIFIER_FILE.fullmatch(file):
        raise ValueError(f"classifier file {file!r} must be {CLASSIFIERS_FOLDER}/MODALITY.safetensors")
    return file


ShardName = Annotated[str, AfterValidator(_check_shard_name)]
ClassifierFile = Annotated[str, AfterValidator(_check_classifier_file)]
SplitName = Literal["train", "validation", "test"]
OnError = Literal["error", "skip"]
"""What to do about a damaged sample."""


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ShardSchema(_Schema):
    """One tar file, in the folder of the index."""

    name: ShardName
    num_samples: int = Field(ge=1)
    num_bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ShardTableSchema(_Schema):
    """The file that lists the shards of a large split; see `cmvae.data.shard_table`."""

    name: str = Field(pattern=r"^(train|validation|test)\.shards$")
    num_shards: int = Field(ge=1)
    shard_bytes: int = Field(ge=1)
    """Number of bytes of all shards together."""
    num_bytes: int = Field(ge=1)
    """Number of bytes of this file."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class SplitSchema(_Schema):
    """The shards of one split, in the order in which they were written."""

    num_samples: int = Field(ge=1)
    shards: tuple[ShardSchema, ...] = ()
    """Empty if `shard_table` lists them; `cmvae.data.shard_table.open_shards` reads either."""
    shard_table: ShardTableSchema | None = None
    num_groups: int = Field(default=0, ge=0)
    """Number of groups of its samples; 0 if no sample has a group, and batches have no groups then."""

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.shards) if self.shard_table is None else self.shard_table.num_shards

    @property
    def num_bytes(self) -> int:
        """Number of bytes of all shards together."""
        if self.shard_table is not None:
            return self.shard_table.shard_bytes
        return sum(shard.num_bytes for shard in self.shards)

    @model_validator(mode="after")
    def _counts_agree(self) -> SplitSchema:
        if self.shard_table is not None:
            if self.shards:
                raise ValueError("has both shards and shard_table")
            return self
        total = sum(shard.num_samples for shard in self.shards)
        if total != self.num_samples:
            raise ValueError(f"num_samples is {self.num_samples}, but its shards have {total}")
        return self


class ClassifierSchema(_Schema):
    """The classifier of one image modality for evaluation, trained on these shards."""

    file: ClassifierFile
    """Path relative to the folder of the index."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    width: int = Field(ge=1)
    """Number of channels of its first convolution."""
    epochs: int = Field(ge=1)
    seed: int = Field(ge=0)
    accuracy: float = Field(ge=0, le=1)
    """On the test split."""


class TableSchema(_Schema):
    """How the rows of a table become samples; new rows for a trained model are read in the same way."""

    columns: dict[ModalityName, tuple[str, ...]]
    """Names of the columns of each modality."""
    key: str | None = None
    """Column of the keys; None names samples by their row."""
    group: str | None = None
    """Column of the groups; None if rows have no groups."""
    na: tuple[str, ...] = ()
    """Texts of an empty cell, in addition to none."""
    separator: str | None = None
    """Separator of a CSV file; None finds it in the file."""
    decimal: Literal[".", ","] = "."
    """Decimal separator of numbers."""
    dates: dict[ModalityName, str | None] = {}
    """Modalities that are dates, and their form as `datetime.strptime` takes it; None is ISO 8601."""


class ShardIndex(_Schema):
    """`index.json`: all that a reader needs before it opens a tar."""

    format_version: Literal[1] = FORMAT_VERSION
    name: str
    source: dict[str, str | int | float | bool | None]
    """Origin of the data and settings of its packing, for people."""
    modalities: dict[ModalityName, AnyModality]
    class_names: tuple[str, ...] | None
    """Names of the labels 0, 1, …; null if the data has no labels."""
    partly_labelled: bool = False
    """Whether samples may lack a label."""
    splits: dict[SplitName, SplitSchema]
    classifiers: dict[ModalityName, ClassifierSchema] = {}
    """By modality; `cmvae classifiers` adds them to an existing index."""
    table: TableSchema | None = None
    """The table that the samples come from; null for other sources."""

    @classmethod
    def load(cls, location: Location) -> ShardIndex:
        """Read the `index.json` of a folder or a URL.

        Raises:
            UserError: the index is missing or damaged, or cannot be downloaded.
        """
        try:
            return cls.model_validate_json(read_file(location, INDEX_NAME))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(_missing_index(location)) from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the file"
            raise UserError(
                f"{location}/{INDEX_NAME}: {where}: {first['msg']}. Pack the data set again with this "
                "version of cmvae pack"
            ) from error

    @property
    def digest(self) -> str:
        """SHA-256 of the names and contents of all shards; classifiers do not change it."""
        shards = [
            (split, file.name, file.sha256)
            for split, of in self.splits.items()
            for file in (of.shards if of.shard_table is None else [of.shard_table])
        ]
        return hashlib.sha256(json.dumps([self.name, shards]).encode()).hexdigest()

    def split(self, name: str, location: Location) -> SplitSchema:
        """The split `name`; `location` is for the error message.

        Raises:
            UserError: the data set has no such split.
        """
        for known, split in self.splits.items():
            if known == name:
                return split
        raise UserError(f"{location}: no split {name!r}; it has {', '.join(self.splits)}")

    def check_modalities(self, trained_on: Mapping[str, Modality], location: Location) -> None:
        """Check that the data has the modalities that a model was trained on.

        Args:
            trained_on: modalities of the model, by name.
            location: location of the data set, for the error message.

        Raises:
            UserError: a modality is missing, or has another kind, shape, dtype or names.
        """
        path = f"{location}/{INDEX_NAME}"
        for name, expected in trained_on.items():
            found = self.modalities.get(name)
            if found is None:
                raise UserError(
                    f"{path}: modalities: no {name!r}, only {', '.join(self.modalities)}. Pack a data set "
                    "with this modality, or do without it"
                )
            present = found.model_dump(exclude=_FREE_FIELDS)
            # `kind` is compared first: a modality of another kind has other fields.
            for key, before in expected.model_dump(exclude=_FREE_FIELDS).items():
                if before != (now := present[key]):
                    raise UserError(
                        f"{path}: modalities.{name}.{key}: {_shorten(now)}, but the model was trained on "
                        f"{_shorten(before)}. Pack new rows of a table with --like RUN, or train a "
                        "model on this data"
                    )


def _missing_index(location: Location) -> str:
    if is_remote(location):
        return (
            f"{location}: has no {INDEX_NAME}. Give the URL of a copy of a whole folder that cmvae pack wrote"
        )
    if not Path(location).is_dir():
        return (
            f"{location}: no such shard folder. Pack a data set first, "
            f"for example: cmvae pack digits --out {location}"
        )
    return (
        f"{location}/{INDEX_NAME}: missing, so packing was not finished (it may have been interrupted). Run "
        f"cmvae pack again with --out {location}; if it was packed with --part, cmvae pack join {location}"
    )


def _shorten(value: object) -> str:
    """Shorten a value for a message: a vocabulary has thousands of words."""
    return textwrap.shorten(str(value), 160, placeholder=" …")
