"""Flags and checks that the sources of users' own data share."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cmvae.datasets.base import DamagedSampleError
from cmvae.datasets.columns import LENGTH_STEP, Column, is_constant, number_classes
from cmvae.datasets.embedding import add_embed_arguments
from cmvae.datasets.splits import DEFAULT_FRACTIONS, fractions
from cmvae.datasets.values import (
    FitSettings,
    Unknown,
    Values,
    count_cut,
    count_unknown,
    fit_modality,
    make_column,
)
from cmvae.modalities import RESERVED_NAMES, TextModality, VectorModality
from cmvae.utils.arguments import positive_integer
from cmvae.utils.errors import UserError, raise_all

S = TypeVar("S")
T = TypeVar("T")
_SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
}
_FIT = FitSettings()
SETTINGS: Mapping[str, Any] = {
    "fractions": DEFAULT_FRACTIONS,
    **asdict(_FIT),
    "config": None,
    "embed": [],
    "embed_only": False,
}
"""Flags about training data and their defaults."""
MAX_KEY_LENGTH = 80
_KEY = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_KEY_LENGTH}}}")
_MAX_EXAMPLES = 5
"""Number of examples in a message."""


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that do not depend on the form of the data."""
    parser.add_argument("--name", help="name of the data set and its config (default: that of --out)")
    parser.add_argument(
        "--fractions",
        type=fractions,
        default=SETTINGS["fractions"],
        metavar="TRAIN,VALIDATION,TEST",
        help="shares of the splits, drawn with --seed and stratified by label (default: 0.8,0.1,0.1)",
    )
    parser.add_argument(
        "--image-size",
        type=positive_integer,
        default=_FIT.image_size,
        metavar="PIXELS",
        help="the middle square of every image is resized to this height and width (default: 64)",
    )
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), default=_FIT.channels, help="1: grey; 3: colour (default: 3)"
    )
    parser.add_argument(
        "--min-count",
        type=positive_integer,
        default=_FIT.min_count,
        metavar="N",
        help="words that are rarer in the train split become <unk> (default: 3)",
    )
    parser.add_argument(
        "--text-length",
        type=_text_length,
        default=_FIT.text_length,
        metavar="N",
        help="maximum number of words per text, one of which is its end; a multiple of "
        f"{LENGTH_STEP} (default: 32)",
    )
    parser.add_argument(
        "--on-error",
        choices=("error", "skip"),
        default="error",
        help="skip: leave out samples with a missing or damaged file, and list them in skipped.txt beside "
        "the shards (default: error)",
    )
    add_config_argument(parser)
    add_embed_arguments(parser)


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--config`."""
    parser.add_argument(
        "--config",
        type=Path,
        metavar="PATH",
        help="write the starter config to this file instead of printing it",
    )


def fit_settings(arguments: argparse.Namespace) -> FitSettings:
    """The settings of modalities that the flags give."""
    return FitSettings(**{name: getattr(arguments, name) for name in asdict(_FIT)})


def _text_length(text: str) -> int:
    length = positive_integer(text)
    if length % LENGTH_STEP:
        raise argparse.ArgumentTypeError(f"{text} is not a multiple of {LENGTH_STEP}")
    return length


def read_split(text: str) -> str:
    """The split that a cell names.

    Raises:
        ValueError: the cell names no split.
    """
    split = _SPLIT_NAMES.get(text.strip().lower())
    if split is None:
        raise ValueError(f"{text!r} is not a split. Write train, validation or test")
    return split


def make_name(text: str, kind: str) -> str:
    """Make a modality's name from that of a column or folder: lower-case letters, digits and `_`."""
    name = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
    return name if name[:1].isalpha() and name not in RESERVED_NAMES else f"{kind}_{name}".rstrip("_")


def make_keys(stems: Sequence[str]) -> list[str]:
    """Keys like the names of files; a part of the SHA-256 tells apart those that would be equal."""
    # A key ends at the first dot of a member's name, and plain names are safest in a tar.
    plain = [re.sub(r"[^A-Za-z0-9_-]", "_", stem) for stem in stems]
    counts = Counter(plain)
    return [
        key
        if counts[key] == 1 and len(key) <= MAX_KEY_LENGTH
        else f"{key[: MAX_KEY_LENGTH - 17]}-{hashlib.sha256(stem.encode()).hexdigest()[:16]}"
        for key, stem in zip(plain, stems, strict=True)
    ]


def read_labels(names: Sequence[str | None], what: str) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class (N,) of each row, −1 for none, and the names of the classes; reports rows without one on stderr.

    Args:
        names: (N,) class of each row, None where it has none.
        what: file and column, for messages.

    Raises:
        UserError: no row has a class.
    """
    labels, class_names = number_classes(names)
    num_lacking = int((labels < 0).sum())
    if num_lacking == len(labels):
        raise UserError(f"{what}: no row has a label. Fill in some, or do not use it")
    if num_lacking:
        print(
            f"note: {num_lacking:,} of {len(labels):,} samples have no label; metrics count the others",
            file=sys.stderr,
        )
    return labels, class_names


def check_keys(keys: Sequence[str], places: Sequence[str]) -> None:
    """Check that keys are valid in a shard and differ.

    Args:
        keys: (N,) key of each row.
        places: (N,) name of each row for messages.

    Raises:
        UserError: a key is invalid or occurs twice.
    """
    seen: dict[str, str] = {}
    problems = []
    for key, place in zip(keys, places, strict=True):
        if not _KEY.fullmatch(key):
            problems.append(
                f"{place}: the key {key!r} is not valid. Use at most {MAX_KEY_LENGTH} ASCII letters, "
                "digits, '_' and '-'"
            )
        elif key in seen:
            problems.append(f"{place}: the key {key!r} is also that of {seen[key]}. Keys must differ")
        seen[key] = place
    raise_all(problems)


def check_columns(columns: Mapping[str, Column], places: Sequence[str]) -> None:
    """Check that every row has a modality, and report on stderr how many rows lack each.

    Args:
        columns: by modality.
        places: (N,) name of each row for messages.

    Raises:
        UserError: rows lack all modalities.
    """
    empty = [
        place for row, place in enumerate(places) if not any(column.has(row) for column in columns.values())
    ]
    if empty:
        raise UserError(
            f"{shorten_list(empty)}: has no value in any modality. Remove it, or add a modality that it has"
        )
    for name, column in columns.items():
        lacking = sum(not column.has(row) for row in range(len(places)))
        if lacking:
            print(f"note: {name} is missing in {lacking:,} of {len(places):,} samples", file=sys.stderr)


def fit_column(
    name: str, what: str, values: Values, train: np.ndarray, arguments: argparse.Namespace
) -> Column:
    """The values as a column of a modality that is made from them; reports on stderr what is lost.

    Args:
        name: name of the modality.
        what: what the values are, for messages.
        values: values of N samples.
        train: rows of the train split.
        arguments: with the flags of `add_shared_arguments`.

    Raises:
        UserError: the values do not make a modality.
    """
    modality = fit_modality(what, values, train, fit_settings(arguments))
    if isinstance(modality, VectorModality):
        _warn_of_constant(name, modality.column_names, np.asarray(values.data)[train])
    if isinstance(modality, TextModality):
        _warn_of_cut(name, count_cut(values, modality), modality.shape[0])
        _warn_of_unknown(name, count_unknown(values.at(train), modality), arguments.min_count)
    return make_column(name, values, modality, arguments.on_error)


def read_contents(
    sources: Sequence[S | None], places: Sequence[str], read: Callable[[S], T | None], damaged: dict[int, str]
) -> list[T | None]:
    """Contents of N sources, None where there is none or it is damaged.

    Args:
        sources: where to read the content of each row, None where it is missing.
        places: name of each source for messages.
        read: reads one; raises ValueError or `DamagedSampleError` if it is damaged.
        damaged: gets what is wrong, by row.
    """
    contents: list[T | None] = []
    for row, (source, place) in enumerate(zip(sources, places, strict=True)):
        contents.append(None)
        if source is not None:
            try:
                contents[row] = read(source)
            except (ValueError, DamagedSampleError) as error:
                damaged[row] = f"{place}: {error}"
    return contents


def _warn_of_constant(name: str, columns: Sequence[str], values: np.ndarray) -> None:
    """Report on stderr the columns (D,) of a vector that are constant in the train split, (N, D)."""
    constant = [columns[place] for place in np.flatnonzero(is_constant(values)).tolist()]
    if constant:
        print(
            f"warning: {name}: {shorten_list(constant)} never vary in the train split and carry no "
            "information. Leave them out",
            file=sys.stderr,
        )


def _warn_of_cut(name: str, num_cut: int, length: int) -> None:
    """Report on stderr how many texts are longer than the tokens of the modality."""
    if num_cut:
        print(f"note: {name}: {num_cut:,} texts are cut after {length - 1} words", file=sys.stderr)


def _warn_of_unknown(name: str, unknown: Unknown, min_count: int) -> None:
    """Report on stderr if most words of the train split are too rare for the vocabulary."""
    if 2 * unknown.number > unknown.total:
        print(
            f"warning: {name}: {unknown.number:,} of {unknown.total:,} words of the train split occur less "
            f"than {min_count} times and become <unk>, for example "
            f"{', '.join(map(repr, unknown.examples))}. Lower --min-count, or leave the texts out",
            file=sys.stderr,
        )


def shorten_list(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _MAX_EXAMPLES} more" if len(names) > _MAX_EXAMPLES else ""
    return ", ".join(names[:_MAX_EXAMPLES]) + more
