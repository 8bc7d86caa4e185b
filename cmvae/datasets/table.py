"""A user's own table, CSV or Parquet: one sample per row; cells hold values or paths of images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmvae.data.index import SplitName, TableSchema
from cmvae.datasets.base import SPLIT_NUMBERS, random_stream
from cmvae.datasets.columns import Column, ColumnSource, ImageColumn, fit_vector, number_classes
from cmvae.datasets.splits import Splits, draw_splits, fractions_text
from cmvae.datasets.table_file import Table, read_table
from cmvae.datasets.table_rows import (
    add_form_arguments,
    find_lacking,
    read_cells,
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
    fit_settings,
    make_name,
    read_split,
    shorten_list,
    warn_of_constant,
)
from cmvae.datasets.values import (
    Kind,
    count_unknown,
    describe_unknown,
    fit_modality,
    make_column,
)
from cmvae.modalities import Modality, check_name
from cmvae.utils.errors import UserError

DESCRIPTION = "your own table, CSV or Parquet: columns of values, texts and paths of images"

_SPLIT_STREAM = 0
_OF_SEVERAL_COLUMNS = {"vector", "binary"}
_NEW_ROWS: SplitName = "test"
"""Split of the rows of `--like`, which are for a model that is already trained."""


class ModalityRequest(NamedTuple):
    """One flag such as `--vector size=length,width`."""

    kind: Kind
    name: str | None
    """Name that the user gives; None makes one from the columns."""
    columns: tuple[str, ...]
    """Names of columns, or patterns with `*`."""


def _request(kind: Kind, text: str) -> ModalityRequest:
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
    helps: dict[Kind, str] = {
        "image": "a column of paths of images, relative to the table's folder",
        "text": "a column of sentences",
        "vector": "columns of numbers that form one modality; 'pixel_*' selects all that match",
        "binary": "columns of 0 and 1, true and false, or yes and no",
        "categorical": "a column of names, or of numbers that stand for names",
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
    add_shared_arguments(parser)


def config_for(arguments: argparse.Namespace) -> None:
    """None: a starter config is made from the data."""


def from_arguments(arguments: argparse.Namespace) -> ColumnSource:
    """Open the table that the flags describe, as data to train on.

    Raises:
        UserError: the table or a flag is wrong; the message gives row and column.
    """
    if not arguments.modalities:
        raise UserError("no modality is given. Add --image, --text, --vector, --binary or --categorical")
    form = with_form(TableSchema(columns={}, group=arguments.group), arguments)
    table = _read(arguments.table, form)
    # Patterns do not select columns that have another purpose.
    excluded = {arguments.label, arguments.split, arguments.group, arguments.key}
    names = _name_modalities(arguments.modalities, table, excluded)
    schema = form.model_copy(update={"columns": {name: request.columns for name, request in names.items()}})
    if arguments.label is not None and arguments.label in {c for r in names.values() for c in r.columns}:
        raise UserError(
            f"--label {arguments.label}: is also a modality, so the model would see the classes that it is "
            "evaluated with. Remove the column from one of them"
        )
    rows = _read_purposes(table, schema, arguments)
    splits = _draw_missing_splits(table, _named_splits(table, arguments.split, "train"), rows, arguments)
    columns = {
        name: _fit_column(request, table, splits["train"], form.decimal, arguments)
        for name, request in names.items()
    }
    check_columns(columns, table.places)
    _warn_of_shared_images(columns, splits)
    return _make_source(arguments, schema, columns, splits, rows)


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
    schema = with_form(schema, arguments)
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
        column = make_column(name, values, modalities[name])
        has_all = all(map(column.has, range(len(table.rows))))
        modality = modalities[name].model_copy(update={"optional": not has_all})
        columns[name] = make_column(name, values, modality)
        unknown = describe_unknown(name, count_unknown(values, modality), modality)
        if unknown is not None:
            print(f"note: {unknown}", file=sys.stderr)
    check_columns(columns, table.places)
    rows = _read_purposes(table, schema, arguments)
    return _make_source(arguments, schema, columns, _named_splits(table, arguments.split, _NEW_ROWS), rows)


class _Purposes(NamedTuple):
    """Of N rows the cells that are no modality."""

    keys: list[str]
    labels: np.ndarray | None
    class_names: tuple[str, ...] | None
    groups: Sequence[str] | None


def _read(path: Path, schema: TableSchema) -> Table:
    return read_table(path, schema.separator, frozenset(["", *schema.na]))


def _read_purposes(table: Table, schema: TableSchema, arguments: argparse.Namespace) -> _Purposes:
    labels, class_names = None, None
    if arguments.label is not None:
        labels, class_names = number_classes(table.filled(arguments.label))
    keys = row_keys(table, schema.key)
    check_keys(keys, table.places)
    return _Purposes(keys, labels, class_names, None if schema.group is None else table.filled(schema.group))


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


def _fit_column(
    request: ModalityRequest, table: Table, train: np.ndarray, decimal: str, arguments: argparse.Namespace
) -> Column:
    values = read_cells(request.kind, request.columns, table, decimal)
    modality: Modality
    if request.kind == "vector":
        modality, constant = fit_vector(np.asarray(values.data), request.columns, train)
        warn_of_constant(str(request.name), constant)
    else:
        what = f"{table.path}: column {request.columns[0]}"
        modality = fit_modality(what, values, train, fit_settings(arguments))
    return make_column(str(request.name), values, modality)


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
            of_train = {column.paths[row] for row in splits["train"].tolist()} - {None}
            held_out = np.concatenate([splits["validation"], splits["test"]]).tolist()
            shared = {column.paths[row] for row in held_out} & of_train
            if shared:
                print(
                    f"warning: {name}: {len(shared):,} images are in train and in another split, for example "
                    f"{min(str(path) for path in shared)}. Give --group with the column of the images",
                    file=sys.stderr,
                )
