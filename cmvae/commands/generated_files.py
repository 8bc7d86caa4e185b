"""What a model generates, as files, and one picture of the first samples.

Of an image modality a folder of PNG files, of any other a table: text, or numbers in the data's own units.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from torch import Tensor

from cmvae.commands.parts import begin_parts, holds_parts_of
from cmvae.modalities import Modality
from cmvae.utils.attempts import attempt
from cmvae.utils.errors import UserError
from cmvae.utils.files import holds_earlier_output, publish_folder, sync_file, whole_file, write_whole
from cmvae.visualize.grids import sample_rows

RECORD_NAME = "generation.json"
GRID_NAME = "grid.png"
# The picture is for looking at: so many rows of so many samples at most.
_GRID_ROWS, _GRID_COLUMNS = 8, 8


@dataclass(frozen=True)
class Generated:
    """A batch of B joint generations."""

    names: Sequence[str]
    """B file names without ending, unlike all others."""
    values: Mapping[str, Tensor]
    """Modality → data (B, *shape), as `CMVAE.decode` gives it."""
    given: Mapping[str, Tensor] = field(default_factory=dict)
    """Modality → data (B, *shape): what they were generated from."""
    present: Mapping[str, Tensor] = field(default_factory=dict)
    """Modality → (B,) bool, of those given: false where a sample lacks it."""
    group: str = ""
    """What the samples have in common, where there are several groups."""


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """Refuse to bury what is in `folder`: generations unless `overwrite` is set, anything else always.

    Raises:
        UserError: there is something.
    """
    if holds_earlier_output(folder, RECORD_NAME) and not overwrite:
        raise UserError(
            f"--out {folder}: holds earlier generations. Add --overwrite to replace them, or give another "
            "folder"
        )


class GenerationFolder:
    """Generated files: `MODALITY/NAME.png` (or another ending) or `MODALITY.csv`, a picture and a record.

    Parts are written into a hidden folder beside it, which is renamed when all of them are there.

    Args:
        folder: where to; what `check_output_folder` let be replaced is.
        targets: names of the modalities to write.
        modalities: all modalities, by name.
    """

    def __init__(self, folder: Path, targets: Sequence[str], modalities: Mapping[str, Modality]) -> None:
        self.folder = folder
        self._targets, self._modalities = targets, modalities
        self._staging = folder.with_name(f".{folder.name}.generating")
        self._parts = self._staging / ".parts"

    def prepare(self, request: Mapping[str, Any]) -> None:
        """Keep the parts of an interrupted call that did the same, and delete others; for one process.

        Args:
            request: all that the files depend on; JSON.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            if holds_parts_of(self._parts, request):
                return
            self.remove()
            for name in self._targets:
                if not self._modalities[name].table_columns:
                    (self._staging / name).mkdir(parents=True)
            begin_parts(self._parts, request)
        except OSError as error:
            raise self._explain(error) from error

    def remove(self) -> None:
        """Delete the parts."""
        shutil.rmtree(self._staging, ignore_errors=True)

    def holds(self, number: int) -> bool:
        """Whether a part is there."""
        return self._path(number).is_file()

    def write(self, number: int, generated: Iterable[Generated]) -> None:
        """Write a part.

        Raises:
            UserError: it cannot be written.
        """
        count, group = 0, ""
        shown: list[_Shown] = []
        # A part that was interrupted begins anew.
        tables = {name: io.StringIO(newline="") for name in self._targets}
        try:
            for batch in generated:
                made = {name: self._modalities[name].to_stored(batch.values[name]) for name in self._targets}
                for name, values in made.items():
                    _write_values(
                        self._staging, name, self._modalities[name], batch.names, values, tables[name]
                    )
                limit = _GRID_ROWS * _GRID_COLUMNS - len(shown)
                shown += _first_samples(batch, made, self._modalities, limit)
                count, group = count + len(batch.names), batch.group
            for name, table in tables.items():
                if self._modalities[name].table_columns:
                    write_whole(self._parts / f"{number:09d}.{name}.csv", table.getvalue().encode())
            titles = {title: name for title, (name, _) in shown[0].items()} if shown else {}
            with whole_file(self._parts / f"{number:09d}.npz") as file:
                np.savez(file, **_pack_shown(shown))  # type: ignore[arg-type]
            record = {"num_samples": count, "group": group, "titles": titles}
            write_whole(self._path(number), json.dumps(record).encode())
        except OSError as error:
            raise self._explain(error) from error

    @property
    def num_samples(self) -> int:
        """Number of samples of all parts."""
        return sum(record["num_samples"] for _, record in self._records())

    def publish(self, record: Mapping[str, Any]) -> int:
        """Join the tables of the parts, draw the picture, write the record and rename the folder.

        Args:
            record: how the samples were generated, for `generation.json`.

        Returns:
            The number of samples.

        Raises:
            UserError: it cannot be written.
        """
        num_samples = self.num_samples
        try:
            for name in self._targets:
                if self._modalities[name].table_columns:
                    self._join_table(name)
            shown = self._read_shown()
            attempt(GRID_NAME, partial(_draw_grid, self._staging / GRID_NAME, shown, self._modalities))
            text = json.dumps({**record, "num_samples": num_samples}, indent=2, ensure_ascii=False)
            (self._staging / RECORD_NAME).write_text(text + "\n", encoding="utf-8")
            shutil.rmtree(self._parts)
            publish_folder(self._staging, self.folder)
        except OSError as error:
            raise self._explain(error) from error
        return num_samples

    def _join_table(self, name: str) -> None:
        with (self._staging / f"{name}.csv").open("w", newline="", encoding="utf-8") as table:
            csv.writer(table).writerow(("name", *self._modalities[name].table_columns))
            for number, _ in self._records():
                part = self._parts / f"{number:09d}.{name}.csv"
                with part.open(newline="", encoding="utf-8") as rows:
                    shutil.copyfileobj(rows, table)

    def _read_shown(self) -> dict[str, list[_Shown]]:
        """By group its first samples."""
        groups: dict[str, list[_Shown]] = {}
        for number, record in self._records():
            if record["num_samples"]:
                shown = groups.setdefault(record["group"], [])
                limit = _GRID_ROWS * _GRID_COLUMNS - len(shown)
                if limit > 0:
                    with np.load(self._parts / f"{number:09d}.npz", allow_pickle=False) as arrays:
                        shown += _unpack_shown(arrays, record["titles"])[:limit]
        return groups

    def _records(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for path in sorted(self._parts.glob("[0-9]*.json")):
            yield int(path.stem), json.loads(path.read_bytes())

    def _path(self, number: int) -> Path:
        return self._parts / f"{number:09d}.json"

    def _explain(self, error: OSError) -> UserError:
        return UserError(f"{self.folder}: cannot be written: {error}")


def _write_values(
    folder: Path,
    name: str,
    modality: Modality,
    value_names: Sequence[str],
    values: np.ndarray,
    table: TextIO,
) -> None:
    """Write stored values (B, *shape) of one modality, called `value_names`, to files or rows of a table."""
    for value_name, value in zip(value_names, values, strict=True):
        if modality.table_columns:
            csv.writer(table).writerow((value_name, *modality.table_cells(value)))
        else:
            path = folder / name / f"{value_name}.{modality.suffix}"
            path.write_bytes(modality.encode(value))
            sync_file(path)


_Shown = Mapping[str, tuple[str, np.ndarray | None]]
"""One sample of the picture: by title of a block its modality and the stored value, None if it is missing."""


def _first_samples(
    batch: Generated, made: Mapping[str, np.ndarray], modalities: Mapping[str, Modality], limit: int
) -> list[_Shown]:
    """The first samples of a batch: what was given beside what was made, as stored by modality."""
    if limit <= 0:
        return []
    blocks = {f"given {name}": (name, modalities[name].to_stored(x)) for name, x in batch.given.items()}
    for name, values in made.items():
        blocks[f"→ {name}" if batch.given else name] = (name, values)
    lacking = {f"given {name}": (~there).tolist() for name, there in batch.present.items()}
    return [
        {
            title: (name, None if title in lacking and lacking[title][place] else values[place])
            for title, (name, values) in blocks.items()
        }
        for place in range(min(len(batch.names), limit))
    ]


def _pack_shown(shown: Sequence[_Shown]) -> dict[str, np.ndarray]:
    """Samples as arrays; the inverse of `_unpack_shown`."""
    arrays = {}
    for place, title in enumerate(shown[0] if shown else ()):
        values = [sample[title][1] for sample in shown]
        present = np.array([value is not None for value in values])
        arrays[f"present{place}"] = present
        arrays[f"values{place}"] = np.stack([value for value in values if value is not None] or [np.zeros(0)])
    return arrays


def _unpack_shown(arrays: Mapping[str, np.ndarray], titles: Mapping[str, str]) -> list[_Shown]:
    """The samples, whose blocks have these titles and modalities."""
    blocks: dict[str, list[tuple[str, np.ndarray | None]]] = {}
    for place, (title, name) in enumerate(titles.items()):
        values = iter(arrays[f"values{place}"])
        blocks[title] = [(name, next(values) if there else None) for there in arrays[f"present{place}"]]
    return [dict(zip(blocks, sample, strict=True)) for sample in zip(*blocks.values(), strict=True)]


def _draw_grid(path: Path, groups: Mapping[str, list[_Shown]], modalities: Mapping[str, Modality]) -> None:
    """A row a group where there are several; else the samples of the one group, row by row."""
    if len(groups) > 1:
        rows = {title: samples[:_GRID_COLUMNS] for title, samples in groups.items()}
    else:
        ((group, samples),) = groups.items()
        starts = range(0, len(samples), _GRID_COLUMNS)
        rows = {f"{group} {start}…".strip(): samples[start : start + _GRID_COLUMNS] for start in starts}
    num_columns = max(map(len, rows.values()))
    blocks, present, of_blocks = {}, {}, {}
    for block, (name, _) in next(iter(rows.values()))[0].items():
        modality = of_blocks[block] = modalities[name]
        blocks[block] = np.zeros((len(rows), num_columns, *modality.shape), dtype=modality.dtype)
        # The last row may not be full, and of what was given something may be missing.
        present[block] = np.zeros((len(rows), num_columns), dtype=bool)
        for row, samples in enumerate(rows.values()):
            for column, sample in enumerate(samples):
                _, value = sample[block]
                if value is not None:
                    blocks[block][row, column], present[block][row, column] = value, True
    sample_rows(blocks, list(rows), modalities=of_blocks, present=present).savefig(path)
