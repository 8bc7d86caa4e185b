"""A user's own folder: one subfolder per modality; files with the same name form a sample."""

from __future__ import annotations

import argparse
import os
import sys
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from cmvae.data.index import INDEX_NAME
from cmvae.datasets.base import random_stream
from cmvae.datasets.columns import (
    IMAGE_SUFFIXES,
    MAX_NUMBER,
    Column,
    ColumnSource,
    DamagedColumn,
)
from cmvae.datasets.splits import draw_splits, fractions_text
from cmvae.datasets.table_file import read_table
from cmvae.datasets.user_data import (
    add_shared_arguments,
    check_columns,
    check_keys,
    fit_column,
    make_keys,
    make_name,
    read_contents,
    read_labels,
)
from cmvae.datasets.values import Values
from cmvae.utils.errors import UserError, raise_all

DESCRIPTION = "your own folder: one subfolder per modality (images, .txt or .npy), files paired by name"

LABELS_NAME = "labels.csv"
_KINDS = {**dict.fromkeys(IMAGE_SUFFIXES, "image"), ".txt": "text", ".npy": "vector"}
_SPLIT_STREAM = 0
T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `cmvae pack folder`."""
    parser.add_argument(
        "folder",
        type=Path,
        help=f"folder with one subfolder per modality; {LABELS_NAME} in it, with the columns name and label, "
        "is for evaluation",
    )
    add_shared_arguments(parser)


def config_for(arguments: argparse.Namespace) -> None:
    """None: a starter config is made from the data."""


def from_arguments(arguments: argparse.Namespace) -> ColumnSource:
    """Open the folder that the flags describe.

    Raises:
        UserError: a file is missing or damaged, or files do not fit together.
    """
    folder: Path = arguments.folder
    files = _list_files(folder)
    stems = sorted(set().union(*files.values()))
    places = [f"{folder}: {stem}" for stem in stems]
    labels, class_names = _read_labels(folder / LABELS_NAME, stems)
    splits = draw_splits(
        np.arange(len(stems)), arguments.fractions, random_stream(arguments.seed, _SPLIT_STREAM), labels
    )
    columns: dict[str, Column] = {}
    for subfolder, of_subfolder in files.items():
        kind = _kind_of(folder / subfolder, of_subfolder)
        name = make_name(subfolder, kind)
        if name in columns:
            raise UserError(
                f"{folder / subfolder}: another subfolder is also the modality {name!r}. Rename one"
            )
        paths = [of_subfolder.get(stem) for stem in stems]
        files_of = [str(path) for path in paths]
        damaged: dict[int, str] = {}
        if kind == "image":
            values = Values("image", paths, places=places)
        elif kind == "text":
            values = Values("text", read_contents(paths, files_of, _read_text, damaged))
        else:
            rows = read_contents(paths, files_of, read_vector, damaged)
            values = Values("vector", stack_vectors(paths, rows), places=files_of)
        columns[name] = fit_column(name, str(folder / subfolder), values, splits["train"], arguments)
        if arguments.on_error == "error":
            raise_all(damaged.values())
        if damaged:
            columns[name] = DamagedColumn(columns[name], damaged)
    check_columns(columns, places)
    keys = make_keys(stems)
    check_keys(keys, places)
    return ColumnSource(
        name=arguments.name or arguments.out.name,
        columns=columns,
        splits=splits,
        labels=labels,
        class_names=class_names,
        keys=keys,
        settings={
            "source": "folder",
            "folder": str(folder),
            "fractions": fractions_text(arguments.fractions),
        },
    )


def _list_files(folder: Path) -> dict[str, dict[str, Path]]:
    """Files of each subfolder by stem; hidden files are ignored, and other suffixes reported and ignored.

    Raises:
        UserError: the folder does not exist or has no modality, or two files of a subfolder have one stem.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give one with a subfolder for each modality")
    files: dict[str, dict[str, Path]] = {}
    subfolders = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    # Shards may be packed into the folder of the data.
    for subfolder in sorted(path for path in subfolders if not (path / INDEX_NAME).is_file()):
        found: dict[str, Path] = {}
        ignored: Counter[str] = Counter()
        for path in sorted(subfolder.iterdir()):
            if path.name.startswith(".") or not path.is_file():
                continue
            if path.suffix.lower() not in _KINDS:
                ignored[path.suffix or path.name] += 1
                continue
            # Some systems write é as one character, others as two; a locale may not know it.
            stem = unicodedata.normalize("NFC", os.fsencode(path.stem).decode(errors="replace"))
            if stem in found:
                raise UserError(f"{path}: {found[stem].name} has the same name. Keep one of them")
            found[stem] = path
        if ignored:
            shown = ", ".join(f"{count} {suffix}" for suffix, count in ignored.items())
            print(f"note: {subfolder}: ignored: {shown}", file=sys.stderr)
        if found:
            files[subfolder.name] = found
    if not files:
        raise UserError(
            f"{folder}: no subfolder contains images, .txt or .npy files. Make one for each modality; files "
            "of one sample have the same name"
        )
    return files


