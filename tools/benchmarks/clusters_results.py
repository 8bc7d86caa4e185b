"""Results of the clustering suite: one JSON line per cell, and tables and a figure of means."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cmvae.utils.errors import UserError
from cmvae.utils.tables import markdown_table
from cmvae.visualize.style import INK, Figure

METRICS = ("acc", "nmi", "ari")


@dataclass(frozen=True)
class Cell:
    """One clustering of the suite."""

    data: str
    rows: str
    """Name of a row, see `View.rows`."""
    method: str
    features: str
    """`all`, or a modality and its features."""
    told: bool
    """Whether the method is given the number of clusters."""
    seed: int


class Results:
    """The cells of results.jsonl; every added cell is written at once.

    If a killed suite left an unfinished last line, it is removed, and its cell is run again.

    Args:
        path: the file, which may not exist yet.

    Raises:
        UserError: a line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.lines: dict[Cell, Mapping[str, Any]] = {}
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                values = json.loads(line)
                self.lines[Cell(**{name: values[name] for name in Cell.__dataclass_fields__})] = values
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}: line {number} is no cell of this suite ({error!r}). Delete the line, and its "
                    "cell is run again"
                ) from error

    def __contains__(self, cell: Cell) -> bool:
        """Whether a cell was computed; cells that could not be run are tried again."""
        return "not_run" not in self.lines.get(cell, {"not_run": ""})

    def add(self, cell: Cell, values: Mapping[str, Any]) -> None:
        """Append a line.

        Args:
            cell: the cell.
            values: `num_clusters`, the metrics, `seconds` (may be None), `note` and `versions`; or `not_run`,
                the reason.
        """
        line = {**asdict(cell), **values}
        if line == self.lines.get(cell):
            return
        self.lines[cell] = line
        with self._path.open("ab") as file:
            file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def format_table(self, titles: Mapping[str, str], order: Sequence[str]) -> str:
        """Format one Markdown table per data set, with means and standard deviations over seeds.

        Args:
            titles: method → title, in the order of the rows.
            order: names of the data sets, in their order.
        """
        groups, methods = self._groups(), list(titles)
        header = ["row", "method", "features", "number", "seeds", "clusters", *map(str.upper, METRICS)]
        parts = ["# Clusters"]
        for data in order:
            cells = [cell for cell in groups if cell.data == data]
            cells.sort(key=lambda cell: (cell.rows, methods.index(cell.method)))
            rows = [_format_row(cell, titles[cell.method], groups[cell]) for cell in cells]
            if rows:
                parts += [f"## {data}", markdown_table([*header, "seconds", "note"], rows)]
        return "\n\n".join(parts) + "\n"

    def draw(self, titles: Mapping[str, str], order: Sequence[str]) -> Figure:
        """Draw the mean accuracy of each method on each data set, with its best features.

        Args:
            titles: method → title, in the order of the rows.
            order: names of the data sets, in the order of the columns.
        """
        best: dict[tuple[str, str], float] = {}
        for cell, lines in self._groups().items():
            accuracies = [line["acc"] for line in lines if "not_run" not in line]
            if accuracies:
                place = _row_title(cell, titles), f"{cell.data}, by {cell.rows}"
                best[place] = max(statistics.fmean(accuracies), best.get(place, 0.0))
        known = sorted(self.lines, key=lambda cell: (order.index(cell.data), cell.rows))
        columns = list(dict.fromkeys(f"{cell.data}, by {cell.rows}" for cell in known))
        known.sort(key=lambda cell: (list(titles).index(cell.method), cell.told))
        rows = list(dict.fromkeys(_row_title(cell, titles) for cell in known))
        values = np.array([[best.get((row, column), np.nan) for column in columns] for row in rows])
        figure = Figure(figsize=(4 + 0.6 * len(columns), 1.5 + 0.3 * len(rows)), layout="constrained")
        ax = figure.subplots()
        if values.size:
            ax.imshow(values, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if not np.isnan(value):
                colour = "white" if value > 0.5 else INK
                ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
        ax.set_title("ACC", color=INK)
        ax.set_yticks(range(len(rows)), rows, fontsize=8, color=INK)
        ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8, color=INK)
        return figure

    def _groups(self) -> dict[Cell, list[Mapping[str, Any]]]:
        """The lines of cells that differ in the seed only, which is 0 in the key."""
        groups: dict[Cell, list[Mapping[str, Any]]] = {}
        for cell, line in self.lines.items():
            groups.setdefault(replace(cell, seed=0), []).append(line)
        return groups


def _row_title(cell: Cell, titles: Mapping[str, str]) -> str:
    return f"{titles[cell.method]}, {'told' if cell.told else 'found'}"


def _format_row(cell: Cell, title: str, lines: Sequence[Mapping[str, Any]]) -> list[str]:
    done = [line for line in lines if "not_run" not in line]
    row = [cell.rows, title, cell.features, "told" if cell.told else "found", str(len(done))]
    if not done:
        return [*row, *["–"] * (2 + len(METRICS)), f"not run: {lines[0]['not_run']}"]
    row.append(", ".join(dict.fromkeys(f"{line['num_clusters']:g}" for line in done)))
    row += [_spread([line[metric] for line in done], 3) for metric in METRICS]
    seconds = [line["seconds"] for line in done if line["seconds"] is not None]
    row.append(f"{statistics.fmean(seconds):.1f}" if seconds else "–")
    return [*row, "; ".join(dict.fromkeys(line["note"] for line in done if line["note"]))]


def _spread(values: Sequence[float], digits: int) -> str:
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text
