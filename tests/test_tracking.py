from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import yaml
from matplotlib.figure import Figure
from mlflow import MlflowClient

from cmvae.config import CMVAEExperiment, RefinerExperiment, flatten
from cmvae.data.index import ShardIndex
from cmvae.tracking import Tracker, open_tracker, read_curves, resume_tracker
from cmvae.utils.errors import UserError


@pytest.fixture(autouse=True)
def _working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "1")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "trial"


def make_config(**changes: object) -> CMVAEExperiment:
    return CMVAEExperiment.model_validate(
        {
            "name": "trial",
            "data": {"shards": "shards/digits"},
            "model": {"modalities": {f"m{m}": {} for m in range(3)}},
            "train": {"max_steps": 10},
            **changes,
        }
    )


def client(tmp_path: Path) -> MlflowClient:
    return MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")


def run_id(run_dir: Path) -> str:
    return json.loads((run_dir / "mlflow.json").read_text())["run_id"]


def draw() -> Figure:
    figure = Figure(figsize=(2, 1), dpi=50)
    figure.add_subplot().plot([0, 1])
    return figure


def own_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "cmvae.tracking"]


def log_one_of_everything(tracker: Tracker, folder: Path) -> None:
    (folder / "notes.txt").write_text("hello")
    tracker.log_metrics({"train/loss": 3.0}, step=1)
    tracker.log_figure(draw(), "selection")
    tracker.log_image(draw(), "reconstruction", step=1)
    tracker.log_text("a bird", "captions")
    tracker.log_artifact(folder / "notes.txt")
    tracker.end("FINISHED")


def test_a_training_can_be_read_back(tmp_path: Path, run_dir: Path) -> None:
    config = make_config()
    tracker = open_tracker(config, run_dir, is_main=True)
    tracker.log_metrics({"train/loss": 3.5, "validation/loss": 4.0}, step=1)
    tracker.log_metrics({"train/loss": 2.5}, step=2)
    tracker.log_figure(draw(), "selection")
    tracker.log_image(draw(), "reconstruction", step=1)
    tracker.log_image(draw(), "reconstruction", step=2)
    tracker.log_artifact(_write(tmp_path / "notes.txt", "hello"))
    tracker.end("FINISHED")

    reader = client(tmp_path)
    run = reader.get_run(run_id(run_dir))
    assert run.data.params == {key: str(value) for key, value in flatten(config).items()}
    history = reader.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 3.5), (2, 2.5)]
    curves = read_curves(run_dir, ("train/", "validation/"))
    assert curves == {"train/loss": {1: 3.5, 2: 2.5}, "validation/loss": {1: 4.0}}
    assert read_curves(run_dir, ("train/nonsense",)) == {}
    assert run.data.metrics["validation/loss"] == 4.0
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "trial"
    assert reader.get_experiment(run.info.experiment_id).name == "cmvae"
    assert run.data.tags["task"] == "cmvae"
    assert run.data.tags["world_size"] == "2"
    assert run.data.tags["host"]

    artifacts = tmp_path / "mlruns" / run.info.experiment_id / run.info.run_id / "artifacts"
    assert CMVAEExperiment.model_validate(yaml.safe_load((artifacts / "config.yaml").read_text())) == config
    assert (artifacts / "figures" / "selection.png").read_bytes().startswith(b"\x89PNG")
    assert (artifacts / "notes.txt").read_text() == "hello"
    images = sorted(path.name for path in (artifacts / "images").glob("*.png"))
    assert [name.split("+")[:3] for name in images] == [
        ["reconstruction", "step", "1"],
        ["reconstruction", "step", "2"],
    ]
    pixels = mlflow.Image(str(artifacts / "images" / images[0])).to_array()
    assert pixels.shape == (50, 100, 3)


def test_data_and_export_belong_to_the_run(tmp_path: Path, run_dir: Path, digits_shards: Path) -> None:
    index = ShardIndex.load(digits_shards)
    tracker = open_tracker(make_config(), run_dir, is_main=True)
    tracker.log_data(index, str(digits_shards))
    export = tmp_path / "export"
    export.mkdir()
    (export / "config.yaml").write_text("a: 1")
    tracker.log_folder(export)
    tracker.end("FINISHED")
    reader = client(tmp_path)
    run = reader.get_run(run_id(run_dir))
    (logged,) = run.inputs.dataset_inputs
    assert [(tag.key, tag.value) for tag in logged.tags] == [("mlflow.data.context", "training")]
    assert (logged.dataset.name, logged.dataset.source_type) == (index.name, "local")
    assert logged.dataset.digest == index.digest[:36]
    assert json.loads(logged.dataset.source) == {"uri": str(digits_shards)}
    assert json.loads(logged.dataset.profile) == {name: s.num_samples for name, s in index.splits.items()}
    assert [file.path for file in reader.list_artifacts(run.info.run_id, "export")] == ["export/config.yaml"]
    # With this tag MLflow opens the page for the training of models.
    tags = reader.get_experiment(run.info.experiment_id).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"


