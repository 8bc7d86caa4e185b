"""Experiment tracking with MLflow: on by default, on rank 0 only, and never a reason for a training to stop.

The tracking URI is MLFLOW_TRACKING_URI, else `sqlite:///mlflow.db` in the working folder, which is what a
bare `mlflow ui` started there shows; artifacts then go to `mlruns/` beside it. Which run of MLflow a run
folder belongs to stands in its `mlflow.json`, so that a resumed training and an evaluation go on in it.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from cmvae.config import ExperimentConfig, RefinerExperiment, dump_yaml, flatten
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

RUN_RECORD_NAME = "mlflow.json"
_LOGGER = logging.getLogger(__name__)
_SQLITE = "sqlite:///"
# After a failure nothing is sent for so many seconds, doubled with every further failure: a locked database
# is given up after 20 s, a server that does not answer after half a minute, and a training cannot spare
# that at every step.
_FIRST_PAUSE = 60.0
# MLflow refuses more parameters than this in one request.
_MAX_PARAMS_PER_REQUEST = 100

# How MLflow names the pictures of a series.
_IMAGE_PATH = re.compile(r"(?P<series>images/[^+]*)\+step\+(?P<step>\d+)\+timestamp\+.*\.png")

Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """Where the curves, pictures, texts and files of a run go. No method raises or blocks for long."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """One point of every curve named."""

    def log_figure(self, figure: Figure, name: str) -> None:
        """A figure as the artifact `figures/NAME.png`; a later one of the same name replaces it."""

    def log_text(self, text: str, name: str, step: int | None = None) -> None:
        """A text as the artifact `texts/NAME.txt`, or as `texts/NAME/step-STEP.txt`, one of a series.

        A later one of the same name and step replaces it.
        """

    def log_image(self, image: Figure | npt.NDArray[np.generic], key: str, step: int) -> None:
        """One moment of the picture series `key`, shown with a slider over steps.

        Args:
            image: a figure, or pixels (H, W, 3), uint8 or floats in [0, 1].
            key: name of the series.
            step: optimizer steps so far.
        """

    def log_artifact(self, path: Path) -> None:
        """Upload a small file."""

    def end(self, status: Status) -> None:
        """Say how the run ended; nothing may be logged afterwards."""


class NullTracker:
    """A tracker that keeps nothing: for ranks other than 0 and for `tracking.enabled: false`."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def log_figure(self, figure: Figure, name: str) -> None:
        """Nothing."""

    def log_text(self, text: str, name: str, step: int | None = None) -> None:
        """Nothing."""

    def log_image(self, image: Figure | npt.NDArray[np.generic], key: str, step: int) -> None:
        """Nothing."""

    def log_artifact(self, path: Path) -> None:
        """Nothing."""

    def end(self, status: Status) -> None:
        """Nothing."""


class MlflowTracker:
    """A tracker that writes to one MLflow run; failures are told once and otherwise ignored.

    Args:
        client: a client of the run's tracking server.
        run_id: MLflow's id of the run.
        monitor: the started monitor of CPU, memory and GPUs of a training; None where the run is only
            added to, by an evaluation, whose end is not the end of the run.
        repeats: whether what is logged may be there already, because the training goes on from a checkpoint
            before the moment at which it was killed. Then it is not logged again.
    """

    def __init__(
        self,
        client: MlflowClient,
        run_id: str,
        monitor: SystemMetricsMonitor | None,
        repeats: bool = False,
    ) -> None:
        self.run_id = run_id
        self._client = client
        self._monitor = monitor
        self._repeats = repeats
        self._last_steps: dict[str, int] = {}
        self._pause = _FIRST_PAUSE
        self._silent_until = -np.inf
        self._warned = False

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        points = [Metric(key, float(value), now, step) for key, value in metrics.items()]

        def log() -> None:
            # One call is one transaction: where its first point is, all of them are.
            if not self._repeats or step > self._last_step(points[0].key):
                self._client.log_batch(self.run_id, metrics=points)

        self._attempt(log)

    def _last_step(self, key: str) -> int:
        """The last step of a curve when this training began to go on with it, −1 if there is none."""
        if key not in self._last_steps:
            history = self._client.get_metric_history(self.run_id, key)
            self._last_steps[key] = max((point.step for point in history), default=-1)
        return self._last_steps[key]

    def log_figure(self, figure: Figure, name: str) -> None:
        """See `Tracker`."""
        self._attempt(lambda: self._client.log_figure(self.run_id, figure, f"figures/{name}.png"))

    def log_text(self, text: str, name: str, step: int | None = None) -> None:
        """See `Tracker`."""
        # With zeros, so that MLflow's pages, which sort by name, show the steps in their order.
        path = f"texts/{name}.txt" if step is None else f"texts/{name}/step-{step:08d}.txt"
        self._attempt(lambda: self._client.log_text(self.run_id, text, path))

    def log_image(self, image: Figure | npt.NDArray[np.generic], key: str, step: int) -> None:
        """See `Tracker`."""
        pixels = image if isinstance(image, np.ndarray) else _render(image)

        def log() -> None:
            if not self._repeats or step > self._last_step_of_images(key):
                self._client.log_image(self.run_id, pixels, key=key, step=step)

        self._attempt(log)

    def _last_step_of_images(self, key: str) -> int:
        """The same of a series of pictures, whose steps MLflow keeps in the names of files alone."""
        series = f"images/{key.replace('/', '~')}"
        if series not in self._last_steps:
            paths = [artifact.path for artifact in self._client.list_artifacts(self.run_id, "images")]
            steps = [_IMAGE_PATH.fullmatch(path) for path in paths]
            self._last_steps[series] = max(
                (int(found["step"]) for found in steps if found is not None and found["series"] == series),
                default=-1,
            )
        return self._last_steps[series]

    def log_artifact(self, path: Path) -> None:
        """See `Tracker`."""
        self._attempt(lambda: self._client.log_artifact(self.run_id, str(path)))

    def end(self, status: Status) -> None:
        """See `Tracker`."""
        if self._monitor is not None:
            self._try(self._monitor.finish)
            self._try(lambda: self._client.set_terminated(self.run_id, status))

    def _attempt(self, operation: Callable[[], object]) -> None:
        """Run an operation unless a failure is too recent."""
        if time.monotonic() >= self._silent_until:
            self._try(operation)

    def _try(self, operation: Callable[[], object]) -> None:
        try:
            operation()
            self._pause = _FIRST_PAUSE
        # Whatever MLflow, SQLAlchemy, the network or the disk raises is worth less than the training.
        except Exception as error:
            self._silent_until = time.monotonic() + self._pause
            self._pause *= 2
            if not self._warned:
                self._warned = True
                _LOGGER.warning(
                    "MLflow does not take what is logged (%s). The run goes on, and what cannot be logged is "
                    "lost; it is tried again from time to time, without further warnings",
                    _first_line(error),
                )


