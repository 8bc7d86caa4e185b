"""The documented commands, as a user types them, on a small part of the embedded data."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from commands import ROOT, run_command
from PIL import Image

FIGURES = [
    "cluster_numbers",
    "cluster_samples",
    "cluster_tree",
    "coherence_matrix",
    "confusion_matrix",
    "cross_modal",
    "latent_map",
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A copy of the checkout in which `make demo` ran, with less training and a smaller refiner."""
    copy = tmp_path_factory.mktemp("demo") / "checkout"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(".git", ".venv", "runs", "mlruns", "mlflow.db*", "digits", "polymnist"),
    )
    environment = Path(sys.prefix)
    # This interpreter's environment stands in for the one that `make demo` would install.
    done = run_command(
        [
            "make",
            "demo",
            f"VENV={environment}",
            "-o",
            environment / "installed",
            "ARGS=train.max_steps=100 train.batch_size=24 "
            "evaluation.num_generated=500 evaluation.likelihood_samples=6",
            "REFINER_ARGS=train.max_steps=20 evaluation.num_generated=100 "
            "refiner.network.channels=8 refiner.sampler.num_steps=1 refiner.sampler.candidates=1",
        ],
        copy,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return copy, done


def test_demo_prints_a_table_and_where_the_pictures_are(demo):
    _, done = demo
    for expected in (
        "clustering/acc",
        "clustering/num_clusters",
        "runs/digits/evaluation/figures",
        "mlflow ui",
    ):
        assert expected in done.stdout
    assert "samples/s" in done.stderr, "progress goes to the terminal"
    assert "Traceback" not in done.stdout + done.stderr


def test_demo_leaves_the_contracted_files(demo):
    run = demo[0] / "runs/digits"
    metrics = json.loads((run / "evaluation/metrics.json").read_text())
    for key in ("num_clusters", "acc", "nmi", "ari", "purity"):
        assert isinstance(metrics[f"clustering/{key}"], float)
    for key in (
        "coherence/conditional",
        "coherence/unconditional",
        "coherence/matrix/m0/m1",
        "frechet/classifier/conditional_cross",
        "fidelity/classifier/recall/unconditional",
        "probe/z/m0",
        "likelihood/joint_standard_error",
    ):
        assert isinstance(metrics[key], float)
    protocol = json.loads((run / "evaluation/protocol.json").read_text())
    assert "2,048 features" in protocol["left_out"]["fid"]
    assert 2 <= metrics["clustering/num_clusters"] <= 20
    assert 0 < metrics["clustering/acc"] <= metrics["clustering/purity"] <= 1
    assert sorted(path.stem for path in (run / "evaluation/figures").glob("*.png")) == FIGURES
    for path in (run / "evaluation/figures").glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 100
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["max_steps"] == 100
    assert sorted(path.name for path in (run / "export").iterdir()) == [
        "clusters.json",
        "clusters.safetensors",
        "config.yaml",
        "model.safetensors",
    ]


def test_mlflow_holds_one_run_with_settings_curves_and_pictures(demo):
    copy = demo[0]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{copy}/mlflow.db")
    experiment = client.get_experiment_by_name("cmvae")
    (run,) = client.search_runs([experiment.experiment_id], "tags.task = 'cmvae'")
    assert run.info.status == "FINISHED"
    assert run.data.params["train.max_steps"] == "100"
    for metric in ("train/bound", "train/samples_per_second", "validation/clusters/perplexity"):
        assert metric in run.data.metrics
    bounds = [point.value for point in client.get_metric_history(run.info.run_id, "train/bound")]
    assert len(bounds) == 4
    assert bounds[-1] > bounds[0] + 100, "it learns"
    evaluated = json.loads((copy / "runs/digits/evaluation/metrics.json").read_text())
    for name, value in evaluated.items():
        assert run.data.metrics[f"evaluation/{name}"] == value
    artifacts = [artifact.path for artifact in client.list_artifacts(run.info.run_id)]
    assert {"config.yaml", "figures", "images", "metrics.json", "report.html"} <= set(artifacts)


def test_demo_ends_with_refined_pictures(demo):
    copy, done = demo
    run = copy / "runs/digits_refiner"
    metrics = json.loads((run / "evaluation/metrics.json").read_text())
    for key in (
        "coherence/conditional",
        "coherence/unconditional",
        "frechet/classifier/conditional_cross",
        "fidelity/classifier/recall/unconditional",
    ):
        assert isinstance(metrics[key], float)
        assert isinstance(metrics[f"refined/{key}"], float)
    with Image.open(run / "evaluation/figures/refinements.png") as picture:
        assert min(picture.size) > 100
    assert "before     refined" in done.stdout
    assert "runs/digits_refiner/evaluation/figures" in done.stdout


def test_mlflow_links_the_refiner_with_its_cmvae(demo):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{demo[0]}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("cmvae").experiment_id])
    by_task = {run.data.tags["task"]: run for run in runs}
    assert by_task["refiner"].data.tags["mlflow.parentRunId"] == by_task["cmvae"].info.run_id


