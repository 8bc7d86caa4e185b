"""Rows of a table as values of modalities: how cells are read, for training and for new rows."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from cmvae.data.index import TableSchema
from cmvae.datasets.columns import MAX_NUMBER, resolve_inside
from cmvae.datasets.dates import date_parts, read_date, varying_parts
from cmvae.datasets.table_file import NO_TEXT, Table
from cmvae.datasets.values import Kind, Values
from cmvae.modalities import Modality, VectorModality, embedding_of
from cmvae.utils.errors import Problems, UserError

TRUE_AND_FALSE = (("1", "0"), ("1.0", "0.0"), ("true", "false"), ("yes", "no"))
"""Cells of binary columns, in lower case."""
_TRUE, _FALSE = ({pair[place] for pair in TRUE_AND_FALSE} for place in (0, 1))


def add_form_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how the file of a table is read."""
    parser.add_argument(
        "--key", metavar="COLUMN", help="names of the samples in all outputs (default: row-000002, …)"
    )
    parser.add_argument(
        "--na",
        action="append",
        metavar="TEXT",
        help="text of an empty cell, for example NA or '?'; may be repeated",
    )
    parser.add_argument(
        "--separator",
        metavar="CHARACTER",
        help="separator of a CSV file (default: a tab in a .tsv file, otherwise the one of , ; tab | that "
        "the column names show)",
    )
    parser.add_argument("--decimal", choices=(".", ","), help="decimal separator of numbers (default: .)")


def with_form(schema: TableSchema, path: Path, arguments: argparse.Namespace) -> TableSchema:
    """The schema for a file, with what the flags of `add_form_arguments` say.

    Flags that are not given change nothing, except that numbers of a Parquet file have a point.
    """
    given = {name: getattr(arguments, name) for name in ("key", "na", "separator", "decimal")}
    if given["decimal"] is None and path.suffix.lower() == ".parquet":
        given["decimal"] = "."
    if given["na"] is not None:
        given["na"] = tuple(given["na"])
    return schema.model_copy(update={name: value for name, value in given.items() if value is not None})


def with_columns_of(
    schema: TableSchema, columns: Sequence[str], arguments: argparse.Namespace
) -> TableSchema:
    """The schema for a table with some columns: keys and groups of the run are used if it has theirs.

    Args:
        schema: of a run, with the flags of `add_form_arguments`.
        columns: names of the columns of the table.
        arguments: the flags; a column that they name must be there.
    """
    key = schema.key if arguments.key is not None or schema.key in columns else None
    return schema.model_copy(update={"key": key, "group": schema.group if schema.group in columns else None})


def find_lacking(
    path: Path, columns: Sequence[str], schema: TableSchema, modalities: Mapping[str, Modality]
) -> dict[str, list[str]]:
    """The modalities of a run that a table lacks, and which of their columns it lacks.

    Args:
        path: the table, for messages.
        columns: names of its columns.
        schema: the columns of each modality.
        modalities: those of the run.

    Raises:
        UserError: it lacks all modalities.
    """
    lacking = {name: [c for c in schema.columns[name] if c not in columns] for name in modalities}
    if all(lacking.values()):
        expected = ", ".join(column for name in modalities for column in schema.columns[name])
        raise UserError(
            f"{path}: has the columns {', '.join(columns)}, but the run was trained on {expected}. Name the "
            "columns like those"
        )
    return {name: missing for name, missing in lacking.items() if missing}


def read_rows(table: Table, schema: TableSchema, modalities: Mapping[str, Modality]) -> dict[str, Values]:
    """Values of the rows by modality; images or sentences where a pretrained network makes the vectors.

    Args:
        table: the rows.
        schema: the columns of each modality, and how numbers are written.
        modalities: those to read; the table has their columns.

    Raises:
        UserError: a cell cannot be read; the message gives row and column.
    """
    values = {}
    for name, modality in modalities.items():
        columns = schema.columns[name]
        if isinstance(modality, VectorModality) and name in schema.dates:
            values[name] = read_dates(table, columns[0], schema.dates[name], modality.columns)
        else:
            embedding = embedding_of(modality)
            kind = modality.kind if embedding is None else embedding.kind
            values[name] = read_cells(kind, columns, table, schema.decimal)
    return values


