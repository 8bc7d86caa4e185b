"""A user's own table, CSV or Parquet: one sample per row; cells hold values or paths of images."""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmvae.datasets.base import SPLIT_NUMBERS, random_stream
from cmvae.datasets.columns import (
    MAX_NUMBER,
    Column,
    ColumnSource,
    ImageColumn,
    TextColumn,
    categorical_column,
    find_outlier,
    fit_binary,
    fit_categorical,
    fit_image,
    fit_text,
    fit_vector,
    number_column,
    resolve_inside,
)
from cmvae.datasets.dates import date_parts, read_date
from cmvae.datasets.splits import Splits, draw_splits, fractions_text
from cmvae.datasets.table_file import Table, read_table
from cmvae.datasets.user_data import (
    add_shared_arguments,
    check_columns,
    check_keys,
    make_name,
    read_labels,
    read_split,
    warn_of_constant,
)
from cmvae.modalities import check_name
from cmvae.utils.errors import UserError

DESCRIPTION = "your own table, CSV or Parquet: columns of values, texts and paths of images"

_SPLIT_STREAM = 0
_OF_SEVERAL_COLUMNS = {"vector", "binary"}
_MIN_IDS = 20
"""With fewer rows, measurements may be in order by chance."""
_TRUE, _FALSE = {"1", "1.0", "true", "yes"}, {"0", "0.0", "false", "no"}


class ModalityRequest(NamedTuple):
    """One flag such as `--vector size=length,width`."""

    kind: str
    name: str | None
    """Name that the user gives; None makes one from the columns."""
    columns: tuple[str, ...]
    """Names of columns, or patterns with `*`."""