@dataclass(frozen=True)
class _RunRecord:
    """What `mlflow.json` says."""

    tracking_uri: str
    run_id: str


def open_tracker(config: ExperimentConfig, run_dir: Path, is_main: bool, task: str = "cmvae") -> Tracker:
    """The tracker of a training: a new run of MLflow, or the one that `run_dir` already belongs to.

    A new run gets all settings as parameters, the YAML as `config.yaml`, and tags for task, world size
    (from the launcher's WORLD_SIZE), host and git commit; it becomes a child of the run of `tracking.parent`,
    else a refiner's run of its CMVAE's. In a resumed run tags and YAML are those of the last start; MLflow's
    parameters cannot change, so a setting that did stands in a tag `resumed.KEY`; and points and pictures
    that are there are not logged again.

    Args:
        config: the experiment.
        run_dir: folder of the run.
        is_main: whether this is rank 0.
        task: what is trained.
    """
    return _guarded(config, is_main, lambda: _open_for_training(config, run_dir, task))


def resume_tracker(config: ExperimentConfig, run_dir: Path, is_main: bool) -> Tracker:
    """A tracker that adds to the run of a training, for its evaluation; `end` leaves the run's status alone.

    Where `run_dir` belongs to no run of MLflow (any more), a new one is made.

    Args:
        config: the experiment.
        run_dir: folder of the run.
        is_main: whether this is rank 0.
    """
    return _guarded(config, is_main, lambda: _open_for_evaluation(config, run_dir))


def read_curve(run_dir: Path, metric: str) -> dict[int, float]:
    """A curve of a run as MLflow has it, by step.

    Raises:
        UserError: the run was not tracked, or has no such curve.
    """
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    path = run_dir / RUN_RECORD_NAME
    record = _read_record(path)
    if record is None:
        raise UserError(f"{path}: missing: the run was not tracked. Train with tracking.enabled=true")
    try:
        points = MlflowClient(tracking_uri=record.tracking_uri).get_metric_history(record.run_id, metric)
    except MlflowException as error:
        raise UserError(f"{path}: {record.tracking_uri} does not have it: {_first_line(error)}") from error
    if not points:
        raise UserError(f"{run_dir}: no curve {metric!r} in {record.tracking_uri}")
    return {point.step: point.value for point in points}


def _guarded(config: ExperimentConfig, is_main: bool, opened: Callable[[], Tracker]) -> Tracker:
    if not (config.tracking.enabled and is_main):
        return NullTracker()
    try:
        return opened()
    # A queue may start a training while the tracking server is down: better untracked than not at all.
    except Exception as error:
        _LOGGER.warning(
            "MLflow cannot be used (%s). This run goes on without it; set MLFLOW_TRACKING_URI, or "
            "tracking.enabled=false to do without",
            _first_line(error),
        )
        return NullTracker()


