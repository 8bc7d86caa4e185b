"""Results of the clustering suite: one JSON line per cell, and tables of means."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cmvae.utils.errors import UserError
from cmvae.utils.tables import markdown_table

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
        UserError: a line is damaged, or the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: dict[Cell, Mapping[str, Any]] = {}
        if not path.exists():
            return
        try:
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if len(whole) < len(content):
                os.truncate(path, len(whole))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error}. Give another --out") from error
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                values = json.loads(line)
                cell = Cell(**{name: values[name] for name in Cell.__dataclass_fields__})
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{path}: line {number} is no cell of this suite ({error!r}). Delete the line, and its "
                    "cell is run again"
                ) from error
            self._lines[cell] = values

    def __contains__(self, cell: Cell) -> bool:
        """Whether a cell was computed; cells that could not be run are tried again."""
        return "not_run" not in self._lines.get(cell, {"not_run": ""})

    def add(self, cell: Cell, values: Mapping[str, Any]) -> None:
        """Append a line.

        Args:
            cell: the cell.
            values: `num_clusters`, the metrics, `seconds`, `note` and `versions`; or `not_run`, the reason.

        Raises:
            UserError: the file cannot be written.
        """
        line = {**asdict(cell), **values}
        if line == self._lines.get(cell):
            return
        self._lines[cell] = line
        try:
            with self._path.open("ab") as file:
                file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self._path}: cannot be written: {error}. Give another --out") from error

    def groups(self) -> list[Group]:
        """Group the cells that differ in their seed only, in the order of the file."""
        groups: dict[Cell, list[Mapping[str, Any]]] = {}
        for cell, line in self._lines.items():
            groups.setdefault(Cell(**{**asdict(cell), "seed": 0}), []).append(line)
        return [Group(cell, lines) for cell, lines in groups.items()]


@dataclass(frozen=True)
class Group:
    """The cells that differ in their seed only."""

    cell: Cell
    """One of the cells; its seed is not used."""
    lines: Sequence[Mapping[str, Any]]

    @property
    def not_run(self) -> str | None:
        """Why no seed could be run; None if one was."""
        reasons = [line.get("not_run") for line in self.lines]
        return None if None in reasons else str(reasons[0])

    @property
    def notes(self) -> list[str]:
        """The remarks of the cells, without duplicates."""
        return list(dict.fromkeys(line["note"] for line in self.lines if line.get("note")))

    def values(self, metric: str) -> list[float]:
        """Values of a metric, one per seed that was run."""
        return [line[metric] for line in self.lines if "not_run" not in line]

    def mean(self, metric: str) -> float:
        """Mean of a metric over the seeds that were run."""
        return statistics.fmean(self.values(metric))


def format_table(groups: Sequence[Group], titles: Mapping[str, str], order: Sequence[str]) -> str:
    """Format a summary and one table per data set in Markdown, with means and standard deviations over seeds.

    Args:
        groups: all groups.
        titles: method → title, in the order of the rows.
        order: names of the data sets, in their order.
    """
    columns, rows = summarise(groups, titles, order)
    summary = [
        [row, *(" / ".join(f"{cell[m]:.3f}" for m in METRICS) if cell else "–" for cell in cells)]
        for row, cells in rows.items()
    ]
    parts = ["# Clusters", "ACC / NMI / ARI, means over seeds.", markdown_table(["", *columns], summary)]
    parts.append("Best modality: the one with the highest NMI, that is, chosen by labels.")
    for data in order:
        of_data = [group for group in groups if group.cell.data == data]
        if of_data:
            parts += [f"## {data}", _format_data_set(of_data, titles)]
    return "\n\n".join(parts) + "\n"


def _format_data_set(groups: Sequence[Group], titles: Mapping[str, str]) -> str:
    notes = list(dict.fromkeys(note for group in groups for note in group.notes))
    kinds, methods = list(dict.fromkeys(group.cell.rows for group in groups)), list(titles)
    many_rows = len(kinds) > 1
    lines = []
    for group in sorted(groups, key=lambda g: (kinds.index(g.cell.rows), methods.index(g.cell.method))):
        cell = group.cell
        marks = "".join(f" [{notes.index(note) + 1}]" for note in group.notes)
        line = [*([cell.rows] if many_rows else []), titles[cell.method] + marks, cell.features]
        line.append("told" if cell.told else "found")
        if group.not_run is not None:
            lines.append([*line, f"not run: {group.not_run}", *[""] * 5])
            continue
        line.append(str(len(group.values("seconds"))))
        line.append(_counts(group.values("num_clusters")))
        line += [_spread(group.values(metric), 3) for metric in METRICS]
        lines.append([*line, f"{group.mean('seconds'):.1f}"])
    header = ["method", "features", "number", "seeds", "clusters", "ACC", "NMI", "ARI", "seconds"]
    table = markdown_table(["row", *header] if many_rows else header, lines)
    footnotes = [f"[{number}] {note}." for number, note in enumerate(notes, 1)]
    return "\n\n".join([table, *footnotes])


def _counts(values: Sequence[float]) -> str:
    """Numbers of clusters of the seeds; one number where they agree."""
    counts = [f"{value:g}" for value in values]
    return counts[0] if len(set(counts)) == 1 else ", ".join(counts)


def _spread(values: Sequence[float], digits: int) -> str:
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


Summary = tuple[list[str], dict[str, list[dict[str, float] | None]]]


def summarise(groups: Sequence[Group], titles: Mapping[str, str], order: Sequence[str]) -> Summary:
    """Summarise methods by data sets: each method on all modalities, and on the best one by NMI.

    Args:
        groups: all groups.
        titles: method → title, in the order of the rows.
        order: names of the data sets, in their order.

    Returns:
        Names of the columns (data sets, or rows of a data set), and title → mean metrics per column, None
        where there are none.
    """
    found = [group for group in groups if group.not_run is None]
    places = dict.fromkeys((group.cell.data, group.cell.rows) for group in found)
    columns = sorted(places, key=lambda place: order.index(place[0]))
    rows: dict[str, list[dict[str, float] | None]] = {}
    for method, title in titles.items():
        of_method = [group for group in found if group.cell.method == method]
        ours = any(not group.cell.told for group in of_method)
        choices = [
            (f"{title}, all", lambda cell: cell.features == "all"),
            (f"{title}, best modality", lambda cell: cell.features != "all"),
        ]
        if ours:  # always trained on all modalities
            choices = [
                (f"{title}, number found", lambda cell: not cell.told),
                (f"{title}, number told", lambda cell: cell.told),
            ]
        for row, wanted in choices:
            cells = [_best([g for g in of_method if _place(g) == at and wanted(g.cell)]) for at in columns]
            if any(cells):
                rows[row] = cells
    several = {data for data, _ in columns if sum(other == data for other, _ in columns) > 1}
    return [f"{data}, {kind}" if data in several else data for data, kind in columns], rows


def _place(group: Group) -> tuple[str, str]:
    return group.cell.data, group.cell.rows


def _best(groups: Sequence[Group]) -> dict[str, float] | None:
    if not groups:
        return None
    best = max(groups, key=lambda group: group.mean("nmi"))
    return {metric: best.mean(metric) for metric in METRICS}