def read_dates(table: Table, column: str, form: str | None, names: Sequence[str] | None = None) -> Values:
    """Values of dates, see `date_parts`.

    Args:
        table: the rows.
        column: name of the column.
        form: form of the dates, see `read_date`.
        names: the numbers of a model, in its order; None makes those that fit the dates.

    Raises:
        UserError: a cell is no date; the message gives row and column.
    """
    parts = date_parts(column, table.convert(column, partial(read_date, form=form)))
    if names is None:
        names = varying_parts(parts)
    return Values(
        "vector", np.stack([parts[name] for name in names], axis=1), tuple(names), table.places, exact=True
    )


def read_cells(kind: str, columns: Sequence[str], table: Table, decimal: str) -> Values:
    """Values of one modality.

    Args:
        kind: kind of the modality.
        columns: names of its columns; one, except for vectors and binary modalities.
        table: the rows.
        decimal: decimal separator of numbers.

    Raises:
        UserError: a cell cannot be read; the message gives row and column.
    """
    first = columns[0]
    if kind == "image":
        places = [f"{place}, column {first}" for place in table.places]
        problems = Problems()
        paths: list[Path | None] = []
        for cell, row in zip(table.column(first), places, strict=True):
            paths.append(None)
            with problems.collecting():
                paths[-1] = None if cell is None else _resolve(table.path.parent, cell, row)
        problems.raise_all()
        return Values("image", paths, places=places)
    if kind == "text":
        return Values("text", table.column(first))
    if kind == "categorical":
        return Values("categorical", table.column(first))
    of_numbers: Kind = "vector" if kind == "vector" else "binary"
    read = partial(read_number, decimal) if of_numbers == "vector" else read_yes_or_no
    problems = Problems()
    values = np.full((len(table.row_numbers), len(columns)), np.nan)
    for place, column in enumerate(columns):
        with problems.collecting():
            values[:, place] = table.convert(column, read)
    problems.raise_all()
    return Values(of_numbers, values, tuple(columns), table.places)


def row_keys(table: Table, key: str | None) -> list[str]:
    """Keys of the rows: the cells of a column, or numbers of rows as a spreadsheet shows them.

    Raises:
        UserError: there is no such column, or a cell of it is empty.
    """
    if key is None:
        return [f"row-{number:06d}" for number in table.row_numbers]
    return list(table.filled(key))


def _resolve(folder: Path, text: str, place: str) -> Path:
    if text == NO_TEXT:
        raise UserError(f"{place}: binary or nested data. Save the pictures as files, and give their paths")
    try:
        return resolve_inside(folder, text)
    except ValueError as error:
        raise UserError(f"{place}: {error}") from error


def read_number(decimal: str, text: str) -> float:
    """A number, with a decimal separator.

    Raises:
        ValueError: the text is none, or out of range.
    """
    # `float` accepts 12_34, too. Neither an underscore nor a separator of thousands is guessed away.
    is_plain = re.fullmatch(rf"[^_.,]*({re.escape(decimal)}[^_.,]*)?", text) is not None
    try:
        value = float(text.replace(decimal, ".")) if is_plain else float("nan")
    except ValueError:
        value = float("nan")
    if abs(value) <= MAX_NUMBER:
        return value
    wrong = "not a number" if np.isnan(value) else f"out of the range of single precision, ±{MAX_NUMBER:.1e}"
    other = {".": ",", ",": "."}[decimal]
    if re.fullmatch(rf"[-+]?\d*{re.escape(other)}\d+", text):
        remedy = (
            f"if the {'comma' if other == ',' else 'point'} is the decimal separator, add --decimal {other}"
        )
    else:
        remedy = f"if it means an empty cell, add --na {text!r}"
    raise ValueError(f"{text!r} is {wrong}. Fix it; {remedy}")


def read_yes_or_no(text: str) -> float:
    """1 for yes and 0 for no.

    Raises:
        ValueError: the text is neither.
    """
    if text.lower() in _TRUE | _FALSE:
        return float(text.lower() in _TRUE)
    raise ValueError(
        f"{text!r} is none of {', '.join(sorted(_TRUE | _FALSE))}. Fix it; if it means an empty cell, add "
        f"--na {text!r}"
    )
