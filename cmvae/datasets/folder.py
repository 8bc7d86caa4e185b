"""A folder of one's own: one subfolder a modality, files of the same name are one sample."""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from cmvae.datasets.base import random_stream
from cmvae.datasets.columns import (
    IMAGE_SUFFIXES,
    Column,
    ColumnSource,
    ImageColumn,
    TextColumn,
    VectorColumn,
    fit_image,
    fit_text,
    fit_vector,
    number_classes,
)
from cmvae.datasets.splits import draw_splits, fractions_text
from cmvae.datasets.table import read_table
from cmvae.datasets.user_data import (
    add_shared_arguments,
    check_columns,
    check_keys,
    make_name,
    warn_of_constant,
)
from cmvae.utils.errors import UserError

DESCRIPTION = "your own folder: one subfolder a modality (pictures, .txt or .npy), files paired by name"

LABELS_NAME = "labels.csv"
_KINDS = {**dict.fromkeys(IMAGE_SUFFIXES, "image"), ".txt": "text", ".npy": "vector"}
_SPLIT_STREAM = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `make_shards.py folder`."""
    parser.add_argument(
        "folder",
        type=Path,
        help=f"its subfolders are the modalities; {LABELS_NAME} in it, with columns name and label, is for "
        "evaluation",
    )
    add_shared_arguments(parser)


def config_for(arguments: argparse.Namespace) -> None:
    """As `SourceModule.config_for`: there is none, one is made."""


def from_arguments(arguments: argparse.Namespace) -> ColumnSource:
    """The source that the flags describe."""
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
                f"{folder / subfolder}: another folder is the modality {name!r} as well. Rename one"
            )
        paths = [of_subfolder.get(stem) for stem in stems]
        if kind == "image":
            columns[name] = ImageColumn(
                paths, places, fit_image(paths, arguments.image_size, arguments.channels)
            )
        elif kind == "text":
            texts = [None if path is None else _read_text(path) for path in paths]
            columns[name] = TextColumn(
                texts, fit_text(texts, splits["train"], arguments.min_count, arguments.text_length)
            )
        else:
            values = _read_vectors(paths)
            modality, constant = fit_vector(values, None, splits["train"])
            warn_of_constant(name, constant)
            columns[name] = VectorColumn(values, modality)
    check_columns(columns, places)
    # A key ends at the first dot, and tar names are safest plain.
    keys = [re.sub(r"[^A-Za-z0-9_-]", "_", stem) for stem in stems]
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
    """Subfolder to its files by stem; hidden files and other suffixes are left alone, and told.

    Raises:
        UserError: there is no such folder, it has no modality, or a name is there twice.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give one with a subfolder for each modality")
    files: dict[str, dict[str, Path]] = {}
    for subfolder in sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."):
        found: dict[str, Path] = {}
        ignored: Counter[str] = Counter()
        for path in sorted(subfolder.iterdir()):
            if path.name.startswith(".") or not path.is_file():
                continue
            if path.suffix.lower() not in _KINDS:
                ignored[path.suffix or path.name] += 1
                continue
            if path.stem in found:
                raise UserError(f"{path}: {found[path.stem].name} has the same name. Keep one of them")
            found[path.stem] = path
        if ignored:
            shown = ", ".join(f"{count} {suffix}" for suffix, count in ignored.items())
            print(f"note: {subfolder}: left alone: {shown}", file=sys.stderr)
        if found:
            files[subfolder.name] = found
    if not files:
        raise UserError(
            f"{folder}: no subfolder with pictures, .txt or .npy in it. Make one for each modality, with "
            "files of the same name for what belongs together"
        )
    return files


def _kind_of(subfolder: Path, files: Mapping[str, Path]) -> str:
    kinds: dict[str, Path] = {}
    for path in files.values():
        kinds.setdefault(_KINDS[path.suffix.lower()], path)
    if len(kinds) > 1:
        examples = " and ".join(path.name for path in kinds.values())
        raise UserError(f"{subfolder}: holds {' and '.join(kinds)}, as {examples}. One kind a subfolder")
    return next(iter(kinds))


def _read_text(path: Path) -> str | None:
    """The text of a file; None where there is none in it."""
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text in UTF-8: {error}. Save it so") from error


def _read_vectors(paths: Sequence[Path | None]) -> np.ndarray:
    """(N, D) float64, NaN where there is no file; arrays of more axes are laid out flat."""
    rows: list[np.ndarray | None] = []
    first: Path | None = None
    for path in paths:
        if path is None:
            rows.append(None)
            continue
        try:
            array = np.load(path, allow_pickle=False)
            row = np.asarray(array, dtype=np.float64).reshape(-1)
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise UserError(
                f"{path}: cannot be read as an array of numbers ({error}). Save it again"
            ) from error
        if not np.isfinite(row).all() or len(row) == 0:
            raise UserError(f"{path}: holds no numbers, or such as are not finite. Mend or remove the file")
        if first is None:
            first, size = path, len(row)
        elif len(row) != size:
            raise UserError(f"{path}: holds {len(row)} numbers, {first} holds {size}. They must be as many")
        rows.append(row)
    return np.stack([np.full(size, np.nan) if row is None else row for row in rows])


def _read_labels(path: Path, stems: Sequence[str]) -> tuple[np.ndarray | None, tuple[str, ...] | None]:
    """Labels of the samples, from a CSV with columns name and label, if there is one."""
    if not path.is_file():
        return None, None
    table = read_table(path, separator=None, empty=frozenset([""]))
    of_name = dict(zip(table.filled("name"), table.filled("label"), strict=True))
    lacking = [stem for stem in stems if stem not in of_name]
    if lacking:
        raise UserError(
            f"{path}: no row with the name {lacking[0]!r}, which has files, and {len(lacking) - 1} more like "
            "that. A name is a file's without its ending"
        )
    return number_classes([of_name[stem] for stem in stems])
