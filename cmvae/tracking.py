"""Experiment tracking with MLflow: on by default, on rank 0 only, and never a reason for a run to stop.

The tracking URI is MLFLOW_TRACKING_URI, or else `sqlite:///mlflow.db` in the working folder, which `mlflow
ui` shows when it is started there; artifacts go to `mlruns/` beside it. The `mlflow.json` of a run folder
names its MLflow run, so that a resumed training and an evaluation continue it. A folder with runs, database
and artifacts can be moved or copied: the record finds the database from its own place, and the paths of
artifacts in the database are corrected when a run begins or is continued.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import platform
import sqlite3
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock

from cmvae.config import ExperimentConfig, RefinerExperiment, dump_yaml, flatten
from cmvae.data.index import ShardIndex
from cmvae.data.remote import Location, is_remote
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole

if TYPE_CHECKING:  # slow to import
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
    from PIL.Image import Image

RUN_RECORD_NAME = "mlflow.json"
_LOGGER = logging.getLogger(__name__)
_SQLITE = "sqlite:///"
# Seconds without requests after a failure, doubled by every further one. A request to a locked database takes
# 20 s to fail, and one to a server that does not answer 30 s, which a training cannot spend at every step.
_FIRST_PAUSE = 60.0
# Seconds to wait for another training that creates the same database.
_MAX_WAIT = 120.0
# MLflow's pages treat an experiment without a kind as one of language models, and open another page for it.
_EXPERIMENT_KIND = {"mlflow.experimentKind": "custom_model_development"}
_MODEL_ARTIFACT = "mlflow_model"
_ARTIFACTS_FOLDER = "mlruns"
# Where MLflow stores absolute paths of artifacts: tables and columns of its database.
_PATH_COLUMNS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
# MLflow accepts digests of up to 36 characters.
_DIGEST_LENGTH = 36
# Prefix of the tags that hold the last step of an image series.
_LAST_STEP_TAG = "last_step."

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    """Writes the metrics, figures, texts and files of a run to MLflow; without a client it drops them.

    No method raises or blocks for long: the first failure is a warning, further ones are ignored.

    Args:
        client: a client of the run's tracking server; None on ranks other than 0 and without tracking.
        run_id: MLflow's id of the run.
        monitor: the started system metrics monitor of a training; None for an evaluation, whose end is not
            the end of the run.
        repeats: whether steps may have been logged before, because the training resumes from a checkpoint.
            They are not logged again.
    """

    def __init__(
        self,
        client: MlflowClient | None = None,
        run_id: str = "",
        monitor: SystemMetricsMonitor | None = None,
        repeats: bool = False,
    ) -> None:
        self.run_id = run_id
        self._client = client
        self._monitor = monitor
        self._repeats = repeats
        self._last_steps: dict[str, int] = {}
        self._pause = _FIRST_PAUSE
        self._silent_until = -math.inf
        self._warned = False

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one point of every named metric."""
        now = int(time.time() * 1000)

        def log(client: MlflowClient) -> None:
            from mlflow.entities import Metric

            points = [Metric(key, float(value), now, step) for key, value in metrics.items()]
            # One call is one transaction, so its first point stands for all of them.
            if not self._repeats or step > self._last_step(client, points[0].key):
                client.log_batch(self.run_id, metrics=points)

        self._attempt(log)

    def log_figure(self, figure: Figure, name: str) -> None:
        """Log a figure as the artifact `figures/NAME.png`; replaces an earlier one."""
        self._attempt(lambda client: client.log_figure(self.run_id, figure, f"figures/{name}.png"))

    def log_text(self, text: str, name: str, step: int | None = None) -> None:
        """Log a text as `texts/NAME.txt`, or as `texts/NAME/step-STEP.txt`; replaces an earlier one."""
        # Zero-padded, because MLflow's pages sort by name.
        path = f"texts/{name}.txt" if step is None else f"texts/{name}/step-{step:08d}.txt"
        self._attempt(lambda client: client.log_text(self.run_id, text, path))

    def log_image(self, figure: Figure, key: str, step: int) -> None:
        """Log a figure to the image series `key`, which MLflow shows with a slider over steps."""
        tag = f"{_LAST_STEP_TAG}{key}"

        def log(client: MlflowClient) -> None:
            if not self._repeats or step > self._last_step_of_images(client, tag):
                client.log_image(self.run_id, _render(figure), key=key, step=step)
                client.set_tag(self.run_id, tag, step)

        self._attempt(log)

    def log_artifact(self, path: Path) -> None:
        """Upload a small file."""
        self._attempt(lambda client: client.log_artifact(self.run_id, str(path)))

    def log_folder(self, folder: Path) -> None:
        """Upload the files of a folder as artifacts below its name."""
        self._attempt(lambda client: client.log_artifacts(self.run_id, str(folder), folder.name))

    def log_data(self, index: ShardIndex, location: Location) -> None:
        """Log the packed data as the input of the run: name, digest and source."""

        def log(client: MlflowClient) -> None:
            from mlflow.entities import Dataset, DatasetInput, InputTag

            uri = str(location) if is_remote(location) else str(Path(location).absolute())
            dataset = Dataset(
                name=index.name,
                digest=index.digest[:_DIGEST_LENGTH],
                source_type=uri.partition("://")[0] if is_remote(location) else "local",
                source=json.dumps({"uri": uri}),
                profile=json.dumps({name: split.num_samples for name, split in index.splits.items()}),
            )
            logged = DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
            client.log_inputs(self.run_id, datasets=[logged])

        self._attempt(log)

    def end(self, status: Status) -> None:
        """End the run with a status; nothing may be logged afterwards."""
        monitor = self._monitor
        if monitor is not None:
            self._attempt(lambda _: monitor.finish(), pause=False)
            self._attempt(lambda client: client.set_terminated(self.run_id, status), pause=False)

    def _last_step(self, client: MlflowClient, key: str) -> int:
        """Last step of a metric before this training resumed it; −1 if there is none."""
        if key not in self._last_steps:
            history = client.get_metric_history(self.run_id, key)
            self._last_steps[key] = max((point.step for point in history), default=-1)
        return self._last_steps[key]

    def _last_step_of_images(self, client: MlflowClient, tag: str) -> int:
        """The same for an image series, where MLflow keeps steps in the names of files only."""
        if tag not in self._last_steps:
            tags = client.get_run(self.run_id).data.tags
            self._last_steps[tag] = int(tags.get(tag, -1))
        return self._last_steps[tag]

    def _attempt(self, operation: Callable[[MlflowClient], object], pause: bool = True) -> None:
        """Run an operation unless, with `pause`, a failure is too recent."""
        if self._client is None or (pause and time.monotonic() < self._silent_until):
            return
        try:
            operation(self._client)
            self._pause = _FIRST_PAUSE
        # No error of MLflow, SQLAlchemy, the network or the disk may end a training.
        except Exception as error:
            self._silent_until = time.monotonic() + self._pause
            self._pause *= 2
            if not self._warned:
                self._warned = True
                _LOGGER.warning(
                    "Logging to MLflow failed (%s). The run continues; what cannot be logged is lost. "
                    "Logging is tried again from time to time, without further warnings",
                    _first_line(error),
                )


