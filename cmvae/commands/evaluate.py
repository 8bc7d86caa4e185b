"""Evaluate a trained run by the protocols of the field.

    python launch/evaluate.py runs/NAME [metrics=[clustering,coherence]] [split=test] [key=value …]
    accelerate launch --config_file configs/accelerate/ddp.yaml launch/evaluate.py runs/NAME …

Starts from the run's export, writes `runs/NAME/evaluation/` (metrics.json, protocol.json, figures/) and adds
all of it to the run in MLflow. On several ranks the figures are the same, sooner.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cmvae.config import check_against_shards, load_run_config
from cmvae.data.index import ShardIndex


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Evaluate a trained run by the protocols of the field.")
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/digits")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings of the section `evaluation`, e.g. metrics=[clustering] split=validation; keys with a "
        "dot are the experiment's, e.g. data.shards=elsewhere",
    )
    return parser.parse_args()


def evaluation_setting(override: str) -> str:
    """The override of the whole experiment that a key of the section `evaluation` stands for."""
    key = override.partition("=")[0]
    return override if "." in key else f"evaluation.{override}"


def main() -> int:
    """Check, evaluate, print the table."""
    arguments = parse_arguments()
    config = load_run_config(
        arguments.run, [evaluation_setting(override) for override in arguments.overrides]
    )
    index = ShardIndex.load(config.data.shards)
    check_against_shards(config, index, str(arguments.run / "config.yaml"))
    index.split(config.evaluation.split, config.data.shards)

    from cmvae.evaluation.report import format_report
    from cmvae.evaluation.run import evaluate_run

    result = evaluate_run(config, index, arguments.run)
    if result is not None:
        print(format_report(result))
        print(f"\npictures: {arguments.run / 'evaluation' / 'figures'}")
    return 0
