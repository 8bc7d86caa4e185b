"""A user's own table, CSV or Parquet: one sample per row; cells hold values or paths of images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from cmvae.data.index import SplitName, TableSchema
from cmvae.datasets.base import SPLIT_NUMBERS, random_stream
from cmvae.datasets.columns import Column, ColumnSource, ImageColumn
from cmvae.datasets.splits import Splits, draw_splits, fractions_text
from cmvae.datasets.table_check import are_ids, describe_columns
from cmvae.datasets.table_file import Table, read_table
from cmvae.datasets.table_rows import (
    add_form_arguments,
    find_lacking,
    read_cells,
    read_dates,
    read_rows,
    row_keys,
    with_columns_of,
    with_form,
)
from cmvae.datasets.user_data import (
    SETTINGS,
    add_shared_arguments,
    check_columns,
    check_keys,
    fit_column,
    make_name,
    read_labels,
    read_split,
    shorten_list,
)
from cmvae.datasets.values import (
    Kind,
    count_unknown,
    describe_unknown,
    make_column,
)
from cmvae.modalities import Modality, check_name
from cmvae.utils.errors import Problems, UserError

DESCRIPTION = "your own table, CSV or Parquet: columns of values, texts and paths of images"

_SPLIT_STREAM = 0
_OF_SEVERAL_COLUMNS = {"vector", "binary"}
RequestKind = Kind | Literal["date"]
_NEW_ROWS: SplitName = "test"
"""Split of the rows of `--like`, which are for a model that is already trained."""


class ModalityRequest(NamedTuple):
    """One flag such as `--vector size=length,width`."""

    kind: RequestKind
    name: str | None
    """Name that the user gives; None makes one from the columns."""
    columns: tuple[str, ...]
    """Names of columns, or patterns with `*`."""
    text: str = ""
    """The flag as it was given: a name of a column may contain a comma or `=`."""


def _request(kind: RequestKind, text: str) -> ModalityRequest:
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
    return ModalityRequest(kind, name or None, names, text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `cmvae pack table`."""
    parser.add_argument("table", type=Path, help="a .csv, .tsv or .parquet file with column names")
    helps: dict[RequestKind, str] = {
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
    add_form_arguments(parser)
    parser.add_argument(
        "--like",
        type=Path,
        metavar="RUN",
        help="new rows for a trained run: its modalities, read from the columns of the same names, with its "
        "vocabulary, categories and standardisation; all rows are in the test split, or as --split says",
    )
    parser.add_argument(
        "--date-format",
        metavar="FORM",
        help="form of the dates, such as %%d.%%m.%%Y (default: ISO 8601, or seconds since 1970)",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="write nothing: say what each column was taken for and why, what is wrong, and what is lost",
    )
    add_shared_arguments(parser)


def config_for(arguments: argparse.Namespace) -> None:
    """None: a starter config is made from the data."""


def from_arguments(arguments: argparse.Namespace) -> ColumnSource:
    """Open the table that the flags describe, as data to train on.

    Raises:
        UserError: the table or a flag is wrong; the message gives row and column.
    """
    if not arguments.modalities:
        raise UserError(
            "no modality is given. Add --image, --text, --vector, --binary, --categorical or --date"
        )
    form = with_form(TableSchema(columns={}, group=arguments.group), arguments.table, arguments)
    table = _read(arguments.table, form)
    problems = Problems()
    names = _name_modalities(arguments.modalities, table, _excluded(arguments), problems)
    schema = form.model_copy(
        update={
            "columns": {name: request.columns for name, request in names.items()},
            "dates": {n: arguments.date_format for n, request in names.items() if request.kind == "date"},
        }
    )
    with problems.collecting():
        _refuse_label_as_modality(arguments.label, names)
    rows = _read_purposes(table, schema, arguments, problems)
    splits = _named_splits(table, None, "train")
    with problems.collecting():
        splits = _named_splits(table, arguments.split, "train")
        splits = _draw_missing_splits(table, splits, rows, arguments)
    columns: dict[str, Column] = {}
    for name, request in names.items():
        with problems.collecting():
            columns[name] = _fit_column(request, table, splits["train"], form.decimal, arguments)
    problems.raise_all()
    check_columns(columns, table.places)
    _warn_of_shared_images(columns, splits)
    return _make_source(arguments, schema, columns, splits, rows)


def check_report(arguments: argparse.Namespace) -> str:
    """What each column of the table was taken for and why, and what the flags use it for.

    Raises:
        UserError: the table cannot be read.
    """
    table = _read(arguments.table, with_form(TableSchema(columns={}), arguments.table, arguments))
    uses = {
        column: f"--{purpose} {column}"
        for purpose in ("label", "split", "group", "key")
        if (column := getattr(arguments, purpose)) is not None
    }
    with suppress(UserError):
        names = _name_modalities(arguments.modalities or (), table, _excluded(arguments), Problems())
        uses |= {c: f"--{request.kind} {name}" for name, request in names.items() for c in request.columns}
    return describe_columns(table, uses)


def _excluded(arguments: argparse.Namespace) -> set[str | None]:
    """Columns that patterns do not select, because they have another purpose."""
    return {arguments.label, arguments.split, arguments.group, arguments.key}


def _refuse_label_as_modality(label: str | None, names: Mapping[str, ModalityRequest]) -> None:
    if label is not None and label in {column for r in names.values() for column in r.columns}:
        raise UserError(
            f"--label {label}: is also a modality, so the model would see the classes that it is evaluated "
            "with. Remove the column from one of them"
        )


def open_new_rows(
    arguments: argparse.Namespace, schema: TableSchema, modalities: Mapping[str, Modality]
) -> ColumnSource:
    """Open the table of `--like`, with the modalities of a trained run.

    Args:
        arguments: the flags.
        schema: the columns of each modality, see `TableSchema`.
        modalities: those of the run.

    Raises:
        UserError: the table or a flag is wrong; the message gives row and column.
    """
    given = [f"--{name.replace('_', '-')}" for name in SETTINGS if getattr(arguments, name) != SETTINGS[name]]
    given += [f"--{request.kind}" for request in arguments.modalities or ()]
    if given:
        raise UserError(f"{given[0]}: comes from the run with --like. Leave it out")
    schema = with_form(schema, arguments.table, arguments)
    table = _read(arguments.table, schema)
    schema = with_columns_of(schema, table.columns, arguments)
    if arguments.group is not None:
        schema = schema.model_copy(update={"group": arguments.group})
    lacking = find_lacking(arguments.table, table.columns, schema, modalities)
    for name, missing in lacking.items():
        print(f"note: no column {shorten_list(missing)}: {name} is missing in all rows", file=sys.stderr)
    found = {name: modality for name, modality in modalities.items() if name not in lacking}
    columns = {}
    for name, values in read_rows(table, schema, found).items():
        modality = modalities[name]
        columns[name] = make_column(name, values, modality, arguments.on_error)
        if values.kind == modality.kind:
            has_all = all(map(columns[name].has, range(len(table.rows))))
            modality = modality.model_copy(update={"optional": not has_all})
            columns[name] = make_column(name, values, modality, arguments.on_error)
        unknown = describe_unknown(name, count_unknown(values, modality), modality)
        if unknown is not None:
            print(f"note: {unknown}", file=sys.stderr)
    check_columns(columns, table.places)
    problems = Problems()
    rows = _read_purposes(table, schema, arguments, problems)
    problems.raise_all()
    return _make_source(arguments, schema, columns, _named_splits(table, arguments.split, _NEW_ROWS), rows)


class _Purposes(NamedTuple):
    """Of N rows the cells that are no modality."""

    keys: list[str]
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    groups: Sequence[str] | None


def _read(path: Path, schema: TableSchema) -> Table:
    return read_table(path, schema.separator, frozenset(["", *schema.na]))


def _read_purposes(
    table: Table, schema: TableSchema, arguments: argparse.Namespace, problems: Problems
) -> _Purposes:
    labels, class_names, groups = None, None, None
    with problems.collecting():
        if arguments.label is not None:
            labels, class_names = read_labels(
                table.column(arguments.label), f"{table.path}: column {arguments.label}"
            )
    keys = row_keys(table, None)
    with problems.collecting():
        keys = row_keys(table, schema.key)
        check_keys(keys, table.places)
    with problems.collecting():
        groups = None if schema.group is None else table.filled(schema.group)
    return _Purposes(keys, labels, class_names, groups)


def _make_source(
    arguments: argparse.Namespace,
    schema: TableSchema,
    columns: Mapping[str, Column],
    splits: Splits,
    rows: _Purposes,
) -> ColumnSource:
    return ColumnSource(
        name=arguments.name or arguments.out.name,
        columns=columns,
        splits={split: members for split, members in splits.items() if len(members)},
        labels=rows.labels,
        class_names=rows.class_names,
        keys=rows.keys,
        settings={
            "source": "table",
            "table": str(arguments.table),
            **{
                name: f"{column.modality.kind} {','.join(schema.columns[name])}"
                for name, column in columns.items()
            },
            "label": arguments.label,
            "split": arguments.split,
            "group": arguments.group,
            "fractions": None if arguments.like is not None else fractions_text(arguments.fractions),
        },
        groups=rows.groups,
        table=schema,
    )


def _name_modalities(
    requests: Sequence[ModalityRequest], table: Table, excluded: Set[str | None], problems: Problems
) -> dict[str, ModalityRequest]:
    """Resolve names and patterns; patterns do not select the columns `excluded`."""
    named: dict[str, ModalityRequest] = {}
    for request in requests:
        with problems.collecting():
            _name_modality(request, table, excluded, named)
    return named


def _name_modality(
    request: ModalityRequest, table: Table, excluded: Set[str | None], named: dict[str, ModalityRequest]
) -> None:
    if request.text in table.columns:
        request = ModalityRequest(request.kind, None, (request.text,))
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


def _fit_column(
    request: ModalityRequest, table: Table, train: np.ndarray, decimal: str, arguments: argparse.Namespace
) -> Column:
    name = str(request.name)
    if request.kind == "date":
        values = read_dates(table, request.columns[0], arguments.date_format)
    else:
        if request.kind == "vector":
            for column in request.columns:
                _refuse_ids(table, column)
        values = read_cells(request.kind, request.columns, table, decimal)
    return fit_column(name, f"{table.path}: column {request.columns[0]}", values, train, arguments)


def _refuse_ids(table: Table, column: str) -> None:
    """Refuse integers that only count the rows."""
    if are_ids([cell for cell in table.column(column) if cell is not None]):
        raise UserError(
            f"{table.path}: column {column}: its integers all differ and are in order, as ids are, which "
            f"say nothing about a sample. Leave it out, or use it as --key {column} (for times, --date "
            f"{column}). If it is a measurement, sort the rows by another column"
        )


def _named_splits(table: Table, column: str | None, default: SplitName) -> Splits:
    """The split that a column names for each row; without a column all rows are in the split `default`."""
    named = np.full(len(table.row_numbers), default, dtype=object)
    if column is not None:
        for row, cell in enumerate(table.filled(column)):
            try:
                named[row] = read_split(cell)
            except ValueError as error:
                raise UserError(f"{table.places[row]}, column {column}: {error}") from error
    return {split: np.flatnonzero(named == split) for split in SPLIT_NUMBERS}


def _draw_missing_splits(
    table: Table, splits: Splits, rows: _Purposes, arguments: argparse.Namespace
) -> Splits:
    """The splits, of which those without rows are drawn from the train split."""
    undivided = splits["train"]
    if len(undivided) == 0:
        raise UserError(
            f"{table.path}: column {arguments.split}: no row is in the train split. Assign some to it"
        )
    _, validation, test = arguments.fractions
    validation *= len(splits["validation"]) == 0
    test *= len(splits["test"]) == 0
    if not validation and not test:
        return splits
    groups = rows.groups
    group_of_row = np.arange(len(rows.keys)) if groups is None else np.unique(groups, return_inverse=True)[1]
    drawn = draw_splits(
        group_of_row[undivided],
        (1 - validation - test, validation, test),
        random_stream(arguments.seed, _SPLIT_STREAM),
        labels=None if rows.labels is None else rows.labels[undivided],
    )
    return splits | {split: undivided[members] for split, members in drawn.items() if len(members)}


def _warn_of_shared_images(columns: Mapping[str, Column], splits: Splits) -> None:
    """Warn if an image file is in train and in another split, which makes results on that split too good."""
    for name, column in columns.items():
        if isinstance(column, ImageColumn):
            of_train = {column.originals[row] for row in splits["train"].tolist()} - {None}
            held_out = np.concatenate([splits["validation"], splits["test"]]).tolist()
            shared = {column.originals[row] for row in held_out} & of_train
            if shared:
                print(
                    f"warning: {name}: {len(shared):,} images are in train and in another split, for example "
                    f"{min(str(path) for path in shared)}. Give --group with the column of the images",
                    file=sys.stderr,
                )
