"""Compare clusterings: python tools/benchmarks/clusters.py --shared ../shared/data --out runs/clusters.

Packs missing data, runs missing cells, appends each finished cell to results.jsonl, and writes table.md and
figure.png.
After an interruption, the same command continues.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from clusters_data import ALL, DATA_SETS, DataSet, FeatureReader, View, feature_sets
from clusters_methods import METHODS, NotRunError
from clusters_ours import ROOT, TITLES, VARIANTS, find_clusters, run_command
from clusters_results import Cell, Results
from threadpoolctl import threadpool_limits

from cmvae.clustering import clustering_metrics
from cmvae.data.index import INDEX_NAME, ShardIndex
from cmvae.utils.arguments import positive_integer
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole
from cmvae.utils.process_exit import run_main
from cmvae.utils.progress import progress_bar

_ALL_TITLES = {**{name: method.title for name, method in METHODS.items()}, **TITLES}


def _names_of(known: Sequence[str]) -> Any:
    def read(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return read


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Compare clusterings by data set, method and seed: ACC, NMI, ARI, clusters, time.",
        epilog="mvlearn is optional; without it, its cells are reported as not run. Install it with "
        "`pip install --no-deps mvlearn seaborn`: its dependencies would replace matplotlib by a version of "
        "2021.",
    )
    data_sets, methods = list(DATA_SETS), [*METHODS, *VARIANTS]
    parser.add_argument(
        "--shared",
        type=Path,
        default=Path("../shared/data"),
        metavar="FOLDER",
        help="data to pack: mfeat.csv, cub_mini64/, mnist.npz, polymnist_backgrounds/ (default: %(default)s)",
    )
    parser.add_argument(
        "--shards",
        type=Path,
        default=Path("shards"),
        metavar="FOLDER",
        help="packed data; missing data sets are packed into it (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/clusters"),
        metavar="FOLDER",
        help="for results.jsonl, table.md, figure.png, and the runs of our models (default: %(default)s)",
    )
    parser.add_argument(
        "--data",
        type=_names_of(data_sets),
        default=data_sets,
        metavar="NAME,…",
        help=f"some of {', '.join(data_sets)} (default: all)",
    )
    parser.add_argument(
        "--methods",
        type=_names_of(methods),
        default=methods,
        metavar="NAME,…",
        help=f"some of {', '.join(methods)} (default: all)",
    )
    parser.add_argument(
        "--seeds",
        type=positive_integer,
        default=3,
        metavar="N",
        help="seeds 0 to N − 1 (default: %(default)s)",
    )
    parser.add_argument("--threads", type=positive_integer, metavar="N", help="threads (default: all)")
    return parser.parse_args(arguments)


def pack(data_set: DataSet, arguments: argparse.Namespace) -> Path:
    """Pack a data set with the user's command, unless it exists; returns the folder."""
    location: Path = arguments.shards / data_set.folder
    if not (location / INDEX_NAME).is_file():
        source = data_set.pack(arguments.shared, arguments.out / "tables")
        log = arguments.out / "logs" / f"pack-{data_set.name}.log"
        run_command(["pack", *source, "--out", str(location)], log)
    return location


def cells_of(
    data_set: DataSet, view: View, index: ShardIndex, methods: Sequence[str], num_seeds: int
) -> Iterator[Cell]:
    """The cells of one view of a data set."""
    features = feature_sets(view, index)
    for name in methods:
        for seed in range(num_seeds):
            if name in VARIANTS:
                seen = view.alone[0] if view.alone and not view.together else str(ALL)
                for told in (False, True):
                    yield Cell(data_set.name, view.rows, name, seen, told, seed)
                continue
            for wanted in features:
                if METHODS[name].takes(wanted):
                    yield Cell(data_set.name, view.rows, name, str(wanted), True, seed)


