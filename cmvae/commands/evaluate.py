"""Evaluate a trained run by the protocols of the field.

    cmvae evaluate runs/digits
    cmvae evaluate runs/digits metrics=[clustering,coherence] split=validation
    cmvae evaluate runs/digits --launch ddp --num-processes 4

Starts from the export of the run, writes runs/NAME/evaluation/ (metrics.json, protocol.json,
figures/, report.html) and adds all of it to the run in MLflow. Several ranks share the work; the
metrics are the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cmvae.commands.launcher import add_launch_arguments, read_launch
from cmvae.config import check_against_shards, load_run_config
from cmvae.data.index import ShardIndex
from cmvae.utils.arguments import command_parser


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/digits")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings of the section `evaluation`; keys with a dot are those of the experiment, e.g. "
        "data.shards=elsewhere",
    )
    add_launch_arguments(parser)
    return parser.parse_intermixed_args()


def evaluation_setting(override: str) -> str:
    """The override of the whole experiment that a key of the section `evaluation` stands for."""
    key = override.partition("=")[0]
    return override if "." in key else f"evaluation.{override}"


def main() -> int:
    """Check, evaluate, print the table."""
    arguments = parse_arguments()
    launch = read_launch(arguments)
    config = load_run_config(
        arguments.run, [evaluation_setting(override) for override in arguments.overrides]
    )
    index = ShardIndex.load(config.data.shards)
    check_against_shards(config, index, str(arguments.run / "config.yaml"))
    index.split(config.evaluation.split, config.data.shards)

    if launch:
        return launch.run("evaluate")

    from cmvae.evaluation.report import format_report
    from cmvae.evaluation.run import evaluate_run

    result = evaluate_run(config, index, arguments.run)
    if result is not None:
        print(format_report(result))
        print(f"\npictures: {arguments.run / 'evaluation' / 'figures'}")
    return 0
