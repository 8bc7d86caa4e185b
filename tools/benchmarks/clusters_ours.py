"""Our models in the clustering suite, trained and assigned by the user's commands."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from clusters_data import DataSet, IntArray, View, read_rows

from cmvae.data.index import ShardIndex
from cmvae.training.starter_config import write_starter_config
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole

ROOT = Path(__file__).resolve().parent.parent.parent

VARIANTS: Mapping[str, tuple[str, ...]] = {
    "ours": (),
    "ours-paper": ("objective.alignment={weight: 0}", "clusters.criterion=entropy", "model.assign_by=vote"),
}
"""Method → settings that it changes in the starter config; `ours-paper` restores those of the paper."""
TITLES: Mapping[str, str] = {"ours": "ours, untuned", "ours-paper": "ours, as in the paper"}

Run = Callable[[Sequence[str], Path], None]
"""Runs a script of this checkout with arguments, with a log file."""


class Found(NamedTuple):
    """Clusters and labels of the rows of a view."""

    clusters: IntArray
    """(N,)"""
    labels: IntArray
    """(N,)"""
    seconds: float
    note: str


def run_command(arguments: Sequence[str], log: Path) -> None:
    """Run a Python script of this checkout.

    Args:
        arguments: the script, relative to the checkout, and its arguments.
        log: file that its output is appended to.

    Raises:
        UserError: it failed; names the last line of its output and the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    # The library of this checkout, not the installed one.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / arguments[0]), *arguments[1:]],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
        )
        try:
            code = process.wait()
        except BaseException as error:
            # Ctrl-C also reaches the process; a SIGTERM to this one does not.
            if not isinstance(error, KeyboardInterrupt):
                process.terminate()
            process.wait()  # a training first writes a checkpoint
            raise
    if code != 0:
        said = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line]
        raise UserError(
            f"{arguments[0]} failed: {said[-1] if said else f'exit code {code}'}. Full output: {log}"
        )


class Trainings:
    """Trainings and tables of clusters below one folder; existing ones are not repeated.

    Args:
        out: folder of the suite.
        run: runs a script.
    """

    def __init__(self, out: Path, run: Run = run_command) -> None:
        self._out, self._run = out, run
        self._failed: dict[str, UserError] = {}

    def find(
        self, data_set: DataSet, view: View, location: Path, variant: str, seed: int, told: bool
    ) -> Found:
        """Find the clusters of the compared rows, after training if that is not done.

        Args:
            data_set: the data set.
            view: its rows.
            location: the packed data.
            variant: one of `VARIANTS`.
            seed: seed of the training.
            told: whether the trained model is given the number of clusters.

        Raises:
            UserError: a command failed, now or before.
        """
        # One training serves several cells, so its failure holds for all of them.
        name = f"{data_set.name}-{variant}-{seed}"
        if name in self._failed:
            raise self._failed[name]
        try:
            self._train(name, data_set, location, variant, seed)
        except UserError as error:
            self._failed[name] = error
            raise
        table = self._assign(name, data_set, view, location, told)
        record = self._record(name)
        clusters, labels = compare_rows(table, data_set, view, location)
        seconds = record["train"] + record[table.stem]
        notes = [record["note"]] if "note" in record else []
        return Found(clusters, labels, seconds, "; ".join(notes))

    def _train(self, name: str, data_set: DataSet, location: Path, variant: str, seed: int) -> None:
        folder, record = self._out / "runs" / name, self._record(name)
        if "train" in record and (folder / "export").exists():
            return
        resumed = (folder / "checkpoints").exists()
        started = time.perf_counter()
        arguments = ["launch/train.py", str(self._write_config(data_set, location)), f"name={name}"]
        arguments += [f"output_dir={folder}", f"seed={seed}", "tracking.enabled=false", *VARIANTS[variant]]
        self._run([*arguments, "--resume"], self._log(name))
        note = {"note": "seconds are those since the last resume"} if resumed else {}
        self._write_record(name, {"train": time.perf_counter() - started, **note})

    def _assign(self, name: str, data_set: DataSet, view: View, location: Path, told: bool) -> Path:
        table = self._out / "assignments" / name / f"{view.rows}-{'told' if told else 'found'}.csv"
        record = self._record(name)
        if table.stem in record and table.is_file():
            return table
        table.parent.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        arguments = ["launch/cluster.py", str(self._out / "runs" / name), str(location), "--out", str(table)]
        if not data_set.whole:
            arguments += ["--split", "test"]
        if view.grouped:
            arguments += ["--by-group"]
        if view.read_from:
            arguments += ["--modalities", ",".join(view.read_from)]
        if told:
            arguments += ["--num-clusters", str(len(ShardIndex.load(location).class_names or ()))]
        self._run([*arguments, "--overwrite"], self._log(name))
        self._write_record(name, {**record, table.stem: time.perf_counter() - started})
        return table

    def _write_config(self, data_set: DataSet, location: Path) -> Path:
        """Write the starter config, as tools/make_shards.py --config does."""
        path = self._out / "configs" / f"{data_set.name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, write_starter_config(ShardIndex.load(location), location).encode())
        return path

    def _log(self, name: str) -> Path:
        return self._out / "logs" / f"{name}.log"

    def _record(self, name: str) -> dict[str, Any]:
        """Step → seconds, of the steps that are done."""
        path = self._out / "seconds" / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def _write_record(self, name: str, record: Mapping[str, Any]) -> None:
        path = self._out / "seconds" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(record).encode())


def compare_rows(table: Path, data_set: DataSet, view: View, location: Path) -> tuple[IntArray, IntArray]:
    """Read the clusters of the rows of a view from a table of launch/cluster.py, and their labels.

    The samples of a group are one row, and have the same cluster in the table.

    Args:
        table: the CSV file.
        data_set: the data set.
        view: the rows.
        location: the packed data.

    Returns:
        (N,) clusters and (N,) labels.

    Raises:
        UserError: the table lacks the cluster of a sample that is compared.
    """
    rows = read_rows(location, data_set.compared, [])
    with table.open(newline="", encoding="utf-8") as file:
        cluster_of = {row["key"]: row["cluster"] for row in csv.DictReader(file)}
    missing = [key for key in rows.keys if not cluster_of.get(key, "").isdigit()]
    if missing:
        raise UserError(
            f"{table}: {missing[0]} and {len(missing) - 1} other samples have no cluster. Delete it and "
            "start again"
        )
    group_of = data_set.group_of if view.grouped and data_set.group_of is not None else str
    found = {
        group_of(key): (int(cluster_of[key]), label)
        for key, label in zip(rows.keys, rows.labels.tolist(), strict=True)
    }
    clusters, labels = zip(*found.values(), strict=True)
    return np.array(clusters), np.array(labels)