class Suite:
    """Runs cells.

    Args:
        out: folder of the suite.
        locations: name of a data set → packed data.
    """

    def __init__(self, out: Path, locations: dict[str, Path]) -> None:
        self._out, self._locations = out, locations
        self._reader: FeatureReader | None = None
        self._versions = _versions()

    def run(self, cell: Cell) -> dict[str, Any]:
        """Values of a cell, see `Results.add`; `not_run` with the reason if it cannot be run.

        Raises:
            UserError: a command failed, or data is missing or damaged.
        """
        data_set, location = DATA_SETS[cell.data], self._locations[cell.data]
        view = data_set.view(cell.rows)
        seconds, note = None, ""
        if cell.method in VARIANTS:
            self._reader = None  # frees memory for the training
            clusters, labels = find_clusters(
                self._out, data_set, view, location, cell.method, cell.seed, cell.told
            )
        else:
            reader, method = self._read(location, data_set, view), METHODS[cell.method]
            wanted = next(one for one in feature_sets(view, reader.index) if str(one) == cell.features)
            if not method.by_modality:
                reader.features(wanted)  # cached, so that no method is charged with their time
            started = time.perf_counter()
            try:
                found = method.assign(reader, wanted, len(reader.index.class_names or ()), cell.seed)
            except NotRunError as error:
                return {"not_run": str(error)}
            seconds = round(time.perf_counter() - started, 3)
            clusters, labels = found.clusters, reader.labels[found.rows]
            num_fitted = len(found.rows) if found.fitted else reader.num_fitted
            note = f"fitted on {num_fitted:,}, compared on {len(found.rows):,}"
            note += f", {found.note}" if found.note else ""
        metrics = clustering_metrics(clusters, labels)
        return {**metrics, "seconds": seconds, "note": note, "versions": self._versions}

    def _read(self, location: Path, data_set: DataSet, view: View) -> FeatureReader:
        """The reader of a view; that of another view is dropped, it may hold gigabytes."""
        reader = self._reader
        if reader is None or (reader.data_set, reader.view) != (data_set, view):
            self._reader = None
            reader = self._reader = FeatureReader(location, data_set, view)
        return reader


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("numpy", "scikit-learn", "torch", "mvlearn"):
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    with suppress(OSError):
        versions["commit"] = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return versions


def run_suite(arguments: argparse.Namespace, results: Results) -> None:
    """Pack missing data and run missing cells.

    Raises:
        UserError: a command failed.
    """
    chosen = [DATA_SETS[name] for name in DATA_SETS if name in arguments.data]
    locations = {data_set.name: pack(data_set, arguments) for data_set in chosen}
    cells = [
        cell
        for data_set in chosen
        for view in data_set.views
        for cell in cells_of(
            data_set, view, ShardIndex.load(locations[data_set.name]), arguments.methods, arguments.seeds
        )
    ]
    missing = [cell for cell in cells if cell not in results]
    suite = Suite(arguments.out, locations)
    with progress_bar(unit=" cells", initial=len(cells) - len(missing), total=len(cells)) as bar:
        for cell in missing:
            # Refreshed at once on a terminal, because the bar may not move for minutes.
            title = f"{cell.data}, {_ALL_TITLES[cell.method]}, seed {cell.seed}"
            bar.set_description(title, refresh=sys.stderr.isatty())
            results.add(cell, suite.run(cell))
            bar.update()


def main() -> int:
    """Run, and write the table and the figure of all cells, including those of earlier calls."""
    arguments = parse_arguments()
    # As an exception, so that a running training ends, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if arguments.threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for the trainings
        torch.set_num_threads(arguments.threads)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {arguments.out}: cannot be written: {error}. Give another") from error
    results = Results(arguments.out / "results.jsonl")
    with threadpool_limits(arguments.threads):
        try:
            run_suite(arguments, results)
        finally:
            table = results.format_table(_ALL_TITLES, list(DATA_SETS))
            write_whole(arguments.out / "table.md", table.encode())
            results.draw(_ALL_TITLES, list(DATA_SETS)).savefig(arguments.out / "figure.png")
    print(f"written to {arguments.out}: results.jsonl, table.md, figure.png")
    return 0


if __name__ == "__main__":
    run_main(main)