def test_the_digest_is_that_of_the_shards(digits_shards: Path) -> None:
    index = ShardIndex.load(digits_shards)
    assert index.model_copy(update={"classifiers": {}}).digest == index.digest
    split = index.splits["train"]
    changed = split.shards[0].model_copy(update={"sha256": "0" * 64})
    splits = {**index.splits, "train": split.model_copy(update={"shards": (changed, *split.shards[1:])})}
    assert index.model_copy(update={"splits": splits}).digest != index.digest


@pytest.mark.parametrize(("relocate", "begins_another"), [(shutil.move, False), (shutil.copytree, True)])
def test_a_project_folder_can_be_moved_or_copied(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    relocate: Callable[[Path, Path], object],
    begins_another: bool,
) -> None:
    old, new = tmp_path / "old", tmp_path / "new mlruns"
    # MLflow remembers within a process where the artifacts of a run are.
    process = multiprocessing.get_context("fork").Process(target=_train_in, args=(old,))
    process.start()
    process.join()
    assert process.exitcode == 0
    relocate(old, new)
    before = sorted(old.rglob("*"))
    monkeypatch.chdir(new)
    run_dir = Path("runs/trial")
    assert read_curves(run_dir, ("train/loss",))["train/loss"] == {1: 3.0}
    if begins_another:
        open_tracker(make_config(), Path("runs/another"), is_main=True).end("FINISHED")
    evaluation = resume_tracker(make_config(), run_dir, is_main=True)
    evaluation.log_metrics({"test/nmi": 0.5}, step=1)
    evaluation.log_text("a report", "report")
    evaluation.end("FINISHED")
    training = open_tracker(make_config(), run_dir, is_main=True)
    training.log_metrics({"train/loss": 2.0}, step=2)
    training.end("FINISHED")
    assert not own_warnings(caplog)
    assert sorted(old.rglob("*")) == before  # nothing is written where the project was

    reader = client(new)
    run = reader.get_run(run_id(run_dir))
    assert read_curves(new / run_dir, ("train/loss",))["train/loss"] == {1: 3.0, 2: 2.0}
    assert run.data.metrics["test/nmi"] == 0.5
    texts = {file.path for file in reader.list_artifacts(run.info.run_id, "texts")}
    assert texts == {"texts/captions.txt", "texts/report.txt"}
    downloaded = reader.download_artifacts(run.info.run_id, "texts/report.txt", str(tmp_path))
    assert Path(downloaded).read_text() == "a report"
    experiment = reader.get_experiment(run.info.experiment_id)
    assert Path(experiment.artifact_location) == new / "mlruns" / experiment.experiment_id
    assert reader.list_artifacts(run_id(Path("runs/other")))


def _train_in(folder: Path) -> None:
    folder.mkdir()
    os.chdir(folder)
    log_one_of_everything(open_tracker(make_config(), Path("runs/trial"), is_main=True), folder)
    open_tracker(make_config(), Path("runs/other"), is_main=True).end("FINISHED")


def test_a_run_folder_that_is_moved_alone_keeps_its_database(tmp_path: Path, run_dir: Path) -> None:
    tracker = open_tracker(make_config(), run_dir, is_main=True)
    tracker.log_metrics({"train/loss": 3.0}, step=1)
    tracker.end("FINISHED")
    moved = tmp_path / "some" / "where" / "else" / "trial"
    shutil.copytree(run_dir, moved)
    assert read_curves(moved, ("train/loss",))["train/loss"] == {1: 3.0}


