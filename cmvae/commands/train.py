r"""Train one experiment.

    accelerate launch [--config_file configs/accelerate/X.yaml] launch/train.py configs/NAME.yaml \
        [key=value …] [--num-clusters K] [--resume | --overwrite]

Settings, data and run folder are checked before anything heavy is imported, so that a mistake is told in the
first second. A worker that torchrun restarts (--max_restarts N of accelerate launch) goes on from the newest
checkpoint by itself. Exit codes: 0 trained and exported; 2 something that you can mend; 75 stopped by SIGTERM
after a checkpoint, to be queued again with --resume; 130 the same by Ctrl-C; 70 a rank stood still. Launchers
of several ranks turn every code but 0 into 1.
"""

from __future__ import annotations

import argparse
import os
import signal

from cmvae.config import ExperimentConfig, check_against_shards, load_config
from cmvae.data.index import ShardIndex
from cmvae.training.state import check_newest
from cmvae.utils.arguments import positive_integer
from cmvae.utils.errors import UserError

# Of sysexits.h: a failure for now, after which to try again.
EX_TEMPFAIL = 75


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train a CMVAE, or the refiner of one.")
    parser.add_argument("config", help="the experiment, a YAML file in configs/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, e.g. train.batch_size=64"
    )
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
    config = load_config(arguments.config, overrides)
    index = ShardIndex.load(config.data.shards)
    check_against_shards(config, index, arguments.config)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    resume, overwrite = arguments.resume or restarted, arguments.overwrite and not restarted
    check_run_folder(config, resume, overwrite)
    if resume:
        check_newest(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))

    from cmvae.training.run import run_training

    stopped_by = run_training(config, index, resume, overwrite)
    if stopped_by is None:
        return 0
    return EX_TEMPFAIL if stopped_by == signal.SIGTERM else 128 + stopped_by
