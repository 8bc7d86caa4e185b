"""A table of one's own: CSV or Parquet, a row a sample, cells that are values or paths to pictures."""

from __future__ import annotations

import argparse
import csv
import difflib
import fnmatch
import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np

from cmvae.data.index import SplitName
from cmvae.datasets.base import random_stream
from cmvae.datasets.columns import (
    BinaryColumn,
    CategoricalColumn,
    Column,
    ColumnSource,
    ImageColumn,
    TextColumn,
    VectorColumn,
    fit_binary,
    fit_categorical,
    fit_image,
    fit_text,
    fit_vector,
    number_classes,
    resolve_inside,
)
from cmvae.datasets.splits import Splits, draw_splits, fractions_text
from cmvae.datasets.user_data import (
    add_shared_arguments,
    check_columns,
    check_keys,
    make_name,
    read_split,
    warn_of_constant,
)
from cmvae.modalities import check_name
from cmvae.utils.errors import UserError

DESCRIPTION = "your own table, CSV or Parquet: columns of values, texts and paths to pictures"

_SPLIT_STREAM = 0
_OF_SEVERAL_COLUMNS = {"vector", "binary"}
_TRUE, _FALSE = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no"}


class ModalityRequest(NamedTuple):
    """One flag such as `--vector size=length,width`."""

    kind: str
    name: str | None
    """As the user says; None is made from the columns."""
    columns: tuple[str, ...]
    """Names or, with a `*`, patterns of names."""


def _request(kind: str, text: str) -> ModalityRequest:
    """Type of the flags of modalities: `[NAME=]COLUMN[,COLUMN…]`."""
    name, separator, columns = text.rpartition("=")
    names = tuple(column.strip() for column in columns.split(","))
    if not all(names) or (separator and not name):
        raise argparse.ArgumentTypeError(f"{text!r}: write COLUMN, or NAME=COLUMN, several with commas")
    if name:
        try:
            check_name(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    if kind not in _OF_SEVERAL_COLUMNS and len(names) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: one column; give the flag once more for another one")
    return ModalityRequest(kind, name or None, names)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `make_shards.py table`."""
    parser.add_argument("table", type=Path, help="a .csv, .tsv or .parquet file with names of columns")
    helps = {
        "image": "a column of paths to pictures, seen from the table's folder",
        "text": "a column of sentences",
        "vector": "columns of numbers that are one modality; 'pixel_*' is all of that form",
        "binary": "columns of 0 and 1, true and false, or yes and no",
        "categorical": "a column of names, or of numbers that stand for some",
    }
    for kind, text in helps.items():
        several = kind in _OF_SEVERAL_COLUMNS
        parser.add_argument(
            f"--{kind}",
            type=partial(_request, kind),
            action="append",
            dest="modalities",
            metavar="[NAME=]COLUMN,…" if several else "[NAME=]COLUMN",
            help=text,
        )
    parser.add_argument("--label", metavar="COLUMN", help="classes to compare with; training never sees them")
    parser.add_argument(
        "--split", metavar="COLUMN", help="train, validation or test; what it never names is drawn from train"
    )
    parser.add_argument(
        "--group",
        metavar="COLUMN",
        help="rows with the same value there belong together: they are drawn into the same split, and "
        "cmvae cluster --by-group gives them one cluster",
    )
    parser.add_argument(
        "--key", metavar="COLUMN", help="names of the samples in all outputs (default: row-000002, …)"
    )
    parser.add_argument(
        "--na",
        action="append",
        default=[],
        metavar="TEXT",
        help="a cell that says so is empty, for instance NA or '?'",
    )
    parser.add_argument("--separator", metavar="CHARACTER", help="of a CSV (default: a comma)")
    add_shared_arguments(parser)


def config_for(arguments: argparse.Namespace) -> None:
    """As `SourceModule.config_for`: there is none, one is made."""


def from_arguments(arguments: argparse.Namespace) -> ColumnSource:
    """The source that the flags describe."""
    if not arguments.modalities:
        raise UserError("no modality is asked for: give --image, --text, --vector, --binary or --categorical")
    table = read_table(arguments.table, arguments.separator, frozenset(["", *arguments.na]))
    # What has another part to play is never meant by a pattern.
    parts = {arguments.label, arguments.split, arguments.group, arguments.key}
    names = _name_modalities(arguments.modalities, table, parts)
    used = {column for request in names.values() for column in request.columns}
    if arguments.label in used:
        raise UserError(
            f"--label {arguments.label}: is a modality as well, so that the model would see what it is "
            "measured by. Take it out of one of them"
        )
    labels, class_names = None, None
    if arguments.label is not None:
        labels, class_names = number_classes(table.filled(arguments.label))
    groups = None if arguments.group is None else table.filled(arguments.group)
    splits = _split(table, arguments, labels, groups)
    columns = {
        name: _make_column(request, table, splits["train"], arguments) for name, request in names.items()
    }
    check_columns(columns, table.places)
    keys = (
        [f"row-{number:06d}" for number in table.row_numbers]
        if arguments.key is None
        else list(table.filled(arguments.key))
    )
    check_keys(keys, table.places)
    _warn_of_shared_pictures(columns, splits)
    return ColumnSource(
        name=arguments.name or arguments.out.name,
        columns=columns,
        splits=splits,
        labels=labels,
        class_names=class_names,
        keys=keys,
        settings={
            "source": "table",
            "table": str(arguments.table),
            **{name: f"{request.kind} {','.join(request.columns)}" for name, request in names.items()},
            "label": arguments.label,
            "split": arguments.split,
            "group": arguments.group,
            "fractions": fractions_text(arguments.fractions),
        },
        groups=groups,
    )


@dataclass(frozen=True)
class Table:
    """A table as text; an empty cell is None."""

    path: Path
    cells: Mapping[str, Sequence[str | None]]
    """Column to its cells."""
    first_row: int
    """What people call the first row: 2 in a CSV, where the names are row 1 as in a spreadsheet."""

    @property
    def row_numbers(self) -> range:
        """What people call the rows."""
        return range(self.first_row, self.first_row + len(next(iter(self.cells.values()))))

    @property
    def places(self) -> list[str]:
        """What messages call the rows."""
        return [f"{self.path}: row {number}" for number in self.row_numbers]

    def column(self, name: str) -> Sequence[str | None]:
        """The cells of a column.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self.cells:
            near = difflib.get_close_matches(name, self.cells, n=1)
            remedy = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(self.cells)}"
            if len(self.cells) == 1:
                remedy += ". If that is several, name their --separator"
            raise UserError(f"{self.path}: no column {name!r}. {remedy}")
        return self.cells[name]

    def matching(self, name: str, but: Set[str | None] = frozenset()) -> list[str]:
        """The columns that a name or a pattern means; a pattern none of `but`.

        Raises:
            UserError: there are none.
        """
        if name not in self.cells and "*" in name:
            found = [column for column in fnmatch.filter(self.cells, name) if column not in but]
            if found:
                return found
        self.column(name)
        return [name]

    def filled(self, name: str) -> Sequence[str]:
        """The cells of a column that must not have empty ones.

        Raises:
            UserError: one is empty.
        """
        cells = self.column(name)
        for cell, place in zip(cells, self.places, strict=True):
            if cell is None:
                raise UserError(f"{place}, column {name}: empty. Fill it, or do without this column")
        return cast("Sequence[str]", cells)

    def convert(self, name: str, read: Callable[[str], float]) -> np.ndarray:
        """(N,) float64: the cells of a column as numbers, NaN where it is empty.

        Raises:
            UserError: `read` raises ValueError, with what is wrong.
        """
        values = np.full(len(self.row_numbers), np.nan)
        for row, cell in enumerate(self.column(name)):
            if cell is not None:
                try:
                    values[row] = read(cell)
                except ValueError as error:
                    raise UserError(f"{self.places[row]}, column {name}: {error}") from error
        return values