def test_curves_of_a_run_without_a_record_or_a_database(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(UserError, match=r"mlflow.json: missing.*tracking.enabled=true"):
        read_curves(run_dir, ("train/",))
    open_tracker(make_config(), run_dir, is_main=True).end("FINISHED")
    (tmp_path / "mlflow.db").rename(tmp_path / "elsewhere.db")
    with pytest.raises(UserError, match=r"database sqlite:.*mlflow.db does not exist"):
        read_curves(run_dir, ("train/",))
    assert not (tmp_path / "mlflow.db").exists(), "SQLite would create it"


def test_the_source_commit_is_a_tag(tmp_path: Path, run_dir: Path) -> None:
    source = Path(__file__).parent
    head = subprocess.run(["git", "-C", source, "rev-parse", "HEAD"], capture_output=True, text=True)
    if head.returncode != 0:
        pytest.skip("these sources are no git checkout")
    open_tracker(make_config(), run_dir, is_main=True).end("FINISHED")
    tags = client(tmp_path).get_run(run_id(run_dir)).data.tags
    assert tags["mlflow.source.git.commit"] == head.stdout.strip()
    assert tags["git_dirty"] in {"true", "false"}


def test_system_metrics_are_sampled(tmp_path: Path, run_dir: Path) -> None:
    tracker = open_tracker(make_config(), run_dir, is_main=True)
    for _ in range(100):
        if any(key.startswith("system/") for key in client(tmp_path).get_run(run_id(run_dir)).data.metrics):
            break
        time.sleep(0.1)
    else:
        pytest.fail("no system metrics within 10 seconds")
    tracker.end("FINISHED")


def test_a_resumed_training_goes_on_in_its_run(tmp_path: Path, run_dir: Path) -> None:
    first = open_tracker(make_config(), run_dir, is_main=True)
    first.log_metrics({"train/loss": 3.0}, step=1)
    first.end("KILLED")
    second = open_tracker(make_config(train={"max_steps": 20}), run_dir, is_main=True)
    reader = client(tmp_path)
    assert reader.get_run(run_id(run_dir)).info.status == "RUNNING"
    second.log_metrics({"train/loss": 2.0}, step=11)
    second.end("FINISHED")

    (run,) = reader.search_runs([reader.get_experiment_by_name("cmvae").experiment_id])
    assert run.info.run_id == run_id(run_dir)
    assert [point.step for point in reader.get_metric_history(run.info.run_id, "train/loss")] == [1, 11]
    assert run.info.status == "FINISHED"
    # MLflow's parameters never change; what did change must be findable all the same.
    assert run.data.params["train.max_steps"] == "10"
    assert run.data.tags["resumed.train.max_steps"] == "20"
    assert not [key for key in run.data.tags if key.startswith("resumed.model")]


def test_what_a_killed_training_had_logged_is_not_logged_again(tmp_path: Path, run_dir: Path) -> None:
    """A training that goes on from a checkpoint passes the steps again that it had done before the kill."""

    def log(tracker: Tracker, steps: range) -> None:
        for step in steps:
            tracker.log_metrics({"train/loss": float(step), "train/epoch": 0.0}, step)
            if step % 2 == 0:
                tracker.log_metrics({"validation/loss": float(step)}, step)
                tracker.log_image(draw(), "cross/modal", step)

    log(open_tracker(make_config(), run_dir, is_main=True), range(1, 6))
    # Killed between the metric and the image of a step.
    killed = open_tracker(make_config(), run_dir, is_main=True)
    killed.log_metrics({"train/loss": 6.0, "train/epoch": 0.0}, 6)
    killed.log_metrics({"validation/loss": 6.0}, 6)
    log(open_tracker(make_config(), run_dir, is_main=True), range(3, 9))

    reader = client(tmp_path)

    def logged(key: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in reader.get_metric_history(run_id(run_dir), key)]

    assert logged("train/loss") == [(step, float(step)) for step in range(1, 9)]
    assert logged("train/epoch") == [(step, 0.0) for step in range(1, 9)]
    assert logged("validation/loss") == [(step, float(step)) for step in (2, 4, 6, 8)]
    images = [file.path for file in reader.list_artifacts(run_id(run_dir), "images")]
    steps = [int(path.split("+step+")[1].split("+")[0]) for path in images if path.endswith(".png")]
    assert sorted(steps) == [2, 4, 6, 8]


def test_texts_are_a_series_over_steps_or_one_that_is_replaced(tmp_path: Path, run_dir: Path) -> None:
    tracker = open_tracker(make_config(), run_dir, is_main=True)
    for step, words in ((5, "a bird"), (1000, "ein Vögelchen"), (5, "a red bird")):
        tracker.log_text(words, "cross_modal", step)
    for words in ("at first", "at last"):
        tracker.log_text(words, "cross_modal")
    reader = client(tmp_path)

    def listed(folder: str) -> list[str]:
        return [file.path for file in reader.list_artifacts(run_id(run_dir), folder)]

    series = ["texts/cross_modal/step-00000005.txt", "texts/cross_modal/step-00001000.txt"]
    assert listed("texts/cross_modal") == series
    assert sorted(listed("texts")) == ["texts/cross_modal", "texts/cross_modal.txt"]

    def read(path: str) -> str:
        return Path(reader.download_artifacts(run_id(run_dir), path)).read_text(encoding="utf-8")

    assert [read(path) for path in series] == ["a red bird", "ein Vögelchen"]
    assert read("texts/cross_modal.txt") == "at last"


def test_an_evaluation_of_a_resumed_run_is_logged_each_time(tmp_path: Path, run_dir: Path) -> None:
    open_tracker(make_config(), run_dir, is_main=True).end("FINISHED")
    for _ in range(2):
        resume_tracker(make_config(), run_dir, is_main=True).log_metrics({"evaluation/acc": 1.0}, 10)
    assert len(client(tmp_path).get_metric_history(run_id(run_dir), "evaluation/acc")) == 2


def test_an_evaluation_adds_to_the_run_and_leaves_its_status(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_tracker(make_config(), run_dir, is_main=True).end("KILLED")
    monkeypatch.setenv("WORLD_SIZE", "1")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    evaluation = resume_tracker(make_config(), run_dir, is_main=True)
    evaluation.log_metrics({"clustering/acc": 0.98}, step=10)
    evaluation.log_figure(draw(), "confusion")
    evaluation.end("FINISHED")
    run = client(tmp_path).get_run(run_id(run_dir))
    assert run.data.metrics["clustering/acc"] == 0.98
    assert run.info.status == "KILLED"
    assert run.data.tags["world_size"] == "2"
    assert list(elsewhere.iterdir()) == []


def make_refiner_config(cmvae: Path, **changes: object) -> RefinerExperiment:
    return RefinerExperiment.model_validate(
        {
            "name": "sharp",
            "data": {"shards": "shards/digits"},
            "cmvae": str(cmvae),
            "train": {"max_steps": 10},
            **changes,
        }
    )


def test_the_run_of_a_refiner_is_a_child_of_its_cmvaes(tmp_path: Path, run_dir: Path) -> None:
    open_tracker(make_config(), run_dir, is_main=True).end("FINISHED")
    child = tmp_path / "runs" / "sharp"
    config = make_refiner_config(run_dir)
    open_tracker(config, child, is_main=True, task="refiner").end("FINISHED")
    reader = client(tmp_path)
    run = reader.get_run(run_id(child))
    assert run.data.tags["mlflow.parentRunId"] == run_id(run_dir) != run.info.run_id
    assert run.data.tags["task"] == "refiner"
    assert run.data.params == {key: str(value) for key, value in flatten(config).items()}
    # The query by which MLflow's pages find children.
    children = reader.search_runs([run.info.experiment_id], f"tags.mlflow.parentRunId = '{run_id(run_dir)}'")
    assert [found.info.run_id for found in children] == [run.info.run_id]
    assert "mlflow.parentRunId" not in reader.get_run(run_id(run_dir)).data.tags


def test_a_refiner_of_an_untracked_cmvae_has_no_parent(
    tmp_path: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_tracker(make_refiner_config(tmp_path / "untracked"), run_dir, is_main=True).end("FINISHED")
    run = client(tmp_path).get_run(run_id(run_dir))
    assert "mlflow.parentRunId" not in run.data.tags
    assert run.info.status == "FINISHED"
    assert own_warnings(caplog) == []


def test_an_evaluation_without_a_run_makes_one(tmp_path: Path, run_dir: Path) -> None:
    evaluation = resume_tracker(make_config(), run_dir, is_main=True)
    evaluation.log_metrics({"clustering/acc": 0.98}, step=10)
    evaluation.end("FINISHED")
    run = client(tmp_path).get_run(run_id(run_dir))
    assert run.data.metrics == {"clustering/acc": 0.98}
    assert run.data.params["train.max_steps"] == "10"
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize("loss", ["database", "deleted run", "damaged record"])
def test_a_lost_run_is_told_and_a_new_one_begins(
    loss: str, tmp_path: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_tracker(make_config(), run_dir, is_main=True).end("FINISHED")
    lost = run_id(run_dir)
    if loss == "database":
        # Not moved away: in one process MLflow keeps the open file and would not notice.
        record = {"tracking_uri": f"sqlite:///{tmp_path}/gone.db", "run_id": lost}
        _write(run_dir / "mlflow.json", json.dumps(record))
    elif loss == "deleted run":
        client(tmp_path).delete_run(lost)
    else:
        (run_dir / "mlflow.json").write_text('{"run_id": ')
    tracker = open_tracker(make_config(), run_dir, is_main=True)
    tracker.log_metrics({"train/loss": 1.0}, step=1)
    tracker.end("FINISHED")
    (warning,) = own_warnings(caplog)
    assert str(run_dir / "mlflow.json") in warning
    assert "new" in warning
    assert run_id(run_dir) != lost
    assert not (tmp_path / "gone.db").exists()
    assert client(tmp_path).get_run(run_id(run_dir)).data.metrics["train/loss"] == 1.0


@pytest.mark.parametrize(("enabled", "is_main"), [(False, True), (True, False)])
def test_untracked_leaves_nothing_on_the_disk(
    enabled: bool, is_main: bool, tmp_path: Path, run_dir: Path
) -> None:
    config = make_config(tracking={"enabled": enabled})
    outside = tmp_path.parent / f"{tmp_path.name}-notes"
    outside.mkdir()
    for tracker in (open_tracker(config, run_dir, is_main), resume_tracker(config, run_dir, is_main)):
        assert not tracker.run_id
        log_one_of_everything(tracker, outside)
    assert list(tmp_path.iterdir()) == []


def test_importing_the_module_imports_nothing_slow() -> None:
    slow = {"mlflow", "torch", "matplotlib"}
    script = f"import sys, cmvae.tracking; sys.exit(not {slow}.isdisjoint(sys.modules))"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[1])


def test_the_environment_says_where_to_track(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    open_tracker(make_config(), run_dir, is_main=True).end("FINISHED")
    assert (tmp_path / "other.db").is_file()
    assert not (tmp_path / "mlflow.db").exists()
    record = json.loads((run_dir / "mlflow.json").read_text())
    assert record["tracking_uri"] == f"sqlite:///{tmp_path}/other.db"


def test_an_unusable_server_at_the_start_does_not_stop_a_training(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/no/such/folder/mlflow.db")
    # MLflow would make the folder.
    _write(tmp_path / "no", "a file where the folder should be")
    log_one_of_everything(open_tracker(make_config(), run_dir, is_main=True), tmp_path)
    (warning,) = own_warnings(caplog)
    assert "continues without it" in warning
    assert "tracking.enabled=false" in warning
    assert not (run_dir / "mlflow.json").exists()


def test_failures_in_the_middle_are_told_once_and_end_by_themselves(
    tmp_path: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = open_tracker(make_config(), run_dir, is_main=True)
    reader = client(tmp_path)
    database = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    database.execute("ALTER TABLE metrics RENAME TO away")
    caplog.clear()
    for step in range(5):
        tracker.log_metrics({"train/loss": 3.0}, step)
        tracker.log_image(draw(), "reconstruction", step)
    assert len(own_warnings(caplog)) == 1

    database.execute("ALTER TABLE away RENAME TO metrics")
    database.close()
    tracker.log_metrics({"train/loss": 2.0}, step=5)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    tracker.log_metrics({"train/loss": 1.0}, step=6)
    tracker.end("FINISHED")
    run = reader.get_run(run_id(run_dir))
    points = reader.get_metric_history(run.info.run_id, "train/loss")
    # Step 5 fell into the pause; step 6 came after it.
    assert [point.step for point in points] == [6]
    assert run.info.status == "FINISHED"


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_deleted_experiment_is_named_and_the_run_goes_on(
    tmp_path: Path, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_tracker(make_config(), run_dir, is_main=True).end("FINISHED")
    known = client(tmp_path)
    known.delete_experiment(known.get_run(run_id(run_dir)).info.experiment_id)
    tracker = open_tracker(make_config(), tmp_path / "runs" / "other", is_main=True)
    assert not tracker.run_id
    (warning,) = own_warnings(caplog)
    assert "was deleted in MLflow. Set tracking.experiment=NAME, or restore it with `mlflow" in warning