@dataclass(frozen=True)
class _RunRecord:
    """Contents of `mlflow.json`."""

    tracking_uri: str
    run_id: str
    database: str | None = None
    """Path of an SQLite database from the run folder, which holds when both are moved; it goes before the
    URI."""


def open_tracker(config: ExperimentConfig, run_dir: Path, is_main: bool, task: str = "cmvae") -> Tracker:
    """Open the tracker of a training: a new MLflow run, or the one named by `run_dir/mlflow.json`.

    The run gets all settings as parameters, the YAML as `config.yaml`, and tags for task, world size (from
    the launcher's WORLD_SIZE), host and git commit. It becomes a child of the run of `tracking.parent`, or
    else a refiner's run of its CMVAE's. When a training resumes, tags and YAML are updated; MLflow's
    parameters cannot change, so a changed setting becomes a tag `resumed.KEY`. Points and images logged
    before are not repeated.

    Args:
        config: the experiment.
        run_dir: folder of the run.
        is_main: whether this is rank 0.
        task: name of the task.
    """
    return _guarded(config, is_main, lambda: _open_for_training(config, run_dir, task))


def resume_tracker(config: ExperimentConfig, run_dir: Path, is_main: bool) -> Tracker:
    """Open a tracker that adds an evaluation to the MLflow run of a training; `end` keeps the run's status.

    If `run_dir` has no MLflow run, or no longer has one, a new run is created.

    Args:
        config: the experiment.
        run_dir: folder of the run.
        is_main: whether this is rank 0.
    """
    return _guarded(config, is_main, lambda: _open_for_evaluation(config, run_dir))


