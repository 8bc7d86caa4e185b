"""`tools/benchmarks/score_restarts.py` on untrained runs, against what scikit-learn and scipy say."""

from __future__ import annotations

import csv
import json

import numpy as np
from commands import run_tool
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import confusion_matrix

from cmvae.commands.cluster_table import assign_samples
from cmvae.config import load_run_config
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader

MODALITIES = ["m0", "m1", "m2"]


def read_labels(shards):
    labels = {}
    for split in ShardIndex.load(shards).splits:
        for batch in EvaluationLoader(shards, split=split, modalities=MODALITIES, batch_size=64):
            valid = batch["valid"].tolist()
            named = zip(batch["key"], batch["label"].tolist(), strict=True)
            labels |= {(key, split): label for (key, label), there in zip(named, valid, strict=True) if there}
    return labels


def test_the_choice_is_measured_by_labels(make_cmvae_run, tmp_path):
    runs = [make_cmvae_run(seed=seed, folder=tmp_path / str(seed)) for seed in (0, 1)]
    shards = load_run_config(runs[0]).data.shards
    labels = read_labels(shards)
    expected = []
    for run in runs:
        rows = assign_samples(run / "export", shards, list(ShardIndex.load(shards).splits), MODALITIES, 64)
        found = {(row["key"], row["split"]): row["cluster"] for row in rows}
        counts = confusion_matrix([labels[sample] for sample in found], list(found.values()))
        expected.append(counts[linear_sum_assignment(-counts)].sum() / counts.sum())
    assert abs(expected[0] - expected[1]) > 0.002

    def describe(place, bound, silhouette, entropy):
        criteria = {"silhouette": silhouette, "stability": None, "entropy": entropy}
        return {"folder": str(runs[place]), "bound": bound, "contrast": None, "criteria": criteria}

    answer = {
        "runs": [describe(0, -9.0, 0.3, 0.5), describe(1, -8.0, 0.2, 0.7)],
        "chosen": str(runs[1]),
        "mean_pairwise_ari": 0.25,
    }
    folder = tmp_path / "restarts"
    folder.mkdir()
    (folder / "restarts.json").write_text(json.dumps(answer))
    with (folder / "consensus.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["key", "split", "cluster", "confidence"])
        # Right but for the first sample; the second is in no cluster.
        for place, ((key, split), label) in enumerate(labels.items()):
            cluster = {0: 9 - (label + 1) % 10, 1: ""}.get(place, 9 - label)
            table.writerow([key, split, cluster, 1])
    done = run_tool("benchmarks/score_restarts.py", folder, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    header, _, row = ([cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines())
    cells = dict(zip(header, row, strict=True))
    first, second = (f"{value:.3f}" for value in expected)
    assert cells["each run"] == f"{first} {second}"
    assert (cells["chosen"], cells["best"], cells["mean ARI"]) == (second, f"{max(expected):.3f}", "0.250")
    assert cells["by bound"] == second
    assert cells["by silhouette"] == cells["by entropy"] == first
    assert cells["by stability"] == cells["by contrast"] == "-"
    total = len(labels) - 1
    assert np.isclose(float(cells["consensus"]), (total - 1) / total, atol=1e-3)


def test_what_is_no_restarts_is_explained(tmp_path):
    done = run_tool("benchmarks/score_restarts.py", tmp_path, folder=tmp_path)
    assert done.returncode == 2
    assert "restarts.json" in done.stderr
    assert "Make it with launch/restarts.py" in done.stderr
