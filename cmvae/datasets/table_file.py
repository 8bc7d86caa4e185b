"""Read a table from a CSV or Parquet file as text, with rows numbered for messages as a spreadsheet does.

Python's csv module reads CSV here. pyarrow and pandas accept what it refuses: a quote that is never closed,
which makes the rest of a file one cell, and (pandas) rows with too few cells.
"""

from __future__ import annotations

import csv
import difflib
import fnmatch
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np

from cmvae.utils.errors import UserError, raise_all

_SEPARATORS = (",", ";", "\t", "|")
MAX_CELL = 2**31 - 1
"""Characters of a cell; Python's default of 131,072 is less than some texts have."""


NO_TEXT = "<binary or nested data>"
"""Stands for cells of a Parquet file that have no text."""


@dataclass(frozen=True)
class Table:
    """Consecutive rows of a table as text."""

    path: Path
    names: Sequence[str]
    """(C,) names of the columns, empty for columns without a name."""
    rows: Sequence[Sequence[str]]
    """(N, C) cells as they are in the file."""
    row_numbers: Sequence[int]
    """(N,) number of each row as people count: in a CSV file as a spreadsheet shows it."""
    empty: Set[str]
    """Texts of an empty cell."""
    separator: str = ","
    """Separator of a CSV file."""

    @property
    def places(self) -> list[str]:
        """(N,) name of each row in messages."""
        return [f"{self.path}: row {number}" for number in self.row_numbers]

    @property
    def columns(self) -> list[str]:
        """Names of the columns that have a name."""
        return [name for name in self.names if name]

    def place(self, name: str) -> int:
        """Index of a column.

        Raises:
            UserError: there is no such column.
        """
        known = self.columns
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(known)}"
            if len(known) == 1:
                remedy += ". If these are several columns, give their --separator"
            raise UserError(f"{self.path}: no column {name!r}. {remedy}")
        return self.names.index(name)

    def column(self, name: str) -> list[str | None]:
        """The cells of a column without spaces around them; None for an empty cell.

        Raises:
            UserError: there is no such column.
        """
        place = self.place(name)
        texts = (row[place].strip() for row in self.rows)
        return [None if text in self.empty else text for text in texts]

    def matching(self, name: str, excluded: Set[str | None] = frozenset()) -> list[str]:
        """Columns that a name or a pattern with `*` selects; a pattern selects none of `excluded`.

        Raises:
            UserError: there is no such column.
        """
        if name not in self.columns and "*" in name:
            found = [column for column in fnmatch.filter(self.columns, name) if column not in excluded]
            if found:
                return found
        self.place(name)
        return [name]

    def filled(self, name: str) -> Sequence[str]:
        """The cells of a column that must not have empty cells.

        Raises:
            UserError: a cell is empty.
        """
        cells = self.column(name)
        raise_all(
            f"{self.path}: row {number}, column {name}: empty. Fill the cell, or do not use this column"
            for number, cell in zip(self.row_numbers, cells, strict=True)
            if cell is None
        )
        return cast("Sequence[str]", cells)

    def convert(self, name: str, read: Callable[[str], float]) -> np.ndarray:
        """(N,) float64: the cells of a column as numbers, NaN where a cell is empty.

        Args:
            name: the column.
            read: converts a cell; its ValueError says what is wrong.

        Raises:
            UserError: a cell cannot be converted.
        """
        values, problems = np.full(len(self.row_numbers), np.nan), []
        for row, cell in enumerate(self.column(name)):
            if cell is not None:
                try:
                    values[row] = read(cell)
                except ValueError as error:
                    problems.append(f"{self.path}: row {self.row_numbers[row]}, column {name}: {error}")
        raise_all(problems)
        return values


def read_table(path: Path, separator: str | None = None, empty: Set[str] = frozenset([""])) -> Table:
    """Read a CSV or Parquet file.

    Rows without any text are ignored, and so are columns without a name.

    Args:
        path: the file; its suffix says the format.
        separator: separator of a CSV file; None takes it from a first line such as `sep=;`, from the suffix
            .tsv, or from the names of the columns.
        empty: texts of an empty cell.

    Raises:
        UserError: the file is missing, damaged or has no rows.
    """
    first, *others = read_table_parts(path, separator, empty, sys.maxsize)
    # Parquet may give a large file in several parts.
    rows, numbers = list(first.rows), list(first.row_numbers)
    for part in others:
        rows += part.rows
        numbers += part.row_numbers
    return replace(first, rows=rows, row_numbers=numbers)