def read_curves(run_dir: Path, prefixes: Sequence[str]) -> dict[str, dict[int, float]]:
    """Read the metrics of a run whose names begin with one of `prefixes` from MLflow.

    Returns:
        Metric → step → value, sorted by both.

    Raises:
        UserError: the run was not tracked, or MLflow does not have it.
    """
    record = _find_record(run_dir)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(tracking_uri=record.tracking_uri)
        names = sorted(client.get_run(record.run_id).data.metrics)
        histories = {
            name: client.get_metric_history(record.run_id, name)
            for name in names
            if name.startswith(tuple(prefixes))
        }
    except MlflowException as error:
        path = run_dir / RUN_RECORD_NAME
        raise UserError(f"{path}: its run is not in {record.tracking_uri}: {_first_line(error)}") from error
    return {
        name: {point.step: point.value for point in sorted(history, key=lambda point: point.step)}
        for name, history in histories.items()
    }


def register_model(run_dir: Path, folder: Path, name: str) -> int:
    """Log an MLflow model to the run of a training, and register it.

    Args:
        run_dir: folder of the run.
        folder: the MLflow model.
        name: name in the registry, which gets a new version.

    Returns:
        The number of the version.

    Raises:
        UserError: the run was not tracked, or MLflow refuses or does not answer.
    """
    record = _find_record(run_dir)
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    uri = _absolute(os.environ.get("MLFLOW_TRACKING_URI") or record.tracking_uri)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        _find_moved_artifacts(uri)
        client.log_artifacts(record.run_id, str(folder), _MODEL_ARTIFACT)
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name)
        source = f"{client.get_run(record.run_id).info.artifact_uri}/{_MODEL_ARTIFACT}"
        return int(client.create_model_version(name, source, record.run_id).version)
    except (MlflowException, sqlite3.Error) as error:
        raise UserError(f"--name {name}: cannot be registered in {uri}: {_first_line(error)}") from error


def _find_record(run_dir: Path) -> _RunRecord:
    """The MLflow run of a folder; prepares the environment for importing MLflow.

    Raises:
        UserError: the run was not tracked, or its database does not exist.
    """
    _configure_mlflow()
    path = run_dir / RUN_RECORD_NAME
    record = _read_record(path)
    if record is None:
        raise UserError(f"{path}: missing, because the run was not tracked. Train with tracking.enabled=true")
    if _database_is_missing(record.tracking_uri):
        raise UserError(f"{path}: its database {record.tracking_uri} does not exist. Copy it there")
    return record


def _guarded(config: ExperimentConfig, is_main: bool, opened: Callable[[], Tracker]) -> Tracker:
    if not (config.tracking.enabled and is_main):
        return Tracker()
    try:
        return opened()
    # A job queue may start a training while the tracking server is down.
    except Exception as error:
        _LOGGER.warning(
            "MLflow is not available (%s). The run continues without it; set MLFLOW_TRACKING_URI, or disable "
            "tracking with tracking.enabled=false",
            _first_line(error),
        )
        return Tracker()