def _open_for_training(config: ExperimentConfig, run_dir: Path, task: str) -> MlflowTracker:
    client, run_id, is_new = _continue_or_create_run(config, run_dir)
    # The monitor takes a run for ended, and stops, as long as its status is that of an earlier end.
    client.update_run(run_id, status="RUNNING")
    _describe(client, run_id, config)
    tags = {"task": task, "world_size": os.environ.get("WORLD_SIZE", "1"), "host": platform.node()}
    for key, value in {**tags, **_git_tags()}.items():
        client.set_tag(run_id, key, value)
    parent = _read_parent(config)
    if parent is not None:
        # MLflow's pages show a run below its parent, with a link.
        client.set_tag(run_id, "mlflow.parentRunId", parent.run_id)
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    monitor = SystemMetricsMonitor(run_id, resume_logging=True, tracking_uri=client.tracking_uri)
    monitor.start()
    return MlflowTracker(client, run_id, monitor, repeats=not is_new)


def _read_parent(config: ExperimentConfig) -> _RunRecord | None:
    folder = config.tracking.parent
    if folder is None and isinstance(config, RefinerExperiment):
        folder = config.cmvae
    return None if folder is None else _read_record(folder / RUN_RECORD_NAME)


def _open_for_evaluation(config: ExperimentConfig, run_dir: Path) -> MlflowTracker:
    client, run_id, is_new = _continue_or_create_run(config, run_dir)
    if is_new:
        _describe(client, run_id, config)
        # No training will end this run; MLflow takes points and files for an ended run as well.
        client.set_terminated(run_id)
    return MlflowTracker(client, run_id, monitor=None)


def _continue_or_create_run(config: ExperimentConfig, run_dir: Path) -> tuple[MlflowClient, str, bool]:
    """A client, the id of the run, and whether the run is new."""
    # Read by MLflow when it is imported. Its own log repeats every failure with a page of traceback, its
    # usage statistics want the internet, and its patience with a server is measured in minutes a call.
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "CRITICAL")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    # MLflow takes two seconds to import, and is not wanted at all where tracking is off.
    from mlflow import MlflowClient

    wanted_uri = os.environ.get("MLFLOW_TRACKING_URI")
    record = _read_record(run_dir / RUN_RECORD_NAME)
    if record is not None:
        uri = _absolute(wanted_uri or record.tracking_uri)
        if not _database_is_missing(uri):
            client = MlflowClient(tracking_uri=uri)
            if _is_alive(client, record.run_id):
                return client, record.run_id, False
        _LOGGER.warning(
            "%s names the MLflow run %s, which is not (any more) in %s: a new run begins",
            run_dir / RUN_RECORD_NAME,
            record.run_id,
            uri,
        )
    uri = _absolute(wanted_uri or f"{_SQLITE}mlflow.db")
    client = MlflowClient(tracking_uri=uri)
    run_id = _create_run(client, config)
    _write_record(run_dir, _RunRecord(uri, run_id))
    return client, run_id, True


def _create_run(client: MlflowClient, config: ExperimentConfig) -> str:
    experiment = client.get_experiment_by_name(config.tracking.experiment)
    if experiment is None:
        experiment_id = client.create_experiment(config.tracking.experiment)
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
        return _RunRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        _LOGGER.warning("%s cannot be read, so that a new MLflow run begins", path)
        return None


def _is_alive(client: MlflowClient, run_id: str) -> bool:
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id).info.lifecycle_stage == "active"
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise


def _describe(client: MlflowClient, run_id: str, config: ExperimentConfig) -> None:
    """Log every setting: new ones as parameters, changed ones as tags, all as `config.yaml`."""
    from mlflow.entities import Param

    logged = client.get_run(run_id).data.params
    settings = {key: str(value) for key, value in flatten(config).items()}
    new = [Param(key, value) for key, value in settings.items() if key not in logged]
    for start in range(0, len(new), _MAX_PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=new[start : start + _MAX_PARAMS_PER_REQUEST])
    for key, value in settings.items():
        if logged.get(key, value) != value:
            client.set_tag(run_id, f"resumed.{key}", value)
    client.log_text(run_id, dump_yaml(config), "config.yaml")


def _git_tags() -> dict[str, str]:
    """The commit of this source and whether it has changes; nothing where it is no git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        # The arguments are constants, and which git is meant is the user's choice of PATH.
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
        return done.stdout.strip()

    try:
        # The first key is the one that MLflow's pages show as the run's version.
        return {
            "mlflow.source.git.commit": git("rev-parse", "HEAD"),
            "git_dirty": str(bool(git("status", "--porcelain", "--untracked-files=no"))).lower(),
        }
    except (OSError, subprocess.SubprocessError):
        return {}


def _absolute(uri: str) -> str:
    """A tracking URI that means the same from every working folder."""
    if not uri.startswith(_SQLITE):
        return uri
    return _SQLITE + str(Path(uri.removeprefix(_SQLITE)).absolute())


def _database_is_missing(uri: str) -> bool:
    # Asked first because SQLite makes an empty database of any name that it is asked for.
    return uri.startswith(_SQLITE) and not Path(uri.removeprefix(_SQLITE).partition("?")[0]).is_file()


def _render(figure: Figure) -> npt.NDArray[np.uint8]:
    """Pixels (H, W, 3) of a figure."""
    # Imported when something is drawn: a training starts without it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[:, :, :3].copy()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