def read_table_parts(path: Path, separator: str | None, empty: Set[str], part_size: int) -> Iterator[Table]:
    """Read a CSV or Parquet file in parts of `part_size` rows, one at a time; see `read_table`.

    Raises:
        UserError: the file is missing, damaged or has no rows; also while reading.
    """
    if path.is_dir():
        raise UserError(f"{path}: is a folder. Give one .csv, .tsv or .parquet file with all rows")
    if not path.is_file():
        raise UserError(f"{path}: no such file. Give the path of a .csv, .tsv or .parquet file")
    is_parquet = path.suffix.lower() == ".parquet"
    parts = (
        _read_parquet(path, empty, part_size) if is_parquet else _read_csv(path, separator, empty, part_size)
    )
    has_rows = False
    for part in parts:
        has_rows = True
        yield part
    if not has_rows:
        raise UserError(f"{path}: has no rows. Give a table with names of columns and at least one row")


def _read_csv(path: Path, separator: str | None, empty: Set[str], part_size: int) -> Iterator[Table]:
    csv.field_size_limit(MAX_CELL)
    first = number = 1
    try:
        # "sig": spreadsheets write a signature, which is not part of the first name.
        with path.open(newline="", encoding="utf-8-sig") as file:
            first_line = file.readline()
            declared = re.fullmatch(r'"?sep=(.)"?\s*', first_line)
            if declared is not None:
                first, first_line = 2, file.readline()
            separator = separator or (declared[1] if declared else _guess_separator(path, first_line))
            reader = csv.reader(itertools.chain([first_line], file), delimiter=separator, strict=True)
            header: list[str] = []
            rows: list[list[str]] = []
            row_numbers: list[int] = []
            problems: list[str] = []
            for number, row in enumerate(reader, first):
                if not any(cell.strip() for cell in row):
                    continue  # spreadsheets save blank rows, too
                if not header:
                    header = _check_names(path, number, row)
                    continue
                if len(row) != len(header):
                    problems.append(
                        f"{path}: row {number} has {len(row)} cells, but there are {len(header)} column "
                        "names. Fix the row; a cell with a separator or a line break in it must be quoted"
                    )
                if problems:
                    continue
                row_numbers.append(number)
                rows.append(row)
                if len(rows) == part_size:
                    yield Table(path, header, rows, row_numbers, empty, separator)
                    rows, row_numbers = [], []
            raise_all(problems)
            if rows:
                yield Table(path, header, rows, row_numbers, empty, separator)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not in UTF-8 ({error}). Save it with this encoding") from error
    except (OSError, csv.Error, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read as CSV after row {number}: {error}. Fix the file, or give its "
            "--separator"
        ) from error


def _guess_separator(path: Path, header: str) -> str:
    """The separator that divides the header into the most names; a comma if several do."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max(_SEPARATORS, key=lambda separator: len(next(csv.reader([header], delimiter=separator), [])))


def _check_names(path: Path, number: int, names: Sequence[str]) -> list[str]:
    stripped = [name.strip() for name in names]
    for place, name in enumerate(stripped):
        if name and name in stripped[:place]:
            raise UserError(f"{path}: row {number}: two columns are called {name!r}. Rename one")
    return stripped


def _read_parquet(path: Path, empty: Set[str], part_size: int) -> Iterator[Table]:
    # Slow to import, and only needed here.
    import pyarrow
    from pyarrow import parquet

    def as_text(value: object) -> str:
        is_nan = value != value
        if isinstance(value, (bytes, dict, list)):
            return NO_TEXT
        return "" if value is None or is_nan else str(value)

    first = 1
    try:
        file = parquet.ParquetFile(path)
        for batch in file.iter_batches(min(part_size, max(1, file.metadata.num_rows))):
            columns = [[as_text(value) for value in column.to_pylist()] for column in batch.columns]
            rows = list(zip(*columns, strict=True))
            if rows:
                yield Table(path, batch.schema.names, rows, range(first, first + len(rows)), empty)
            first += len(rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}. Write it again") from error