def read_table(path: Path, separator: str | None, empty: frozenset[str]) -> Table:
    """Read a CSV or Parquet file.

    Args:
        path: the file; its suffix says what it is.
        separator: of a CSV; None is a comma, or a tab in a .tsv.
        empty: what a cell says that is empty.

    Raises:
        UserError: the file is missing, damaged or without rows, or a row has too few or too many cells.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. Give the path of a .csv, .tsv or .parquet file")
    if path.suffix.lower() == ".parquet":
        columns, first_row = _read_parquet(path), 1
    else:
        default = "\t" if path.suffix.lower() == ".tsv" else ","
        columns, first_row = _read_csv(path, separator if separator is not None else default), 2
    if not columns or not next(iter(columns.values())):
        raise UserError(f"{path}: holds no rows. Give a table with names of columns and at least one row")
    cells = {
        name: [None if value is None or value.strip() in empty else value.strip() for value in values]
        for name, values in columns.items()
    }
    return Table(path, cells, first_row)


def _read_csv(path: Path, separator: str) -> dict[str, list[str | None]]:
    try:
        # The signature that spreadsheets put at the start is no part of the first name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, delimiter=separator, strict=True)
            header = [name.strip() for name in next(reader, [])]
            if len(set(header)) != len(header):
                twice = next(name for name in header if header.count(name) > 1)
                raise UserError(f"{path}: row 1: column {twice!r} is there twice. Rename one")
            rows = []
            for number, row in enumerate(reader, 2):
                if len(row) != len(header):
                    raise UserError(
                        f"{path}: row {number} has {len(row)} cells, the first row names {len(header)} "
                        "columns. Mend the row; a cell with a comma or a line break in it must be quoted"
                    )
                rows.append(row)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not in UTF-8 ({error}). Save it in that encoding") from error
    except (OSError, csv.Error, TypeError) as error:
        raise UserError(f"{path}: cannot be read as CSV: {error}. Mend it, or see --separator") from error
    return {name: [row[place] for row in rows] for place, name in enumerate(header)}


def _read_parquet(path: Path) -> dict[str, list[str | None]]:
    # Heavy to import, and needed for this only.
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}. Write it again") from error
    return {
        name: [None if value is None or value != value else str(value) for value in values]
        for name, values in table.to_pydict().items()
    }


def _name_modalities(
    requests: Sequence[ModalityRequest], table: Table, parts: Set[str | None]
) -> dict[str, ModalityRequest]:
    """Names and columns, patterns filled in without the columns in `parts`."""
    named: dict[str, ModalityRequest] = {}
    for request in requests:
        columns = tuple(column for name in request.columns for column in table.matching(name, parts))
        if len(columns) > 1 and request.kind not in _OF_SEVERAL_COLUMNS:
            raise UserError(
                f"--{request.kind} {request.columns[0]}: means {', '.join(columns)}. Give one at a time"
            )
        made = make_name(columns[0] if len(columns) == 1 else request.kind, request.kind)
        name = request.name or made
        if name in named:
            raise UserError(
                f"--{request.kind} {','.join(request.columns)}: a modality {name!r} is there already. Name "
                f"them: --{request.kind} NAME={','.join(request.columns)}"
            )
        named[name] = ModalityRequest(request.kind, name, columns)
    return named


def _make_column(
    request: ModalityRequest, table: Table, train: np.ndarray, arguments: argparse.Namespace
) -> Column:
    first = request.columns[0]
    if request.kind == "image":
        places = [f"{place}, column {first}" for place in table.places]
        paths = [
            None if cell is None else _resolve(table.path.parent, cell, place)
            for cell, place in zip(table.column(first), places, strict=True)
        ]
        return ImageColumn(paths, places, fit_image(paths, arguments.image_size, arguments.channels))
    if request.kind == "text":
        cells = table.column(first)
        return TextColumn(cells, fit_text(cells, train, arguments.min_count, arguments.text_length))
    if request.kind == "categorical":
        cells = table.column(first)
        return CategoricalColumn(cells, fit_categorical(cells, f"{table.path}: column {first}"))
    read = _read_number if request.kind == "vector" else _read_yes_or_no
    values = np.stack([table.convert(column, read) for column in request.columns], axis=1)
    if request.kind == "vector":
        modality, constant = fit_vector(values, request.columns, train)
        warn_of_constant(str(request.name), constant)
        return VectorColumn(values, modality)
    return BinaryColumn(values, fit_binary(values, request.columns))


def _resolve(folder: Path, text: str, place: str) -> Path:
    try:
        return resolve_inside(folder, text)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error


def _read_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise ValueError(f"{text!r} is no number. Mend it; if it means an empty cell, add --na {text!r}")
    return value


def _read_yes_or_no(text: str) -> float:
    if text.lower() in _TRUE | _FALSE:
        return float(text.lower() in _TRUE)
    raise ValueError(
        f"{text!r} is none of {', '.join(sorted(_TRUE | _FALSE))}. Mend it; if it means an empty cell, add "
        f"--na {text!r}"
    )


def _split(
    table: Table, arguments: argparse.Namespace, labels: np.ndarray | None, groups: Sequence[str] | None
) -> Splits:
    """The splits that a column names, and those that have to be drawn."""
    number = len(table.row_numbers)
    group_of_row = np.arange(number)
    if groups is not None:
        group_of_row = np.unique(np.array(groups), return_inverse=True)[1]
    named = np.full(number, "train", dtype=object)
    if arguments.split is not None:
        for row, cell in enumerate(table.filled(arguments.split)):
            try:
                named[row] = read_split(cell)
            except ValueError as error:
                raise UserError(f"{table.places[row]}, column {arguments.split}: {error}") from error
    undivided = np.flatnonzero(named == "train")
    if len(undivided) == 0:
        raise UserError(f"{table.path}: column {arguments.split}: no row is of train. Give some to it")
    _, validation, test = arguments.fractions
    shares = (validation * (not (named == "validation").any()), test * (not (named == "test").any()))
    splits: Splits = {"train": undivided}
    drawn: Splits = {}
    if any(shares):
        rng = random_stream(arguments.seed, _SPLIT_STREAM)
        drawn = draw_splits(
            group_of_row[undivided],
            (1 - sum(shares), *shares),
            rng,
            labels=None if labels is None else labels[undivided],
        )
        drawn = {split: undivided[rows] for split, rows in drawn.items()}
        splits["train"] = drawn["train"]
    held_out: tuple[SplitName, ...] = ("validation", "test")
    for split, share in zip(held_out, shares, strict=True):
        splits[split] = drawn[split] if share else np.flatnonzero(named == split)
    return splits


def _warn_of_shared_pictures(columns: Mapping[str, Column], splits: Splits) -> None:
    """Say so where one file is a picture of two splits: a test on it would flatter."""
    for name, column in columns.items():
        if isinstance(column, ImageColumn):
            of_train = {column.paths[row] for row in splits["train"].tolist()} - {None}
            held_out = np.concatenate([splits["validation"], splits["test"]]).tolist()
            shared = {column.paths[row] for row in held_out} & of_train
            if shared:
                print(
                    f"warning: {name}: {len(shared):,} pictures are in train and in another split, for "
                    f"example {min(str(path) for path in shared)}. Give --group with the pictures' column",
                    file=sys.stderr,
                )