def test_bare_mlflow_looks_at_the_database_of_the_working_folder(demo):
    done = run_command(["mlflow", "experiments", "search"], demo[0])
    assert done.returncode == 0, done.stderr
    assert "cmvae" in done.stdout


def test_the_readmes_python_runs_on_the_exports(demo):
    (block,) = [
        b
        for b in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
        if "DCMVAE" in b
    ]
    program = f"""
import torch
images = torch.rand(5, 3, 16, 16)
{block}
shapes = {{name: tuple(x.shape) for name, x in refined.items()}}
assert shapes == {{f"m{{i}}": (16, 3, 16, 16) for i in range(3)}}, shapes
assert clusters.shape == (5,) and len(captions) == 16
assert {{tuple(x.shape) for x in others.values()}} == {{(5, 3, 16, 16)}}
"""
    done = run_command([sys.executable, "-c", program], demo[0])
    assert done.returncode == 0, done.stderr


def test_a_second_training_refuses_to_bury_the_first(demo):
    done = run_command([sys.executable, "launch/train.py", "configs/digits.yaml"], demo[0])
    assert done.returncode == 2
    assert "runs/digits: holds the checkpoints and export of an earlier run" in done.stderr
    assert "--resume" in done.stderr
    assert "--overwrite" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["runs/nothing"], "runs/nothing/config.yaml: missing"),
        (["runs/digits", "data.shards=shards/nothing"], "no such shard folder"),
        (["runs/digits", "evaluation.batchsize=1"], "did you mean 'batch_size'"),
    ],
)
def test_evaluation_names_what_is_wrong(demo, arguments, expected):
    done = run_command([sys.executable, "launch/evaluate.py", *arguments], demo[0])
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr


def test_tracking_goes_off_with_one_key(experiment_file, tmp_path):
    done = run_command([sys.executable, ROOT / "launch/train.py", experiment_file], tmp_path)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "mlflow.db").exists()
    assert not (tmp_path / "mlruns").exists()
    assert (tmp_path / "run/export/model.safetensors").is_file()


def test_sigterm_saves_leaves_and_resumes(experiment_file, tmp_path):
    command = [sys.executable, ROOT / "launch/train.py", experiment_file]
    slow = [*command, "train.max_steps=100000", "train.checkpoint_every=null", "data.num_workers=2"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([str(part) for part in slow], cwd=tmp_path, stdout=log, stderr=log)
        deadline = time.monotonic() + 120
        while "bound=" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    reached = int(checkpoint.name.removeprefix("step-"))
    assert reached > 0
    done = run_command(
        [*command, "data.num_workers=2", "--resume", f"train.max_steps={reached + 1}"], tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"step {reached}" in done.stdout
    assert (tmp_path / "run/export/model.safetensors").is_file()
