"""Our models in the clustering suite, trained and assigned by the user's commands."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

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
"""Runs a command of this checkout with arguments, with a log file."""


def run_command(arguments: Sequence[str], log: Path) -> None:
    """Run `cmvae` of this checkout, not the installed one.

    Args:
        arguments: the command and its arguments.
        log: file that its output is appended to.

    Raises:
        UserError: it failed; names the last line of its output and the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with log.open("ab") as file:
        done = subprocess.run(
            [sys.executable, "-m", "cmvae.commands", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    if done.returncode != 0:
        said = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(said) if line), f"exit code {done.returncode}")
        raise UserError(f"cmvae {arguments[0]} failed: {last}. Full output: {log}")


def find_clusters(
    out: Path,
    data_set: DataSet,
    view: View,
    location: Path,
    variant: str,
    seed: int,
    told: bool,
    run: Run = run_command,
) -> tuple[IntArray, IntArray]:
    """Find the clusters of the compared rows. Trainings and tables of clusters below `out` are not repeated.

    Args:
        out: folder of the suite.
        data_set: the data set.
        view: its rows.
        location: the packed data.
        variant: one of `VARIANTS`.
        seed: seed of the training.
        told: whether the trained model is given the number of clusters.
        run: runs a command.

    Returns:
        Clusters (N,) and labels (N,) of the rows.

    Raises:
        UserError: a command failed, or a sample that is compared has no cluster.
    """
    name = f"{data_set.name}-{variant}-{seed}"
    folder, log = out / "runs" / name, out / "logs" / f"{name}.log"
    index = ShardIndex.load(location)
    if not (folder / "export").exists():
        config = out / "configs" / f"{data_set.name}.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        write_whole(config, write_starter_config(index, location).encode())
        settings = [f"name={name}", f"output_dir={folder}", f"seed={seed}", "tracking.enabled=false"]
        run(["train", str(config), *settings, *VARIANTS[variant], "--resume"], log)
    table = out / "assignments" / name / f"{view.rows}-{'told' if told else 'found'}.csv"
    if not table.is_file():
        table.parent.mkdir(parents=True, exist_ok=True)
        arguments = ["cluster", str(folder), str(location), "--out", str(table)]
        if not data_set.whole:
            arguments += ["--split", "test"]
        if view.grouped:
            arguments += ["--by-group"]
        if view.read_from:
            arguments += ["--modalities", ",".join(view.read_from)]
        if told:
            arguments += ["--num-clusters", str(len(index.class_names or ()))]
        run(arguments, log)
    return _compare_rows(table, data_set, view, location)


def _compare_rows(table: Path, data_set: DataSet, view: View, location: Path) -> tuple[IntArray, IntArray]:
    """Clusters and labels of the rows of a view, from a table of `cmvae cluster`.

    The samples of a group are one row, and have the same cluster in the table.
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
    found = {
        group: (int(cluster_of[key]), label)
        for group, key, label in zip(
            data_set.groups(rows.keys, view), rows.keys, rows.labels.tolist(), strict=True
        )
    }
    clusters, labels = zip(*found.values(), strict=True)
    return np.array(clusters), np.array(labels)
