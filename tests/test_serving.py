"""Models for MLflow, served over HTTP as a user would."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
from commands import run_cmvae
from mlflow import MlflowClient
from packing import write_csv

from cmvae import MultimodalClusterer

CLASSES = {"oak": (1.0, 20.0), "fir": (5.0, 80.0), "birch": (9.0, 50.0)}


def rows(count, seed=0):
    rng = np.random.default_rng(seed)
    table = []
    for number in range(count):
        name = list(CLASSES)[number % 3]
        a, b = CLASSES[name]
        table.append(
            {
                "width": round(a + rng.normal(0, 0.3), 3),
                "height": round(b + rng.normal(0, 3), 3),
                "word": "" if number % 9 == 4 else name,
                "photo": "",
            }
        )
    return table


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a tracked run, runs/trees, of a table."""
    folder = tmp_path_factory.mktemp("serving")
    write_csv(folder / "trees.csv", rows(90))
    steps = [
        ("pack", "table", "trees.csv", "--out", "shards/trees", "--config", "trees.yaml", "--vector",
         "size=width,height", "--categorical", "word"),
        ("train", "trees.yaml", "train.max_steps=60", "train.batch_size=16", "data.num_workers=0"),
    ]  # fmt: skip
    for step in steps:
        done = run_cmvae(*step, folder=folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_a_run_is_used_as_an_estimator(folder, monkeypatch):
    monkeypatch.chdir(folder)
    frame = pd.DataFrame(rows(30, seed=1)).replace("", None)
    estimator = MultimodalClusterer.from_run("runs/trees")
    labels = estimator.predict(frame)
    done = run_cmvae("cluster", "runs/trees", "trees.csv", "--out", "found.csv", "--overwrite", folder=folder)
    assert done.returncode == 0, done.stderr
    told = pd.read_csv(folder / "found.csv")["cluster"].to_numpy()
    own = estimator.predict(pd.read_csv(folder / "trees.csv"))
    # Ids of the command are those of the mixture, of the estimator the numbers from 0.
    assert len(set(zip(told, own, strict=True))) == len(set(told)) == len(set(own))
    assert len(labels) == 30
    two = MultimodalClusterer.from_run("runs/trees", num_clusters=2)
    assert two.num_clusters_ == 2
    with pytest.raises(ValueError, match="nowhere"):
        MultimodalClusterer.from_run("nowhere")


def test_a_registered_model_answers_over_http(folder, monkeypatch):
    monkeypatch.chdir(folder)
    done = run_cmvae("register", "runs/trees", "--out", "model", "--name", "trees", folder=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "registered: trees, version 1"
    client = MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    version = client.get_model_version("trees", "1")
    assert version.run_id == json.loads((folder / "runs/trees/mlflow.json").read_text())["run_id"]
    files = [path for path in (folder / "model").rglob("*") if path.is_file()]
    assert not [path for path in files if path.suffix in (".pkl", ".pickle", ".bin", ".pt")]

    frame = pd.DataFrame(rows(12, seed=2))
    expected = MultimodalClusterer.from_run("runs/trees")
    frame["word"] = frame["word"].replace("", None)
    loaded = mlflow.pyfunc.load_model(str(folder / "model"))
    assert {column.name for column in loaded.metadata.get_input_schema()} == {"width", "height", "word"}
    answer = loaded.predict(frame[["width", "height", "word"]])
    np.testing.assert_array_equal(answer["cluster"], expected.predict(frame))

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        Path(sys.executable).parent / "mlflow",
        "models",
        "serve",
        "-m",
        "model",
        "--env-manager",
        "local",
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    server = subprocess.Popen(
        [*command, "--port", str(port)],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/ping", server)
        records = [
            {"width": 1.0, "height": 20.0},
            {"word": "fir"},
            {"width": 9.1, "height": 51, "word": None},
        ]
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/invocations",
            json.dumps({"dataframe_records": records}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310
            predictions = json.load(response)["predictions"]
    finally:
        os.killpg(server.pid, 9)
        server.wait()
    told = expected.predict(pd.DataFrame(records))
    assert [row["cluster"] for row in predictions] == told.tolist()
    for row in predictions:
        probabilities = [value for name, value in row.items() if name.startswith("probability_")]
        assert len(probabilities) == expected.num_clusters_
        assert sum(probabilities) == pytest.approx(1)


def wait_for(url, server):
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=5):  # noqa: S310
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail("no answer within two minutes")


def test_dates_are_not_read(folder, tmp_path):
    run = shutil.copytree(folder / "runs/trees", tmp_path / "run")
    table = json.loads((run / "table.json").read_text())
    (run / "table.json").write_text(json.dumps({**table, "dates": {"size": None}}))
    estimator = MultimodalClusterer.from_run(run)
    assert set(estimator.columns) == {"word"}
    assert set(estimator.predict(pd.DataFrame({"word": ["fir", None]}))) >= {-1}


def test_a_run_without_a_table_cannot_be_served(folder, tmp_path):
    run = shutil.copytree(folder / "runs/trees", tmp_path / "run")
    (run / "table.json").unlink()
    done = run_cmvae("register", run, folder=folder)
    assert done.returncode == 2
    assert "was not trained on a table. Only rows of a table can be served" in done.stderr
