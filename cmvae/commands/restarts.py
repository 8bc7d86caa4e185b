"""Train one experiment from several seeds, and choose one run without labels.

    cmvae restarts digits --restarts 5
    cmvae restarts configs/mine.yaml train.max_steps=500 --parallel 2

Each run is a process of its own, as `cmvae train` with another seed, --parallel at a time: on GPUs
one each, else one per core. Folder: output_dir, else runs/NAME-restarts/. It holds the runs, named
after their seeds; SEED.log, the output of each run; restarts.json, how the runs compare, which to
take, and a warning if they disagree; and consensus.csv, the cluster of each sample that most runs
agree about, with the share of runs that does. In MLflow the runs are children of one run, which has
these two files.

Given again after a stop or a kill, the command resumes what is not complete and leaves the rest.

Exit codes: 0 all runs complete; 1 some failed, and the others were compared; 2 an error to fix; 75
stopped by SIGTERM and 130 by Ctrl-C, after checkpoints.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from cmvae.commands.restart_runs import (
    CONSENSUS_NAME,
    RESTARTS_NAME,
    Answer,
    check_earlier,
    delete_earlier,
    find_answer,
    format_answer,
    is_complete,
    overrides_of,
    plan_restarts,
    restarts_folder,
)
from cmvae.commands.shipped import add_experiment_arguments, find_experiment
from cmvae.config import CMVAEExperiment, check_against_shards, load_config
from cmvae.data.index import ShardIndex
from cmvae.utils.arguments import command_parser, positive_integer
from cmvae.utils.errors import UserError
from cmvae.utils.process_exit import stopped_code
from cmvae.utils.processes import Job, divide_machine, run_jobs

_TAIL_BYTES = 4096


class Lines:
    """Prints one line per start and end and, on a terminal, the progress of each training."""

    def __init__(self) -> None:
        self._bars: dict[str, tqdm] = {}

    def started(self, job: Job) -> None:
        """Report the start of a job."""
        tqdm.write(f"{job.name}: training, log in {job.log}", file=sys.stderr)

    def running(self, jobs: Sequence[Job]) -> None:
        """Show the progress of the running jobs."""
        if not sys.stderr.isatty():
            return
        for job in jobs:
            if job.name not in self._bars:
                self._bars[job.name] = tqdm(bar_format="{desc}", leave=False, dynamic_ncols=True)
            self._bars[job.name].set_description_str(last_line(job.log))

    def ended(self, job: Job, exit_code: int) -> None:
        """Report the end of a job."""
        if job.name in self._bars:
            self._bars.pop(job.name).close()
        what = "complete" if exit_code == 0 else f"ended with exit code {exit_code}: {last_line(job.log)}"
        tqdm.write(f"{job.name}: {what}", file=sys.stderr)


def last_line(log: Path) -> str:
    """The last line of a log, which may be the last state of a progress bar."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    add_experiment_arguments(parser)
    parser.add_argument(
        "--restarts", type=positive_integer, default=5, metavar="N", help="runs, at least 2 (default: 5)"
    )
    parser.add_argument(
        "--parallel",
        type=positive_integer,
        metavar="P",
        help="runs at a time (default: one per GPU, without GPUs one per core)",
    )
    parser.add_argument("--overwrite", action="store_true", help="delete what earlier runs left, train anew")
    arguments = parser.parse_intermixed_args()
    if arguments.restarts < 2:
        parser.error("--restarts: it takes at least two runs to compare")
    return arguments


def check_experiment(arguments: argparse.Namespace) -> tuple[CMVAEExperiment, ShardIndex]:
    """The experiment and the index of its data.

    Raises:
        UserError: settings or data do not fit each other, or it is a refiner's experiment, or the folder
            is that of a single run.
    """
    config = load_config(find_experiment(arguments.config), arguments.overrides)
    if not isinstance(config, CMVAEExperiment):
        raise UserError(f"{arguments.config}: a refiner finds no clusters. Give the experiment of a CMVAE")
    index = ShardIndex.load(config.data.shards)
    check_against_shards(config, index, arguments.config)
    folder = restarts_folder(config)
    if (folder / "config.yaml").exists():
        raise UserError(f"{folder}: the folder of a single run. Give another one with output_dir=…")
    return config, index


def train_all(
    runs: Sequence[CMVAEExperiment], arguments: argparse.Namespace, folder: Path
) -> signal.Signals | None:
    """Train the runs that are not complete; returns None, or the signal that stopped them."""
    # Slow to import.
    import torch

    from cmvae.training.step_checks import StopRequest

    jobs = []
    for run in runs:
        if is_complete(run):
            print(f"seed {run.seed}: complete since an earlier call", file=sys.stderr)
            continue
        command = [sys.executable, "-m", "cmvae.commands", "train", arguments.config, *arguments.overrides]
        command += overrides_of(run)
        jobs.append(Job(f"seed {run.seed}", [*command, "--resume"], folder / f"{run.seed}.log"))
    slots = divide_machine(len(jobs), arguments.parallel, torch.accelerator.device_count())
    with StopRequest.listening() as stop:
        run_jobs(jobs, slots, lambda: stop.signal is not None, Lines())
    return stop.signal


def report(answer: Answer, folder: Path) -> None:
    """Print the result and the next command."""
    print(format_answer(answer))
    print(
        f"mean pairwise ARI {answer.mean_pairwise_ari:.3f}; {answer.unanimous:.0%} of the samples unanimous"
    )
    if answer.failed:
        print(f"failed: {', '.join(f'seed {seed}, {folder}/{seed}.log' for seed in answer.failed)}")
    if answer.warning is not None:
        print(answer.warning)
    print(f"chosen: {answer.chosen}. Next: cmvae evaluate {answer.chosen}")
    print(f"consensus: {folder / CONSENSUS_NAME}; how the runs compare: {folder / RESTARTS_NAME}")


def main() -> int:
    """Check, train, compare, report."""
    arguments = parse_arguments()
    config, index = check_experiment(arguments)
    folder = restarts_folder(config)
    runs = plan_restarts(config, arguments.restarts)
    if arguments.overwrite:
        delete_earlier(folder, runs)
    check_earlier(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}. Set output_dir=…") from error

    from cmvae.tracking import resume_tracker

    # Before the trainings, so that only one process makes a new database.
    tracker = resume_tracker(config, folder, is_main=True)
    stopped_by = train_all(runs, arguments, folder)
    if stopped_by is not None:
        print(f"{stopped_by.name}: stopped. Run the same command again to continue", file=sys.stderr)
        return stopped_code(stopped_by)
    answer = find_answer(runs, index, folder)
    tracker.log_metrics({"restarts/mean_pairwise_ari": answer.mean_pairwise_ari}, step=0)
    for name in (RESTARTS_NAME, CONSENSUS_NAME):
        tracker.log_artifact(folder / name)
    report(answer, folder)
    return 1 if answer.failed else 0
