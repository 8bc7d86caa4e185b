"""The missing cells of a table, generated; in constant memory and on any number of ranks."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from cmvae.commands.data_parts import DataPart, LoadedPart, TableParts
from cmvae.commands.new_rows import NewRows
from cmvae.commands.parts import PartFolder, Row, compute_parts, merge_unknown
from cmvae.data.batch import to_device
from cmvae.data.index import TableSchema
from cmvae.datasets.table_file import Table, read_table_parts
from cmvae.datasets.table_rows import TRUE_AND_FALSE
from cmvae.datasets.values import Unknown
from cmvae.distributed import start_evaluation_accelerator
from cmvae.modalities import ImageModality, Modality, VectorModality
from cmvae.modalities.base import ColumnsModality
from cmvae.models.cmvae import CMVAE
from cmvae.models.export import weights_sha256
from cmvae.models.imputation import generate_from_present, predictive_deviation
from cmvae.models.likelihoods import LocationLikelihood
from cmvae.utils.errors import UserError
from cmvae.utils.seeds import derive_seed

Pair = tuple[str, str]
"""Texts of true and false."""


class Imputed(NamedTuple):
    """What was written."""

    num_rows: int
    filled: dict[str, int]
    """Number of filled cells by column."""
    left: dict[str, int]
    """Number of rows that lack a modality that is not written into a table, by modality."""
    unknown: dict[str, Unknown]
    """By modality the words and categories that the model does not know."""


def impute_to_file(
    export: Path, rows: NewRows, out: Path, *, num_draws: int, seed: int, batch_size: int
) -> Imputed | None:
    """Fill the missing cells of a table and write it, whole or not at all; call it on all ranks.

    The result does not depend on the number of ranks. An interrupted call continues with the parts that are
    not computed yet.

    Args:
        export: of the model.
        rows: the table and how it is read.
        out: the table to write.
        num_draws: generations per cell.
        seed: seed of the generations.
        batch_size: rows that are encoded together.

    Returns:
        Counts on rank 0; None on other ranks.

    Raises:
        UserError: the export or the table is damaged or they do not fit, or the file cannot be written.
    """
    accelerator = start_evaluation_accelerator()
    try:
        model = CMVAE.from_pretrained(export, accelerator.device)
        schema = rows.schema.model_copy(update={"key": None, "group": None})
        targets = {n: m for n, m in model.modalities.items() if has_cells(m, schema.columns[n])}
        layout = Layout(rows.head, schema, targets)
        pairs = find_pairs(rows.head.path, schema, targets)
        imputer = _Imputer(model, rows.modalities, targets, layout, pairs, schema.decimal, num_draws)

        def compute(part: DataPart) -> tuple[Mapping[str, Any], Iterable[Row]]:
            generator = torch.Generator(accelerator.device)
            return imputer.fill(part.load(), generator.manual_seed(derive_seed(seed, "impute", part.number)))

        request = {
            "command": "impute",
            "export": weights_sha256(export),
            "draws": num_draws,
            "seed": seed,
            "pairs": pairs,
        }
        folder = PartFolder(out)
        data = TableParts(rows.head.path, schema, rows.modalities, batch_size)
        compute_parts(accelerator, data, folder, request, compute)
        if not accelerator.is_main_process:
            return None
        filled: Counter[str] = Counter()
        left: Counter[str] = Counter()
        num_rows = 0
        for record in folder.records():
            filled.update(record["filled"])
            left.update(record["left"])
            num_rows += record["num_rows"]
        unknown = merge_unknown(folder.records())
        folder.finish(itertools.chain([layout.header], folder.rows()), _separator(out, rows.head))
        by_column = {column: filled[column] for column in layout.filled_columns}
        return Imputed(num_rows, by_column, {name: n for name, n in left.items() if n}, unknown)
    finally:
        accelerator.end_training()


def has_cells(modality: Modality, columns: Sequence[str]) -> bool:
    """Whether values of a modality are cells of its columns; images and dates are not."""
    if isinstance(modality, ColumnsModality):
        return modality.columns == tuple(columns)
    return not isinstance(modality, ImageModality)


class Layout:
    """Columns of the filled table: those of the table, those that it lacks, and the spreads.

    Args:
        head: the first rows of the table.
        schema: the columns of each modality.
        targets: the modalities to fill.

    Raises:
        UserError: the table has a column that is to be added.
    """

    def __init__(self, head: Table, schema: TableSchema, targets: Mapping[str, Modality]) -> None:
        self.columns = {name: schema.columns[name] for name in targets}
        self.filled_columns = list(dict.fromkeys(c for columns in self.columns.values() for c in columns))
        lacking = [column for column in self.filled_columns if column not in head.columns]
        self.spreads = {
            column: f"{column}_{suffix}"
            for name, modality in targets.items()
            if (suffix := _spread_suffix(modality)) is not None
            for column in self.columns[name]
        }
        for spread in self.spreads.values():
            if spread in head.columns:
                raise UserError(
                    f"{head.path}: has a column {spread!r}, where the spread of the draws is to be written. "
                    "Rename it"
                )
        self.header = [*head.names, *lacking, *self.spreads.values()]
        self.places = {column: place for place, column in enumerate(self.header) if column}


class _PartWriter:
    """Rows of a part of the table, whose missing cells are filled."""

    def __init__(self, table: Table, layout: Layout) -> None:
        added = [""] * (len(layout.header) - len(table.names))
        self.rows = [[*row, *added] for row in table.rows]
        self.filled: Counter[str] = Counter()
        self._layout = layout
        self._missing = {
            column: np.array([cell is None for cell in table.column(column)])
            if column in table.columns
            else np.ones(len(table.rows), dtype=bool)
            for column in layout.filled_columns
        }

    def gaps(self, name: str, start: int, count: int) -> np.ndarray:
        """(count,) bool: whether each of the rows from `start` lacks a cell of a modality."""
        missing = [self._missing[column][start : start + count] for column in self._layout.columns[name]]
        lacks: np.ndarray = np.any(missing, axis=0)
        return lacks

    def fill(self, number: int, name: str, cells: Sequence[tuple[str, str]]) -> None:
        """Set the missing cells of a modality in a row.

        Args:
            number: of the row in the part.
            name: of the modality.
            cells: value and spread for each of its columns.
        """
        row, places = self.rows[number], self._layout.places
        for column, (value, spread) in zip(self._layout.columns[name], cells, strict=True):
            if self._missing[column][number]:
                row[places[column]] = value
                if column in self._layout.spreads:
                    row[places[self._layout.spreads[column]]] = spread
                self.filled[column] += 1


@dataclass(frozen=True)
class _Imputer:
    """Generates the missing cells of a part."""

    model: CMVAE
    given: Mapping[str, Modality]
    """The modalities that the table has."""
    targets: Mapping[str, Modality]
    """The modalities to fill."""
    layout: Layout
    pairs: Mapping[str, Sequence[Pair]]
    """By binary modality the texts of each column."""
    decimal: str
    num_draws: int

    def fill(self, part: LoadedPart, generator: torch.Generator) -> tuple[Mapping[str, Any], Iterable[Row]]:
        """The record and the rows of a part."""
        assert part.table is not None  # noqa: S101 (it is a part of a table)
        writer = _PartWriter(part.table, self.layout)
        left = dict.fromkeys((n for n, m in self.model.modalities.items() if n not in self.targets), 0)
        start = 0
        for stored in part.batches:
            batch = to_device(stored, self.given, self.model.private_scale.device)
            present = batch["mask"].cpu().numpy()
            for name in left:
                has = present[:, list(self.given).index(name)] if name in self.given else np.zeros(1)
                left[name] += len(present) - int(has.sum())
            self._fill_batch(writer, start, batch, generator)
            start += len(present)
        record = {"unknown": part.unknown, "filled": writer.filled, "left": left, "num_rows": start}
        return record, writer.rows

    def _fill_batch(
        self, writer: _PartWriter, start: int, batch: Mapping[str, Any], generator: torch.Generator
    ) -> None:
        """Fill the cells of a batch, whose first row is number `start` of the part."""
        mask = batch["mask"]
        gaps = {name: writer.gaps(name, start, len(mask)) for name in self.targets}
        lacking = np.any(list(gaps.values()), axis=0)
        if not lacking.any():
            return
        chosen = torch.from_numpy(lacking).to(mask.device)
        inputs = {name: batch[name][chosen] for name in self.given}
        wanted = [name for name, gap in gaps.items() if gap.any()]
        draws = [
            generate_from_present(self.model, inputs, mask[chosen], wanted, generator)
            for _ in range(self.num_draws)
        ]
        numbers = start + np.flatnonzero(lacking)
        for name in wanted:
            modality, needed = self.targets[name], gaps[name][lacking]
            # (draws, rows, *shape) of the rows that lack a cell of this modality.
            values = np.stack([modality.to_stored(draw[name]) for draw in draws])[:, needed]
            pairs, noise = self.pairs.get(name, ()), self._noise_variance(name)
            for number, sample in zip(numbers[needed].tolist(), values.swapaxes(0, 1), strict=True):
                writer.fill(number, name, summarise(modality, sample, pairs, self.decimal, noise))

    def _noise_variance(self, name: str) -> float:
        """Variance of a modality's likelihood, of data as the model has it; 0 for categories."""
        likelihood = self.model.likelihoods[name]
        if not isinstance(likelihood, LocationLikelihood):
            return 0.0
        return likelihood.variance(self.model.config.modalities[name].likelihood.scale)


