"""What the clustering suite has computed: one line a cell, a table of means and a figure."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmvae.utils.errors import UserError

if TYPE_CHECKING:  # slow to import
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS = ("acc", "nmi", "ari")
_INK = "#22333b"


@dataclass(frozen=True)
class Cell:
    """One number of the suite: what was clustered how."""

    data: str
    rows: str
    """What a row is, see `View.rows`."""
    method: str
    features: str
    """all, or a modality and what of it."""
    told: bool
    """Whether the method is told the number of clusters."""
    seed: int


class Results:
    """The cells of results.jsonl; each that is added is on the disk at once.

    A last line that a killed suite left unfinished is cut off: its cell is run again.

    Args:
        path: the file, which need not be there yet.

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
        """Whether a cell was computed; one that could not be run is tried again."""
        return "not_run" not in self._lines.get(cell, {"not_run": ""})

    def add(self, cell: Cell, values: Mapping[str, Any]) -> None:
        """Append a line.

        Args:
            cell: what was computed.
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
        """Cells that differ in their seed only, in the order in which they came."""
        groups: dict[Cell, list[Mapping[str, Any]]] = {}
        for cell, line in self._lines.items():
            groups.setdefault(Cell(**{**asdict(cell), "seed": 0}), []).append(line)
        return [Group(cell, lines) for cell, lines in groups.items()]


@dataclass(frozen=True)
class Group:
    """The seeds of one cell."""

    cell: Cell
    """Its seed means nothing."""
    lines: Sequence[Mapping[str, Any]]

    @property
    def not_run(self) -> str | None:
        """Why no seed was run; None if one was."""
        reasons = [line.get("not_run") for line in self.lines]
        return None if None in reasons else str(reasons[0])

    @property
    def notes(self) -> list[str]:
        """What the cells say a reader has to know, each once."""
        return list(dict.fromkeys(line["note"] for line in self.lines if line.get("note")))

    def values(self, metric: str) -> list[float]:
        """Of the seeds that were run."""
        return [line[metric] for line in self.lines if "not_run" not in line]

    def mean(self, metric: str) -> float:
        """Over the seeds that were run."""
        return statistics.fmean(self.values(metric))


def format_table(groups: Sequence[Group], titles: Mapping[str, str], order: Sequence[str]) -> str:
    """Markdown: a summary, then a table a data set, means and standard deviations over seeds.

    Args:
        groups: cells without their seeds.
        titles: of the methods.
        order: of the data sets.
    """
    columns, rows = summarise(groups, titles, order)
    summary = [
        [row, *(" / ".join(f"{cell[m]:.3f}" for m in METRICS) if cell else "–" for cell in cells)]
        for row, cells in rows.items()
    ]
    parts = ["# Clusters", "ACC / NMI / ARI, means over seeds.", _markdown(["", *columns], summary)]
    parts.append("Best modality: the one with the highest NMI, so that labels have chosen it.")
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
    table = _markdown(["row", *header] if many_rows else header, lines)
    footnotes = [f"[{number}] {note}." for number, note in enumerate(notes, 1)]
    return "\n\n".join([table, *footnotes])


def _counts(values: Sequence[float]) -> str:
    """How many clusters the seeds have; one number where they agree."""
    counts = [f"{value:g}" for value in values]
    return counts[0] if len(set(counts)) == 1 else ", ".join(counts)


def _spread(values: Sequence[float], digits: int) -> str:
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


Summary = tuple[list[str], dict[str, list[dict[str, float] | None]]]


def summarise(groups: Sequence[Group], titles: Mapping[str, str], order: Sequence[str]) -> Summary:
    """Methods against data sets: each method on all modalities, and on the best one.

    Args:
        groups: cells without their seeds.
        titles: of the methods, in the order of the rows.
        order: of the data sets.

    Returns:
        Names of the columns, a data set or a kind of rows of it each, and the rows: title to the mean
        metrics in each column, None where there are none. The best modality is that of the highest NMI.
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
        if ours:  # trained on all modalities in any case
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


def draw_figure(groups: Sequence[Group], titles: Mapping[str, str], order: Sequence[str]) -> Figure:
    """Methods × data sets, a panel each for ACC, NMI and ARI: means over seeds as numbers and colours.

    Args:
        groups: cells without their seeds.
        titles: of the methods, in the order of the rows.
        order: of the data sets.
    """
    from matplotlib.figure import Figure

    columns, rows = summarise(groups, titles, order)
    # Below each other, so that numbers are not too small to read where a page is narrow.
    size = (3.4 + 0.58 * len(columns), 1.3 + len(METRICS) * (0.4 + 0.27 * len(rows)))
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    axes = figure.subplots(len(METRICS), 1, squeeze=False, sharex=True)[:, 0]
    for ax, metric in zip(axes, METRICS, strict=True):
        _draw_panel(ax, metric, columns, rows)
    return figure


def _draw_panel(
    ax: Axes, metric: str, columns: Sequence[str], rows: Mapping[str, Sequence[Mapping[str, float] | None]]
) -> None:
    import numpy as np

    values = np.array([[cell[metric] if cell else np.nan for cell in cells] for cells in rows.values()])
    values = values.reshape(len(rows), len(columns))
    ax.imshow(values, vmin=0, vmax=1, cmap="YlGnBu", aspect="auto")
    best = np.nanmax(values, axis=0, initial=-1)
    for (row, column), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        ax.text(
            column,
            row,
            f"{round(value, 2) + 0.0:.2f}".replace("0.", ".", 1),  # no minus before zero
            ha="center",
            va="center",
            fontsize=7.5,
            color="white" if value > 0.5 else _INK,
            fontweight="bold" if value == best[column] else "normal",
        )
    ax.set_title(metric.upper(), fontsize=10, color=_INK, fontweight="bold")
    ax.set_yticks(range(len(rows)), list(rows), fontsize=8, color=_INK)
    ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8, color=_INK)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
