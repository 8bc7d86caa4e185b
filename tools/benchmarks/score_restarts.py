"""Measure by labels how well restarts were chosen; the choice does not use labels.

    python tools/benchmarks/score_restarts.py runs/wine-restarts runs/mfeat-restarts

Prints one row per set of restarts, with the accuracy (best one-to-one matching of clusters and classes) on
all labelled samples of all splits: of the chosen run, the best run, the consensus, every run, and the runs
that other rules would have chosen.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cmvae.commands.restart_runs import CONSENSUS_NAME, RESTARTS_NAME
from cmvae.config import CMVAEExperiment, load_cmvae_run
from cmvae.data.index import ShardIndex
from cmvae.utils.errors import UserError
from cmvae.utils.process_exit import run_main
from cmvae.utils.tables import markdown_table

Clusters = Mapping[tuple[str, str], int]
"""(key, split) → cluster or class."""

# Larger is better. Entropy and contrast are losses.
RULES = {
    "bound": lambda run: run["bound"],
    "silhouette": lambda run: run["criteria"].get("silhouette"),
    "stability": lambda run: run["criteria"].get("stability"),
    "entropy": lambda run: -run["criteria"]["entropy"],
    "contrast": lambda run: None if run["contrast"] is None else -run["contrast"],
}
COLUMNS = (
    "restarts",
    "mean ARI",
    "each run",
    "chosen",
    "best",
    "consensus",
    *(f"by {rule}" for rule in RULES),
)


def read_labels(config: CMVAEExperiment) -> Clusters:
    """Read the labels of all labelled samples.

    Raises:
        UserError: the data has no labels.
    """
    from clusters_data import read_rows

    labels: dict[tuple[str, str], int] = {}
    for split in ShardIndex.load(config.data.shards).splits:
        rows = read_rows(config.data.shards, (split,), [])
        named = zip(rows.keys, rows.labels.tolist(), strict=True)
        labels |= {(key, split): label for key, label in named if label >= 0}
    return labels


def read_clusters(config: CMVAEExperiment) -> Clusters:
    """Assign all samples to the clusters of a run."""
    from cmvae.commands.cluster_table import assign_samples

    splits, modalities = list(ShardIndex.load(config.data.shards).splits), list(config.model.modalities)
    rows = assign_samples(
        config.run_dir / "export", config.data.shards, splits, modalities, config.evaluation.batch_size
    )
    return {(row["key"], row["split"]): row["cluster"] for row in rows if "cluster" in row}


def read_consensus(path: Path) -> Clusters:
    """Read `consensus.csv`."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {(row["key"], row["split"]): int(row["cluster"]) for row in rows if row["cluster"]}


def accuracy(clusters: Clusters, labels: Clusters) -> float:
    """Accuracy on the samples that have a cluster and a label."""
    import numpy as np

    from cmvae.clustering import clustering_metrics

    both = sorted(clusters.keys() & labels.keys())
    found, true = (np.array([values[sample] for sample in both]) for values in (clusters, labels))
    return clustering_metrics(found, true)["acc"]


def score(folder: Path) -> list[str]:
    """One row of the table.

    Raises:
        UserError: the folder has no restarts, a run is damaged, or the data has no labels.
    """
    try:
        answer: dict[str, Any] = json.loads((folder / RESTARTS_NAME).read_text(encoding="utf-8"))
        consensus = read_consensus(folder / CONSENSUS_NAME)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {error}. Make it with launch/restarts.py") from error
    runs = answer["runs"]
    configs = [load_cmvae_run(Path(run["folder"])) for run in runs]
    labels = read_labels(configs[0])
    accuracies = [accuracy(read_clusters(config), labels) for config in configs]
    by_folder = {run["folder"]: value for run, value in zip(runs, accuracies, strict=True)}
    cells: list[float | None] = [
        by_folder[answer["chosen"]],
        max(accuracies),
        accuracy(consensus, labels),
    ]
    for value in RULES.values():
        known = [run for run in runs if value(run) is not None]
        cells.append(by_folder[max(known, key=value)["folder"]] if known else None)
    each = " ".join(f"{value:.3f}" for value in accuracies)
    numbers = ["-" if value is None else f"{value:.3f}" for value in cells]
    return [str(folder), f"{answer['mean_pairwise_ari']:.3f}", each, *numbers]


def main() -> int:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description="Measure by labels how well restarts were chosen.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="runs/NAME-restarts")
    arguments = parser.parse_args()
    print(markdown_table(COLUMNS, [score(folder) for folder in arguments.folders]))
    return 0


if __name__ == "__main__":
    run_main(main)