def _kind_of(subfolder: Path, files: Mapping[str, Path]) -> str:
    kinds: dict[str, Path] = {}
    for path in files.values():
        kinds.setdefault(_KINDS[path.suffix.lower()], path)
    if len(kinds) > 1:
        raise UserError(
            f"{subfolder}: contains {' and '.join(kinds)}, for example "
            f"{' and '.join(path.name for path in kinds.values())}. Use one subfolder per kind"
        )
    return next(iter(kinds))


def _read_text(path: Path) -> str | None:
    """The text of a file; None if it is empty."""
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read as text in UTF-8: {error}. Save it in UTF-8") from error


def read_vector(file: Path | BinaryIO) -> np.ndarray:
    """(D,) float64 of an .npy file; arrays of more dimensions are flattened.

    Raises:
        ValueError: the file is damaged, or holds no numbers.
    """
    try:
        array = np.load(file, allow_pickle=False)
        row = np.asarray(array, dtype=np.float64).reshape(-1)
    except (OSError, ValueError, TypeError, EOFError) as error:
        raise ValueError(f"cannot be read as an array of numbers ({error}). Save it again") from error
    if len(row) == 0 or not (np.abs(row) <= MAX_NUMBER).all():
        raise ValueError("is empty, or has numbers that are not finite in single precision. Fix or remove it")
    return row


def stack_vectors(paths: Sequence[Path | str | None], rows: Sequence[np.ndarray | None]) -> np.ndarray:
    """(N, D) float64, NaN where there is no vector.

    Args:
        paths: (N,) name of the file of each row for messages, None where there is none.
        rows: (N,) vectors, None where there is none or it is damaged.

    Raises:
        UserError: vectors have different sizes, or there are none.
    """
    known = [(path, row) for path, row in zip(paths, rows, strict=True) if row is not None]
    if not known:
        raise UserError(
            f"{next(path for path in paths if path is not None)}: this file and all others are damaged"
        )
    first, size = known[0][0], len(known[0][1])
    raise_all(
        f"{path}: has {len(row)} numbers, but {first} has {size}. All files need as many numbers"
        for path, row in known
        if len(row) != size
    )
    return np.stack([np.full(size, np.nan) if row is None else row for row in rows])


def _read_labels(path: Path, stems: Sequence[str]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels and class names of the samples, from a CSV file with columns name and label, if it exists."""
    if not path.is_file():
        return None, None
    table = read_table(path)
    names = [unicodedata.normalize("NFC", name) for name in table.filled("name")]
    label_of = dict(zip(names, table.column("label"), strict=True))
    lacking = [stem for stem in stems if stem not in label_of]
    if lacking:
        raise UserError(
            f"{path}: no row with the name {lacking[0]!r}, which has files, and {len(lacking) - 1} more such "
            "names. A name is that of a file without its suffix"
        )
    return read_labels([label_of[stem] for stem in stems], str(path))