def _open_for_training(config: ExperimentConfig, run_dir: Path, task: str) -> Tracker:
    client, run_id, is_new = _continue_or_create_run(config, run_dir)
    # The monitor stops when the status of the run is that of an earlier end.
    client.update_run(run_id, status="RUNNING")
    _describe(client, run_id, config)
    tags = {"task": task, "world_size": os.environ.get("WORLD_SIZE", "1"), "host": platform.node()}
    for key, value in {**tags, **_git_tags()}.items():
        client.set_tag(run_id, key, value)
    parent = _read_parent(config)
    if parent is not None:
        client.set_tag(run_id, "mlflow.parentRunId", parent.run_id)
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=client.tracking_uri)
    monitor.start()
    return Tracker(client, run_id, monitor, repeats=not is_new)


def _read_parent(config: ExperimentConfig) -> _RunRecord | None:
    folder = config.tracking.parent
    if folder is None and isinstance(config, RefinerExperiment):
        folder = config.cmvae
    return None if folder is None else _read_record(folder / RUN_RECORD_NAME)


def _open_for_evaluation(config: ExperimentConfig, run_dir: Path) -> Tracker:
    client, run_id, is_new = _continue_or_create_run(config, run_dir)
    if is_new:
        _describe(client, run_id, config)
        # No training will end this run; MLflow accepts points and files for an ended run as well.
        client.set_terminated(run_id)
    return Tracker(client, run_id)


def _continue_or_create_run(config: ExperimentConfig, run_dir: Path) -> tuple[MlflowClient, str, bool]:
    """A client, the id of the run, and whether the run is new."""
    _configure_mlflow()
    # Slow to import, and not needed where tracking is off.
    from mlflow import MlflowClient

    wanted_uri = os.environ.get("MLFLOW_TRACKING_URI")
    record = _read_record(run_dir / RUN_RECORD_NAME)
    if record is not None:
        uri = _absolute(wanted_uri or record.tracking_uri)
        if not _database_is_missing(uri):
            client = MlflowClient(tracking_uri=uri)
            if _is_alive(client, record.run_id):
                _find_moved_artifacts(uri)
                return client, record.run_id, False
        _LOGGER.warning(
            "%s names the MLflow run %s, which does not exist in %s. A new run is created",
            run_dir / RUN_RECORD_NAME,
            record.run_id,
            uri,
        )
    uri = _absolute(wanted_uri or f"{_SQLITE}mlflow.db")
    with _creating_database(uri):
        client = MlflowClient(tracking_uri=uri)
        _find_moved_artifacts(uri)
        run_id = _create_run(client, config)
    database = os.path.relpath(_database_path(uri), run_dir) if uri.startswith(_SQLITE) else None
    _write_record(run_dir, _RunRecord(uri, run_id, database))
    return client, run_id, True


def _configure_mlflow() -> None:
    """Set what MLflow reads when it is imported, unless the user has set it."""
    # Its own log prints a traceback per failure, its usage statistics need the internet, and by default a
    # call to a server takes minutes to fail.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


def _create_run(client: MlflowClient, config: ExperimentConfig) -> str:
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        experiment_id = client.create_experiment(config.tracking.experiment, tags=_EXPERIMENT_KIND)
    elif experiment.lifecycle_stage != "active":
        raise UserError(
            f"the experiment {config.tracking.experiment!r} was deleted in MLflow. Set "
            "tracking.experiment=NAME, or restore it with `mlflow experiments restore -x "
            f"{experiment.experiment_id}`"
        )
    else:
        experiment_id = experiment.experiment_id
    return client.create_run(experiment_id, run_name=config.name).info.run_id