def _request(kind: str, text: str) -> ModalityRequest:
    """Type of the flags for modalities: `[NAME=]COLUMN[,COLUMN…]`."""
    name, separator, columns = text.rpartition("=")
    names = tuple(column.strip() for column in columns.split(","))
    if not all(names) or (separator and not name):
        raise argparse.ArgumentTypeError(f"{text!r}: write COLUMN or NAME=COLUMN; separate several by commas")
    if kind not in _OF_SEVERAL_COLUMNS and len(names) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give one column; repeat the flag for another one")
    if name:
        try:
            check_name(name)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    return ModalityRequest(kind, name or None, names)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `cmvae pack table`."""
    parser.add_argument("table", type=Path, help="a .csv, .tsv or .parquet file with column names")
    helps = {
        "image": "a column of paths of images, relative to the table's folder",
        "text": "a column of sentences",
        "vector": "columns of numbers that form one modality; 'pixel_*' selects all that match",
        "binary": "columns of 0 and 1, true and false, or yes and no",
        "categorical": "a column of names, or of numbers that stand for names",
        "date": "a column of dates, which becomes a vector: seconds since 1970, and the place in the day, "
        "the week and the year",
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
    parser.add_argument("--label", metavar="COLUMN", help="classes for evaluation; training never sees them")
    parser.add_argument(
        "--split",
        metavar="COLUMN",
        help="train, validation or test; a split that it never names is drawn from train",
    )
    parser.add_argument(
        "--group",
        metavar="COLUMN",
        help="rows with the same value belong together: they are drawn into the same split, and "
        "cmvae cluster --by-group assigns them to one cluster",
    )
    parser.add_argument(
        "--key", metavar="COLUMN", help="names of the samples in all outputs (default: row-000002, …)"
    )
    parser.add_argument(
        "--na",
        action="append",
        default=[],
        metavar="TEXT",
        help="text of an empty cell, for example NA or '?'; may be repeated",
    )
    parser.add_argument(
        "--separator",
        metavar="CHARACTER",
        help="separator of a CSV file (default: a tab in a .tsv file, otherwise the one of , ; tab | that "
        "the column names show)",
    )
    parser.add_argument(
        "--decimal", choices=(".", ","), default=".", help="decimal separator of numbers (default: .)"
    )
    parser.add_argument(
        "--date-format",
        metavar="FORM",
        help="form of the dates, such as %%d.%%m.%%Y (default: ISO 8601, or seconds since 1970)",
    )
    add_shared_arguments(parser)


def config_for(arguments: argparse.Namespace) -> None:
    """None: a starter config is made from the data."""


def from_arguments(arguments: argparse.Namespace) -> ColumnSource:
    """Open the table that the flags describe.

    Raises:
        UserError: the table or a flag is wrong; the message gives row and column.
    """
    if not arguments.modalities:
        raise UserError(
            "no modality is given. Add --image, --text, --vector, --binary, --categorical or --date"
        )
    table = read_table(arguments.table, arguments.separator, frozenset(["", *arguments.na]))
    # Patterns do not select columns that have another purpose.
    excluded = {arguments.label, arguments.split, arguments.group, arguments.key}
    names = _name_modalities(arguments.modalities, table, excluded)
    used = {column for request in names.values() for column in request.columns}
    if arguments.label in used:
        raise UserError(
            f"--label {arguments.label}: is also a modality, so the model would see the classes that it is "
            "evaluated with. Remove the column from one of them"
        )
    labels, class_names = None, None
    if arguments.label is not None:
        labels, class_names = read_labels(
            table.column(arguments.label), f"{table.path}: column {arguments.label}"
        )
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
    _warn_of_shared_images(columns, splits)
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


def _name_modalities(
    requests: Sequence[ModalityRequest], table: Table, excluded: Set[str | None]
) -> dict[str, ModalityRequest]:
    """Resolve names and patterns; patterns do not select the columns `excluded`."""
    named: dict[str, ModalityRequest] = {}
    for request in requests:
        columns = tuple(column for name in request.columns for column in table.matching(name, excluded))
        if len(columns) > 1 and request.kind not in _OF_SEVERAL_COLUMNS:
            raise UserError(
                f"--{request.kind} {request.columns[0]}: selects {', '.join(columns)}. Give one column, and "
                "repeat the flag for others"
            )
        made = make_name(columns[0] if len(columns) == 1 else request.kind, request.kind)
        name = request.name or made
        if name in named:
            raise UserError(
                f"--{request.kind} {','.join(request.columns)}: there is already a modality {name!r}. Give "
                f"another name: --{request.kind} NAME={','.join(request.columns)}"
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
        return categorical_column(cells, fit_categorical(cells, f"{table.path}: column {first}"))
    if request.kind == "binary":
        values = np.stack([table.convert(column, _read_yes_or_no) for column in request.columns], axis=1)
        return number_column(values, fit_binary(values, request.columns))
    if request.kind == "date":
        seconds = table.convert(first, partial(read_date, form=arguments.date_format))
        values, names = date_parts(first, seconds)
    else:
        for column in request.columns:
            _refuse_ids(table, column)
        read = partial(_read_number, arguments.decimal)
        values, names = (
            np.stack([table.convert(column, read) for column in request.columns], axis=1),
            request.columns,
        )
    # A date is to be a date again.
    modality, constant = fit_vector(values, names, train, exact=request.kind == "date")
    warn_of_constant(str(request.name), constant)
    outlier = find_outlier(values, modality)
    if outlier is not None:
        row, dimension, problem = outlier
        raise UserError(f"{table.places[row]}, column {names[dimension]}: {problem}")
    return number_column(values, modality)


def _refuse_ids(table: Table, column: str) -> None:
    """Refuse integers that only count the rows: all different and in order."""
    cells = [cell for cell in table.column(column) if cell is not None]
    if len(cells) < _MIN_IDS or not all(re.fullmatch(r"[-+]?\d+", cell) for cell in cells):
        return
    numbers = [int(cell) for cell in cells]
    if numbers[0] > numbers[-1]:
        numbers.reverse()
    if all(before < after for before, after in itertools.pairwise(numbers)):
        raise UserError(
            f"{table.path}: column {column}: its integers all differ and are in order, as ids are, which "
            f"say nothing about a sample. Leave it out, or use it as --key {column} (for times, --date "
            f"{column}). If it is a measurement, sort the rows by another column"
        )


def _resolve(folder: Path, text: str, place: str) -> Path:
    try:
        return resolve_inside(folder, text)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error


def _read_number(decimal: str, text: str) -> float:
    # `float` accepts 12_34, too. Neither an underscore nor a separator of thousands is guessed away.
    is_plain = re.fullmatch(rf"[^_.,]*({re.escape(decimal)}[^_.,]*)?", text) is not None
    try:
        value = float(text.replace(decimal, ".")) if is_plain else float("nan")
    except ValueError:
        value = float("nan")
    if abs(value) <= MAX_NUMBER:
        return value
    wrong = "not a number" if np.isnan(value) else f"out of the range of single precision, ±{MAX_NUMBER:.1e}"
    if decimal == "." and re.fullmatch(r"[-+]?\d*,\d+", text):
        remedy = "if the comma is the decimal separator, add --decimal ,"
    else:
        remedy = f"if it means an empty cell, add --na {text!r}"
    raise ValueError(f"{text!r} is {wrong}. Fix it; {remedy}")


def _read_yes_or_no(text: str) -> float:
    if text.lower() in _TRUE | _FALSE:
        return float(text.lower() in _TRUE)
    raise ValueError(
        f"{text!r} is none of {', '.join(sorted(_TRUE | _FALSE))}. Fix it; if it means an empty cell, add "
        f"--na {text!r}"
    )


def _split(
    table: Table, arguments: argparse.Namespace, labels: np.ndarray | None, groups: Sequence[str] | None
) -> Splits:
    """The splits that a column names, and the others drawn from the train split."""
    named = np.full(len(table.row_numbers), "train", dtype=object)
    if arguments.split is not None:
        for row, cell in enumerate(table.filled(arguments.split)):
            try:
                named[row] = read_split(cell)
            except ValueError as error:
                raise UserError(f"{table.places[row]}, column {arguments.split}: {error}") from error
    splits: Splits = {split: np.flatnonzero(named == split) for split in SPLIT_NUMBERS}
    undivided = splits["train"]
    if len(undivided) == 0:
        raise UserError(
            f"{table.path}: column {arguments.split}: no row is in the train split. Assign some to it"
        )
    _, validation, test = arguments.fractions
    validation *= len(splits["validation"]) == 0
    test *= len(splits["test"]) == 0
    if validation or test:
        group_of_row = np.arange(len(named)) if groups is None else np.unique(groups, return_inverse=True)[1]
        drawn = draw_splits(
            group_of_row[undivided],
            (1 - validation - test, validation, test),
            random_stream(arguments.seed, _SPLIT_STREAM),
            labels=None if labels is None else labels[undivided],
        )
        splits |= {split: undivided[rows] for split, rows in drawn.items() if len(rows)}
    return splits


def _warn_of_shared_images(columns: Mapping[str, Column], splits: Splits) -> None:
    """Warn if an image file is in train and in another split, which makes results on that split too good."""
    for name, column in columns.items():
        if isinstance(column, ImageColumn):
            of_train = {column.paths[row] for row in splits["train"].tolist()} - {None}
            held_out = np.concatenate([splits["validation"], splits["test"]]).tolist()
            shared = {column.paths[row] for row in held_out} & of_train
            if shared:
                print(
                    f"warning: {name}: {len(shared):,} images are in train and in another split, for example "
                    f"{min(str(path) for path in shared)}. Give --group with the column of the images",
                    file=sys.stderr,
                )
