"""Train one experiment: a CMVAE, or the refiner of one.

    cmvae train digits seed=1 name=digits-1           # a shipped experiment, settings changed
    cmvae train configs/mine.yaml --num-clusters 12   # a YAML file
    cmvae train digits --launch zero2 --num-processes 2
    accelerate launch --config_file configs/accelerate/ddp.yaml launch/train.py configs/digits.yaml

Settings, data and run folder are checked in the first second. A run that was stopped goes on with
--resume; a worker that torchrun restarts (accelerate launch --max_restarts N) does so by itself.

Exit codes: 0 trained and exported; 2 an error to fix; 75 stopped by SIGTERM after a checkpoint, to
be queued again with --resume; 130 the same by Ctrl-C; 70 a rank did not respond. `accelerate
launch` turns every code but 0 into 1.
"""

from __future__ import annotations

import argparse
import os

from cmvae.commands.launcher import add_launch_arguments, read_launch
from cmvae.commands.shipped import add_experiment_arguments, find_experiment
from cmvae.config import CMVAEExperiment, ExperimentConfig, check_against_shards, load_config
from cmvae.data.index import ShardIndex
from cmvae.training.state import check_newest
from cmvae.utils.arguments import command_parser, positive_integer
from cmvae.utils.errors import UserError
from cmvae.utils.process_exit import stopped_code


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    add_experiment_arguments(parser)
    parser.add_argument(
        "--num-clusters",
        type=positive_integer,
        metavar="K",
        help="export so many clusters; the same as clusters.num_clusters=K (default: the criterion decides)",
    )
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument(
        "--resume", action="store_true", help="go on from the newest checkpoint, if there is one"
    )
    kept.add_argument("--overwrite", action="store_true", help="delete what an earlier run of this name left")
    add_launch_arguments(parser)
    return parser.parse_intermixed_args()


def check_run_folder(config: ExperimentConfig, resume: bool, overwrite: bool) -> None:
    """Refuse to train into the folder of another run.

    Raises:
        UserError: the folder holds a run, and neither `resume` nor `overwrite` was asked for.
    """
    holds = [name for name in ("checkpoints", "export") if (config.run_dir / name).exists()]
    if holds and not resume and not overwrite:
        raise UserError(
            f"{config.run_dir}: holds the {' and '.join(holds)} of an earlier run. Add --resume to go on "
            "with it, --overwrite to delete it, or output_dir=… to train elsewhere"
        )


def main() -> int:
    """Check, train, report."""
    arguments = parse_arguments()
    overrides = arguments.overrides
    if arguments.num_clusters is not None:
        overrides = [*overrides, f"clusters.num_clusters={arguments.num_clusters}"]
    launch = read_launch(arguments)
    path = find_experiment(arguments.config)
    config = load_config(path, overrides)
    index = ShardIndex.load(config.data.shards)
    check_against_shards(config, index, str(path))
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    resume, overwrite = arguments.resume or restarted, arguments.overwrite and not restarted
    check_run_folder(config, resume, overwrite)
    if resume:
        world_size = launch.world_size if launch else int(os.environ.get("WORLD_SIZE", "1"))
        check_newest(config, world_size=world_size)
    if launch:
        return launch.run("train")

    from cmvae.training.run import run_training

    measure = None
    if isinstance(config, CMVAEExperiment) and config.train.coherence_samples is not None:
        from cmvae.evaluation.validation_coherence import ValidationCoherence

        measure = ValidationCoherence(config, index, config.train.coherence_samples)
    stopped_by = run_training(config, index, resume, overwrite, measure)
    return 0 if stopped_by is None else stopped_code(stopped_by)
