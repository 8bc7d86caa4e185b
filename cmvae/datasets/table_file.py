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
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np

from cmvae.utils.errors import UserError

_SEPARATORS = (",", ";", "\t", "|")
_MAX_CELL = 2**31 - 1
"""Characters of a cell; Python's default of 131,072 is less than some texts have."""


@dataclass(frozen=True)
class Table:
    """A table as text; None for an empty cell."""

    path: Path
    cells: Mapping[str, Sequence[str | None]]
    """By column, N rows each."""
    row_numbers: Sequence[int]
    """(N,) number of each row as people count: in a CSV file as a spreadsheet shows it."""

    @property
    def places(self) -> list[str]:
        """(N,) name of each row in messages."""
        return [f"{self.path}: row {number}" for number in self.row_numbers]

    def column(self, name: str) -> Sequence[str | None]:
        """The cells of a column.

        Raises:
            UserError: there is no such column.
        """
        if name not in self.cells:
            near = difflib.get_close_matches(name, self.cells, n=1)
            remedy = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(self.cells)}"
            if len(self.cells) == 1:
                remedy += ". If these are several columns, give their --separator"
            raise UserError(f"{self.path}: no column {name!r}. {remedy}")
        return self.cells[name]

    def matching(self, name: str, excluded: Set[str | None] = frozenset()) -> list[str]:
        """Columns that a name or a pattern with `*` selects; a pattern selects none of `excluded`.

        Raises:
            UserError: there is no such column.
        """
        if name not in self.cells and "*" in name:
            found = [column for column in fnmatch.filter(self.cells, name) if column not in excluded]
            if found:
                return found
        self.column(name)
        return [name]

    def filled(self, name: str) -> Sequence[str]:
        """The cells of a column that must not have empty cells.

        Raises:
            UserError: a cell is empty.
        """
        cells = self.column(name)
        if None in cells:
            place = self.places[cells.index(None)]
            raise UserError(f"{place}, column {name}: empty. Fill the cell, or do not use this column")
        return cast("Sequence[str]", cells)

    def convert(self, name: str, read: Callable[[str], float]) -> np.ndarray:
        """(N,) float64: the cells of a column as numbers, NaN where a cell is empty.

        Args:
            name: the column.
            read: converts a cell; its ValueError says what is wrong.

        Raises:
            UserError: a cell cannot be converted.
        """
        values = np.full(len(self.row_numbers), np.nan)
        for row, cell in enumerate(self.column(name)):
            if cell is not None:
                try:
                    values[row] = read(cell)
                except ValueError as error:
                    raise UserError(f"{self.places[row]}, column {name}: {error}") from error
        return values


def read_table(path: Path, separator: str | None = None, empty: Set[str] = frozenset([""])) -> Table:
    """Read a CSV or Parquet file.

    Rows without any text are ignored, and so are columns without a name.

    Args:
        path: the file; its suffix says the format.
        separator: separator of a CSV file; None takes it from a first line such as `sep=;`, from the suffix
            .tsv, or from the names of the columns.
        empty: texts that mean an empty cell, the empty text among them.

    Raises:
        UserError: the file is missing or damaged or has no rows, or a row has too few or too many cells.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file. Give the path of a .csv, .tsv or .parquet file")
    is_parquet = path.suffix.lower() == ".parquet"
    table = _read_parquet(path, empty) if is_parquet else _read_csv(path, separator, empty)
    if not table.cells or not table.row_numbers:
        raise UserError(f"{path}: has no rows. Give a table with names of columns and at least one row")
    return table


def _read_csv(path: Path, separator: str | None, empty: Set[str]) -> Table:
    csv.field_size_limit(_MAX_CELL)
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
            columns: list[list[str | None]] = []
            row_numbers = []
            for number, row in enumerate(reader, first):
                if not any(cell.strip() for cell in row):
                    continue  # spreadsheets save blank rows, too
                if not header:
                    header, columns = _check_names(path, number, row), [[] for _ in row]
                    continue
                if len(row) != len(header):
                    raise UserError(
                        f"{path}: row {number} has {len(row)} cells, but there are {len(header)} column "
                        "names. Fix the row; a cell with a separator or a line break in it must be quoted"
                    )
                row_numbers.append(number)
                for cells, cell in zip(columns, row, strict=True):
                    text = cell.strip()
                    cells.append(None if text in empty else text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not in UTF-8 ({error}). Save it with this encoding") from error
    except (OSError, csv.Error, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read as CSV after row {number}: {error}. Fix the file, or give its "
            "--separator"
        ) from error
    named = {name: cells for name, cells in zip(header, columns, strict=True) if name}
    return Table(path, named, row_numbers)


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


def _read_parquet(path: Path, empty: Set[str]) -> Table:
    # Slow to import, and only needed here.
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}: cannot be read as Parquet: {error}. Write it again") from error

    def as_text(value: object) -> str | None:
        is_nan = value != value
        text = "" if value is None or is_nan else str(value).strip()
        return None if text in empty else text

    cells = {
        name: [as_text(value) for value in column.to_pylist()]
        for name, column in zip(table.column_names, table.columns, strict=True)
    }
    return Table(path, cells, range(1, table.num_rows + 1))