def _write_record(run_dir: Path, record: _RunRecord) -> None:
    run_dir.mkdir(parents=True, exist_ok=True)
    content = json.dumps(asdict(record), indent=2) + "\n"
    write_whole(run_dir / RUN_RECORD_NAME, content.encode())


def _read_record(path: Path) -> _RunRecord | None:
    if not path.is_file():
        return None
    try:
        record = _RunRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        _LOGGER.warning("%s cannot be read. A new MLflow run is created", path)
        return None
    if record.database is not None:
        uri = _SQLITE + os.path.normpath(path.parent.absolute() / record.database)
        if not _database_is_missing(uri):
            return replace(record, tracking_uri=uri)
    return record


def _is_alive(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _describe(client: MlflowClient, run_id: str, config: ExperimentConfig) -> None:
    """Log the settings: new ones as parameters, changed ones as tags, all of them as `config.yaml`."""
    from mlflow.entities import Param

    logged = client.get_run(run_id).data.params
    settings = {key: str(value) for key, value in flatten(config).items()}
    new = [Param(key, value) for key, value in settings.items() if key not in logged]
    client.log_batch(run_id, params=new)
    for key, value in settings.items():
        if logged.get(key, value) != value:
            client.set_tag(run_id, f"resumed.{key}", value)
    client.log_text(run_id, dump_yaml(config), "config.yaml")


def _git_tags() -> dict[str, str]:
    """The commit of this source and whether it has changes; empty outside a git checkout.

    MLflow's own context would take the repository of the started script, which the installed command is not
    in.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        # The arguments are constants, and PATH decides which git runs.
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
        return done.stdout.strip()

    try:
        # MLflow's pages show the first key as the run's version.
        return {
            "mlflow.source.git.commit": git("rev-parse", "HEAD"),
            "git_dirty": str(bool(git("status", "--porcelain", "--untracked-files=no"))).lower(),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def _absolute(uri: str) -> str:
    """The tracking URI with an absolute path, which is valid in every working folder."""
    if not uri.startswith(_SQLITE):
        return uri
    return _SQLITE + str(Path(uri.removeprefix(_SQLITE)).absolute())


def _database_is_missing(uri: str) -> bool:
    # SQLite would create an empty database.
    return uri.startswith(_SQLITE) and not _database_path(uri).is_file()


def _database_path(uri: str) -> Path:
    """The file of an SQLite database."""
    return Path(uri.removeprefix(_SQLITE).partition("?")[0])


def _find_moved_artifacts(uri: str) -> None:
    """Correct the paths of artifacts that were moved or copied together with their SQLite database.

    MLflow stores absolute paths and cannot change them. Artifacts are those of this database if the folder of
    a run is beside it.
    """
    if not uri.startswith(_SQLITE):
        return
    here = f"{_database_path(uri).parent / _ARTIFACTS_FOLDER}/"
    with closing(sqlite3.connect(_database_path(uri), timeout=_MAX_WAIT)) as connection, connection:
        stored = connection.execute(
            "SELECT artifact_uri FROM runs WHERE substr(artifact_uri, 1, ?) != ?", (len(here), here)
        )
        split = [path.rpartition(f"/{_ARTIFACTS_FOLDER}/") for (path,) in stored]
        moved = {f"{root}{name}" for root, name, rest in split if name and Path(here, rest).exists()}
        for old in moved:
            for table, column in _PATH_COLUMNS:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608 (constants)
                    f"WHERE substr({column}, 1, ?) = ?",
                    (here, len(old) + 1, len(old), old),
                )


def _creating_database(uri: str) -> AbstractContextManager[object]:
    """Wait for another training that creates the same SQLite database: MLflow fails if two do so at once."""
    if not uri.startswith(_SQLITE):
        return nullcontext()
    return FileLock(f"{_database_path(uri)}.lock", timeout=_MAX_WAIT)


def _render(figure: Figure) -> Image:
    """The pixels of a figure."""
    import PIL.Image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return PIL.Image.open(buffer).convert("RGB")


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