def summarise(
    modality: Modality, draws: np.ndarray, pairs: Sequence[Pair], decimal: str, noise_variance: float = 0.0
) -> list[tuple[str, str]]:
    """Cells of a sample of which there are several draws: value and spread for each column.

    Args:
        modality: how the values are stored.
        draws: (draws, *shape) stored values.
        pairs: of a binary modality the texts of each column.
        decimal: decimal separator.
        noise_variance: variance of the likelihood of standardised vectors.
    """
    if isinstance(modality, VectorModality):
        mean = draws.mean(axis=0, dtype=np.float64)
        deviation = predictive_deviation(draws, noise_variance * np.square(modality.std))
        return [
            (_number(value, scale, decimal), _number(spread, scale, decimal))
            for value, spread, scale in zip(mean, deviation, modality.std, strict=True)
        ]
    if isinstance(modality, ColumnsModality):
        shares = draws.mean(axis=0, dtype=np.float64)
        return [
            (pair[0] if share > 0.5 else pair[1], _share(max(share, 1 - share), decimal))
            for share, pair in zip(shares, pairs, strict=True)
        ]
    ((value, count),) = Counter(modality.describe(draw) for draw in draws).most_common(1)
    return [(value, _share(count / len(draws), decimal))]


def find_pairs(path: Path, schema: TableSchema, targets: Mapping[str, Modality]) -> dict[str, list[Pair]]:
    """How each column of the binary modalities of a table writes true and false: 1 and 0, yes and no, ….

    Raises:
        UserError: the table is damaged.
    """
    binary = [
        n for n, m in targets.items() if isinstance(m, ColumnsModality) and not isinstance(m, VectorModality)
    ]
    wanted = {column for name in binary for column in schema.columns[name]}
    found: dict[str, Pair] = {}
    if wanted:
        for table in read_table_parts(path, schema.separator, frozenset(["", *schema.na]), 1000):
            for column in wanted.intersection(table.columns) - found.keys():
                given = [cell for cell in table.column(column) if cell is not None]
                if given:
                    found[column] = _pair_of(given[0])
            if wanted.intersection(table.columns) <= found.keys():
                break
    return {
        name: [found.get(column, TRUE_AND_FALSE[0]) for column in schema.columns[name]] for name in binary
    }


def _pair_of(cell: str) -> Pair:
    """The pair that a cell belongs to, in the case of its letters."""
    pair = next((pair for pair in TRUE_AND_FALSE if cell.lower() in pair), TRUE_AND_FALSE[0])
    for change in (str.upper, str.title):
        if cell == change(cell) != cell.lower():
            return change(pair[0]), change(pair[1])
    return pair


def _spread_suffix(modality: Modality) -> str | None:
    if isinstance(modality, VectorModality):
        return "sd"
    return None if modality.kind == "text" else "confidence"


def _number(value: float, scale: float, decimal: str) -> str:
    """A number, rounded to a thousandth of the deviation `scale` of the training data, or finer."""
    digits = max(0, 3 - math.floor(math.log10(scale)))
    return f"{value:.{digits}f}".replace(".", decimal)


def _share(share: float, decimal: str) -> str:
    return f"{share:.3g}".replace(".", decimal)


def _separator(out: Path, head: Table) -> str:
    if out.suffix.lower() == ".tsv":
        return "\t"
    return "," if head.separator == "\t" else head.separator
