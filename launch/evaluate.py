"""Evaluate a trained run on its test split.

    python launch/evaluate.py runs/NAME [key=value …]

Starts from the run's export, writes `runs/NAME/evaluation/metrics.json` and figures beside it, and adds both
to the run in MLflow.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from cmvae.config import check_against_shards, load_config
from cmvae.data.schema import ShardIndex
from cmvae.errors import UserError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Evaluate a trained run on its test split.")
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/digits")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    return parser.parse_args()


def main() -> int:
    """Check, evaluate, print the table."""
    arguments = parse_arguments()
    source = arguments.run / "config.yaml"
    try:
        if not source.is_file():
            raise UserError(
                f"{source}: missing, so {arguments.run} is no run. Train one with launch/train.py"
            )
        config = load_config(source, arguments.overrides)
        index = ShardIndex.load(config.data.shards)
        check_against_shards(config, index, str(source))

        from cmvae.evaluation.report import format_table
        from cmvae.evaluation.run import evaluate_run

        metrics = evaluate_run(config, index, arguments.run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(format_table(metrics))
    print(f"\npictures: {arguments.run / 'evaluation' / 'figures'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
