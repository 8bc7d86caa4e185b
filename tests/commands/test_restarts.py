"""`cmvae restarts`: several trainings, one answer."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from commands import run_cmvae
from mlflow import MlflowClient
from sklearn.metrics import adjusted_rand_score

from cmvae.commands.cluster_table import assign_samples
from cmvae.commands.restart_runs import overrides_of, plan_restarts
from cmvae.config import load_config
from cmvae.data.index import ShardIndex


def clusters_of(run, shards):
    """By key, from the export of a run."""
    splits, modalities = list(ShardIndex.load(shards).splits), ["m0", "m1", "m2"]
    return {
        row["key"]: row["cluster"] for row in assign_samples(run / "export", shards, splits, modalities, 64)
    }


def test_runs_are_trained_compared_and_gone_on_with(experiment_file, digits_shards, tmp_path):
    # A strong contrast, for several clusters after a few steps, and an odd name, to be read as text.
    settings = [
        "train.max_steps=30",
        "name=2024-01",
        "tracking.enabled=true",
        "optimizer.learning_rate=0.01",
        "objective.beta=0.05",
        "objective.alignment={weight: 500}",
        "clusters.criterion=silhouette",
    ]
    command = ["restarts", experiment_file, *settings]
    done = run_cmvae(*command, "--restarts", 2, folder=tmp_path)
    folder = tmp_path / "run"
    assert done.returncode == 0, done.stdout + done.stderr
    answer = json.loads((folder / "restarts.json").read_text())
    first, second = (clusters_of(folder / str(seed), digits_shards) for seed in (0, 1))
    score = adjusted_rand_score(list(first.values()), list(second.values()))
    assert first != second
    assert answer["mean_pairwise_ari"] == pytest.approx(score)
    assert (answer["warning"] is None) == (score >= 0.5)
    for seed, run in enumerate(answer["runs"]):
        record = json.loads((folder / str(seed) / "export/clusters.json").read_text())
        validation = json.loads((folder / str(seed) / "validation.json").read_text())
        assert run["num_clusters"] == record["selected"]
        assert (run["seed"], run["bound"]) == (seed, validation["bound"])
        assert run["contrast"] == validation["alignment"]
        curve = record["curves"]["silhouette"]
        place = curve["num_clusters"].index(run["num_clusters"])
        assert run["criteria"]["silhouette"] == curve["values"][place]
    bounds = [run["bound"] for run in answer["runs"]]
    assert answer["chosen"] == answer["runs"][int(np.argmax(bounds))]["folder"]
    assert f"chosen: {answer['chosen']}" in done.stdout

    with (folder / "consensus.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["key", "split", "cluster", "confidence"]
    # Of two runs the chosen one has the casting vote; the confidence says where the other disagrees.
    chosen = (first, second)[int(np.argmax(bounds))]
    assert {row["key"]: int(row["cluster"]) for row in rows} == chosen
    assert {row["confidence"] for row in rows} == {"1.000000", "0.500000"}
    assert np.mean([row["confidence"] == "1.000000" for row in rows]) == pytest.approx(answer["unanimous"])

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("cmvae").experiment_id])
    by_name = {run.info.run_name: run for run in runs}
    assert sorted(by_name) == ["2024-01", "2024-01-0", "2024-01-1"]
    parent = by_name.pop("2024-01").info.run_id
    assert {run.data.tags["mlflow.parentRunId"] for run in by_name.values()} == {parent}
    artifacts = {artifact.path for artifact in client.list_artifacts(parent)}
    assert {"restarts.json", "consensus.csv"} <= artifacts

    # A third seed cannot be trained: its folder is a file. The two others are not trained again.
    (folder / "2").write_text("in the way")
    exports = [(folder / str(seed) / "export").stat().st_mtime_ns for seed in (0, 1)]
    done = run_cmvae(*command, "tracking.enabled=false", "--restarts", 3, folder=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "seed 0: complete since an earlier call" in done.stderr
    assert "seed 2: ended with exit code 2: error:" in done.stderr
    assert f"failed: seed 2, {folder}/2.log" in done.stdout
    again = json.loads((folder / "restarts.json").read_text())
    assert again == {**answer, "failed": [2]}
    assert exports == [(folder / str(seed) / "export").stat().st_mtime_ns for seed in (0, 1)]

    done = run_cmvae(*command, "objective.beta=9", "--restarts", 2, folder=tmp_path)
    assert done.returncode == 2
    assert f"{folder / '0'}: trained with objective.beta=" in done.stderr
    assert "--overwrite" in done.stderr


def test_the_command_line_of_a_run_says_what_was_planned(experiment_file):
    given = ["name=2024-01", "seed=7", 'output_dir="runs/a: b"']
    config = load_config(experiment_file, given)
    planned = plan_restarts(config, 2)
    assert [run.seed for run in planned] == [7, 8]
    assert [str(run.run_dir) for run in planned] == ["runs/a: b/7", "runs/a: b/8"]
    for run in planned:
        assert load_config(experiment_file, [*given, *overrides_of(run)]) == run


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train.batchsize=3"], "did you mean 'batch_size'"),
        (["data.shards=nothing"], "no such shard folder"),
        (["--restarts", "1"], "at least two runs"),
    ],
)
def test_mistakes_are_told_before_anything_starts(call, experiment_file, tmp_path, arguments, expected):
    code, _, err = call("restarts", experiment_file, *arguments)
    assert code == 2
    assert expected in err
    assert not (tmp_path / "run").exists()


def test_the_folder_of_a_single_run_stays_one(call, experiment_file, make_cmvae_run, tmp_path):
    run = make_cmvae_run()
    code, _, err = call("restarts", experiment_file, f"output_dir={run}", "--overwrite")
    assert code == 2
    assert "the folder of a single run" in err
    assert (run / "export").is_dir()


def test_a_refiner_has_no_clusters(call, refiner_file):
    code, _, err = call("restarts", refiner_file)
    assert code == 2
    assert "a refiner finds no clusters" in err
