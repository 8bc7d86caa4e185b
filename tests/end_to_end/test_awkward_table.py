"""A table with what spreadsheets do, from packing to evaluation, with the commands as they are printed."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex

from commands import run_cmvae

from cmvae.config import load_config

CAPTIONS = (
    "\u4e00\u53ea\u7ea2\u8272\u7684\u9e1f $x$",
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\U0001f44d good",
)
SMALL = (
    "train.max_steps=2", "train.validate_every=2", "train.batch_size=8", "model.num_clusters=4",
    "tracking.enabled=false", "evaluation.likelihood_samples=2", "evaluation.map_samples=20",
)  # fmt: skip


def test_what_is_printed_as_train_on_it_trains(tmp_path):
    with (tmp_path / "t.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["no", "on", "price", "caption", "when", "class"])
        for n in range(60):
            writer.writerow(
                [n % 7 / 2, 1_700_000_000 + 37 * n % 1000, "$" * (1 + n % 3), CAPTIONS[n % 3],
                 f"2024-02-{1 + n % 28:02d}", "" if n % 2 else f"$_{n % 3}$"]
            )  # fmt: skip
    flags = [
        "--vector=no",
        "--vector=on",
        "--categorical=price",
        "--text=caption",
        "--date=when",
        "--label=class",
    ]
    config = "configs/2024-05-01.yaml"
    checked = run_cmvae(
        "pack", "table", "t.csv", *flags, "--out=shards/2024-05-01", "--check", folder=tmp_path
    )
    assert checked.returncode == 0, checked.stderr
    assert sorted(os.listdir(tmp_path)) == ["t.csv"]
    packed = run_cmvae(
        "pack", "table", "t.csv", *flags, "--out=shards/2024-05-01", f"--config={config}", folder=tmp_path
    )
    assert packed.returncode == 0, packed.stderr
    assert "30 of 60 samples have no label" in packed.stderr
    (command,) = re.findall(r"Train on it: cmvae train (.*)", packed.stdout)
    trained = run_cmvae("train", *shlex.split(command), *SMALL, folder=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert load_config(tmp_path / config).name == "2024-05-01"
    run = "runs/2024-05-01"
    evaluated = run_cmvae("evaluate", run, folder=tmp_path)
    assert evaluated.returncode == 0, evaluated.stderr
    assert "left out" not in evaluated.stderr
    metrics = json.loads((tmp_path / run / "evaluation" / "metrics.json").read_text())
    protocol = json.loads((tmp_path / run / "evaluation" / "protocol.json").read_text())
    assert 0 <= metrics["clustering/acc"] <= 1
    assert 0 < protocol["clustering.num_labelled_samples"] < protocol["clustering.num_samples"]
    figures = {path.stem for path in (tmp_path / run / "evaluation" / "figures").iterdir()}
    assert figures >= {"cross_modal", "confusion_matrix", "cluster_samples", "latent_map"}
