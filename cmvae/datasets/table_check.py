"""What the columns of a table look like, for `cmvae pack table --check`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from itertools import pairwise
from typing import NamedTuple

from cmvae.datasets.columns import IMAGE_SUFFIXES
from cmvae.datasets.dates import read_date
from cmvae.datasets.table_file import Table
from cmvae.datasets.table_rows import read_number, read_yes_or_no
from cmvae.modalities.tokenizer import split_words
from cmvae.utils.tables import markdown_table

MIN_IDS = 20
"""With fewer rows, measurements may be in order by chance."""
_MAX_CATEGORIES = 20
_MOSTLY = 0.5
"""If a larger share of the cells is of a form, the others are named as exceptions."""
_FLAGS = {
    "numbers": "vector",
    "yes or no": "binary",
    "dates": "date",
    "images": "image",
    "categories": "categorical",
    "text": "text",
    "key": "key",
}
"""Flag by what a column was taken for."""


class ColumnGuess(NamedTuple):
    """What a column was taken for, and why."""

    form: str
    reason: str


def describe_columns(table: Table, uses: Mapping[str, str]) -> str:
    """A Markdown table: what each column of a table is used for, what it was taken for, and why.

    Args:
        table: the table.
        uses: flag by the name of the column that it uses.
    """
    rows = []
    for name in table.columns:
        guess = guess_column(table.column(name), table.row_numbers)
        flag = _FLAGS.get(guess.form)
        use = uses.get(name) or (f"not used; --{flag} {name}" if flag else "not used")
        rows.append([name, use, guess.form, guess.reason])
    return markdown_table(["column", "used as", "taken for", "because"], rows)


def guess_column(cells: Sequence[str | None], row_numbers: Sequence[int]) -> ColumnGuess:
    """What a column looks like.

    Args:
        cells: (N,) its cells, None for an empty one.
        row_numbers: (N,) numbers of the rows.
    """
    filled = {row: cell for row, cell in zip(row_numbers, cells, strict=True) if cell is not None}
    if not filled:
        return ColumnGuess("nothing", "all cells are empty")
    num_empty = len(cells) - len(filled)
    empty = f"; {num_empty:,} empty" if num_empty else ""
    distinct = set(filled.values())
    if len(distinct) == 1:
        return ColumnGuess("nothing", f"all cells are {_short(next(iter(distinct)))!r}{empty}")
    if are_ids(list(filled.values())):
        return ColumnGuess("key", f"its integers all differ and are in order, as ids are{empty}")
    for form, read in (
        ("yes or no", read_yes_or_no),
        ("numbers", partial(read_number, ".")),
        ("dates", read_date),
    ):
        wrong = {row: cell for row, cell in filled.items() if not _reads(read, cell)}
        if len(wrong) < (1 - _MOSTLY) * len(filled):
            row, cell = next(iter(wrong.items()), (0, ""))
            values = [read(cell) for row, cell in filled.items() if row not in wrong]
            but = f"; not {_short(cell)!r} in row {row:,} and {len(wrong) - 1:,} more" if wrong else ""
            return ColumnGuess(form, f"{_describe_range(form, values)}{but}{empty}")
    if all(re.search(r"\.\w+$", cell) and _suffix(cell) in IMAGE_SUFFIXES for cell in distinct):
        return ColumnGuess("images", f"{len(distinct):,} file names such as {_short(min(distinct))!r}{empty}")
    if len(distinct) <= _MAX_CATEGORIES and not any(" " in cell for cell in distinct):
        names = ", ".join(_short(cell) for cell in sorted(distinct)[:5])
        return ColumnGuess("categories", f"{len(distinct)} names: {names}{empty}")
    if len(distinct) == len(filled) and not any(re.search(r"\s", cell) for cell in distinct):
        return ColumnGuess("key", f"names that all differ, such as {_short(min(distinct))!r}{empty}")
    num_words = sum(len(split_words(cell)) for cell in filled.values()) / len(filled)
    return ColumnGuess("text", f"{len(distinct):,} texts of {num_words:.1f} words on average{empty}")


def are_ids(cells: Sequence[str]) -> bool:
    """Whether cells are integers that only count the rows: all different and in order."""
    if len(cells) < MIN_IDS or not all(re.fullmatch(r"[-+]?\d{1,400}", cell) for cell in cells):
        return False
    numbers = [int(cell) for cell in cells]
    if numbers[0] > numbers[-1]:
        numbers.reverse()
    return all(before < after for before, after in pairwise(numbers))


def _reads(read: Callable[[str], float], cell: str) -> bool:
    try:
        read(cell)
    except ValueError:
        return False
    return True


def _describe_range(form: str, values: Sequence[float]) -> str:
    if form == "yes or no":
        return f"{sum(values):,.0f} of {len(values):,} are yes"
    if form == "dates":
        first, last = (datetime.fromtimestamp(v, timezone.utc).date() for v in (min(values), max(values)))
        return f"from {first} to {last}"
    return f"{len(set(values)):,} different numbers from {min(values):.10g} to {max(values):.10g}"


def _suffix(cell: str) -> str:
    return "." + cell.rpartition(".")[2].lower()


def _short(cell: str) -> str:
    return cell if len(cell) <= 24 else f"{cell[:23]}…"
