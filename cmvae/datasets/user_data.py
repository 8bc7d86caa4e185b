"""What the sources of people's own data share: their flags, and the checks of what came together."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from cmvae.datasets.columns import LENGTH_STEP, Column
from cmvae.datasets.splits import DEFAULT_FRACTIONS, fractions
from cmvae.modalities import RESERVED_NAMES
from cmvae.utils.arguments import positive_integer
from cmvae.utils.errors import UserError

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
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_SHOWN = 5
"""So many examples are enough in a message."""


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags that do not depend on how the data lies on the disk."""
    parser.add_argument("--name", help="of the data set and its config (default: that of --out)")
    parser.add_argument(
        "--fractions",
        type=fractions,
        default=DEFAULT_FRACTIONS,
        metavar="TRAIN,VALIDATION,TEST",
        help="shares of the splits that are drawn by --seed, as even over the labels as can be "
        "(default: 0.8,0.1,0.1)",
    )
    parser.add_argument(
        "--image-size",
        type=positive_integer,
        default=64,
        metavar="PIXELS",
        help="the middle square of every picture is resized to so many (default: 64)",
    )
    parser.add_argument(
        "--channels", type=int, choices=(1, 3), default=3, help="1: grey; 3: colour (default: 3)"
    )
    parser.add_argument(
        "--min-count",
        type=positive_integer,
        default=3,
        metavar="N",
        help="words that train has less often become <unk> (default: 3)",
    )
    parser.add_argument(
        "--text-length",
        type=_text_length,
        default=32,
        metavar="N",
        help=f"words of a text at most, its end counted as one; a multiple of {LENGTH_STEP} (default: 32)",
    )
    parser.add_argument(
        "--config", type=Path, metavar="PATH", help="write the starter config there, instead of printing it"
    )


def _text_length(text: str) -> int:
    length = positive_integer(text)
    if length % LENGTH_STEP:
        raise argparse.ArgumentTypeError(f"{text} is no multiple of {LENGTH_STEP}")
    return length


def read_split(text: str) -> str:
    """The split that a cell names.

    Raises:
        ValueError: none.
    """
    split = _SPLIT_NAMES.get(text.strip().lower())
    if split is None:
        raise ValueError(f"{text!r} is no split. Write train, validation or test")
    return split


def make_name(text: str, kind: str) -> str:
    """A modality's name out of that of a column or folder: small letters, digits and `_`."""
    name = re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")
    return name if name[:1].isalpha() and name not in RESERVED_NAMES else f"{kind}_{name}".rstrip("_")


def check_keys(keys: Sequence[str], places: Sequence[str]) -> None:
    """Refuse keys that a shard cannot have, or two of the same.

    Raises:
        UserError: it names the first bad one.
    """
    seen: dict[str, str] = {}
    for key, place in zip(keys, places, strict=True):
        if not _KEY.fullmatch(key):
            raise UserError(
                f"{place}: {key!r} cannot be a key in a shard: at most 80 plain letters, digits, '_' and '-'"
            )
        if key in seen:
            raise UserError(f"{place}: {key!r} is the key of {seen[key]} as well. Keys must differ")
        seen[key] = place


def check_columns(columns: Mapping[str, Column], places: Sequence[str]) -> None:
    """Refuse rows without anything; say on stderr what is missing, and which numbers never vary.

    Raises:
        UserError: some rows lack every modality.
    """
    empty = [
        place for row, place in enumerate(places) if not any(column.has(row) for column in columns.values())
    ]
    if empty:
        more = f" and {len(empty) - _SHOWN} more" if len(empty) > _SHOWN else ""
        raise UserError(
            f"{', '.join(empty[:_SHOWN])}{more}: nothing there in any modality. Remove what is empty, or add "
            "a modality that it has"
        )
    for name, column in columns.items():
        lacking = sum(not column.has(row) for row in range(len(places)))
        if lacking:
            print(f"note: {name} is missing in {lacking:,} of {len(places):,} samples", file=sys.stderr)


def warn_of_constant(name: str, constant: Sequence[str]) -> None:
    """Report on stderr the dimensions of a vector that are constant in the train split."""
    if constant:
        shown = ", ".join(constant[:_SHOWN])
        more = f" and {len(constant) - _SHOWN} more" if len(constant) > _SHOWN else ""
        print(
            f"warning: {name}: {shown}{more} never vary in the train split and carry no "
            "information. Leave them out",
            file=sys.stderr,
        )
