"""Tables that are computed in parts: ranks write the parts, rank 0 joins them, and parts outlive a kill."""

from __future__ import annotations

import csv
import heapq
import io
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

from accelerate import Accelerator

from cmvae.commands.data_parts import DataPart, DataParts
from cmvae.datasets.table_file import MAX_CELL
from cmvae.datasets.values import Unknown
from cmvae.distributed import run_on_main
from cmvae.utils.errors import UserError
from cmvae.utils.files import whole_file, write_whole
from cmvae.utils.progress import progress_bar

MAX_OPEN_FILES = 256
"""Parts that are merged at the same time; most systems allow a process 1,024 open files."""
_REQUEST_NAME = "request.json"

Row = Sequence[str]
SortKey = Callable[[Row], Any]


def holds_parts_of(folder: Path, request: Mapping[str, Any]) -> bool:
    """Whether a folder holds parts of a request that was interrupted."""
    path = folder / _REQUEST_NAME
    return path.is_file() and path.read_bytes() == _as_json(request)


def begin_parts(folder: Path, request: Mapping[str, Any]) -> None:
    """Make the folder of the parts of a request; from then on `holds_parts_of` is true.

    Args:
        folder: of the parts; an empty one may be there.
        request: all that the parts depend on; JSON.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _REQUEST_NAME, _as_json(request))


def _as_json(request: Mapping[str, Any]) -> bytes:
    return (json.dumps(request, indent=1, sort_keys=True) + "\n").encode()


class PartFolder:
    """The parts of a table that is being written, in a hidden folder beside it.

    A part is a record, such as counts, and rows of cells. It appears whole or not at all.

    Args:
        out: the table.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out.with_name(f".{out.name}.parts")

    def prepare(self, request: Mapping[str, Any]) -> None:
        """Keep the parts of an interrupted command that did the same, and delete others; for one process.

        Args:
            request: all that the parts depend on; JSON.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            if not holds_parts_of(self.folder, request):
                shutil.rmtree(self.folder, ignore_errors=True)
                begin_parts(self.folder, request)
        except OSError as error:
            raise self._explain(error) from error

    def holds(self, number: int) -> bool:
        """Whether a part is there."""
        return self._path(number).is_file()

    def write(self, number: int, record: Mapping[str, Any], rows: Iterable[Row]) -> None:
        """Write a part.

        Raises:
            UserError: it cannot be written.
        """
        text = io.StringIO(newline="")
        csv.writer(text).writerows([(json.dumps(record),), *rows])
        try:
            write_whole(self._path(number), text.getvalue().encode())
        except OSError as error:
            raise self._explain(error) from error

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of all parts in their order."""
        for path in self._paths():
            with _open(path) as file:
                yield json.loads(next(csv.reader(file))[0])

    def rows(self) -> Iterator[Row]:
        """The rows of all parts in their order."""
        for path in self._paths():
            with _open(path) as file:
                yield from itertools.islice(csv.reader(file), 1, None)

    def sorted_rows(self, key: SortKey) -> Iterator[Row]:
        """The rows of all parts, sorted; each part is sorted already. Holds one row per part in memory.

        Raises:
            UserError: there is no space for intermediate files.
        """
        paths = self._paths()
        for level in itertools.count():
            if len(paths) <= MAX_OPEN_FILES:
                break
            merged = []
            for number, start in enumerate(range(0, len(paths), MAX_OPEN_FILES)):
                path = self.folder / f"merged-{level}-{number:06d}.csv"
                with _merge(paths[start : start + MAX_OPEN_FILES], key) as rows:
                    self._write_rows(path, itertools.chain([()], rows))
                merged.append(path)
            paths = merged
        with _merge(paths, key) as rows:
            yield from rows

    def finish(self, rows: Iterable[Row], separator: str = ",") -> None:
        """Write the table, whole or not at all, and delete the parts.

        Args:
            rows: header and rows, which may be read from the parts.
            separator: separator of the cells.

        Raises:
            UserError: the table cannot be written.
        """
        self._write_rows(self.out, rows, separator)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_rows(self, path: Path, rows: Iterable[Row], separator: str = ",") -> None:
        try:
            with whole_file(path) as file:
                text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
                csv.writer(_UnixLines(text), delimiter=separator).writerows(rows)
                text.detach()
        except OSError as error:
            raise self._explain(error) from error

    def _explain(self, error: OSError) -> UserError:
        return UserError(f"{self.out}: cannot be written: {error}. Free some space, or choose another --out")

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:09d}.csv"

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9]*.csv"))


def merge_unknown(records: Iterable[Mapping[str, Any]]) -> dict[str, Unknown]:
    """What is unknown in all parts, from `unknown` of their records."""
    merged: dict[str, Unknown] = {}
    for record in records:
        for name, (number, total, examples) in record["unknown"].items():
            found = Unknown(number, total, tuple(examples))
            merged[name] = merged[name].merged(found) if name in merged else found
    return merged


class _UnixLines:
    """Ends lines with a line feed alone; csv.writer quotes a carriage return only where it ends lines."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, line: str) -> int:
        return self._file.write(line.removesuffix("\r\n") + "\n")


def compute_parts(
    accelerator: Accelerator,
    data: DataParts,
    folder: PartFolder,
    request: Mapping[str, Any],
    compute: Callable[[DataPart], tuple[Mapping[str, Any], Iterable[Row]]],
) -> None:
    """Compute the parts that are not there yet, each on one of the ranks; must be called on all ranks.

    Draws a progress bar. When it returns, all parts are there.

    Args:
        accelerator: the ranks.
        data: what the parts are computed from.
        folder: where to.
        request: all that the parts depend on besides `data`; JSON.
        compute: part of the data → record and rows.

    Raises:
        UserError: the data is damaged, or a part cannot be written.
    """
    run_on_main(accelerator, lambda: folder.prepare({**request, "data": data.identity}))
    rank, world_size = accelerator.process_index, accelerator.num_processes
    settings = {"total": data.num_samples, "unit": " samples", "leave": False, "disable": rank > 0}
    with progress_bar(desc=str(folder.out), **settings) as progress:
        for part in data:
            if part.number % world_size == rank and not folder.holds(part.number):
                folder.write(part.number, *compute(part))
            progress.update(part.num_samples)
    accelerator.wait_for_everyone()


def _open(path: Path) -> TextIO:
    csv.field_size_limit(MAX_CELL)
    return path.open(newline="", encoding="utf-8")


@contextmanager
def _merge(paths: Sequence[Path], key: SortKey) -> Iterator[Iterator[Row]]:
    """The rows of sorted files in order; the first line of each file is no row."""
    with ExitStack() as stack:
        files = [stack.enter_context(_open(path)) for path in paths]
        yield heapq.merge(*(itertools.islice(csv.reader(file), 1, None) for file in files), key=key)
