"""How noisy a training's gradient is: python tools/gradient_variance.py runs/NAME --beside key=value."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a checkout that is not installed

from cmvae.arguments import positive_integer
from cmvae.errors import UserError

if TYPE_CHECKING:  # slow to import
    from cmvae.benchmark.gradient_variance import GradientVariance

AS_CONFIGURED = "as configured"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="The variance of the gradient over batches and noise, of a CMVAE's trained weights, as a "
        "multiple of its squared mean: with the run's settings, and with others beside them."
    )
    parser.add_argument("run", type=Path, metavar="runs/NAME")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="SETTINGS",
        help="with these settings, key=value separated by spaces; any number of times",
    )
    parser.add_argument(
        "--draws", type=positive_integer, default=200, metavar="N", help="gradients of each (default: 200)"
    )
    parsed = parser.parse_args(arguments)
    if parsed.draws < 2:
        parser.error("--draws 1: a variance takes two at least")
    return parsed


def to_markdown(by_settings: Mapping[str, Mapping[str, GradientVariance]]) -> str:
    """A line for each of the settings, a column for each part of the model."""
    first = next(iter(by_settings.values()))
    lines = [f"| | {' | '.join(first)} |", "|---|" + "--:|" * len(first)]
    for settings, parts in by_settings.items():
        cells = []
        for part, it in parts.items():
            # All settings have the same expected gradient: the first, the least noisy, says best how large.
            cell = f"{it.variance / first[part].squared_mean:.3g}"
            if settings != AS_CONFIGURED:
                cell += f" ({it.variance / first[part].variance:.2f} ×)"
            cells.append(cell)
        lines.append(f"| {settings} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Measure, print."""
    arguments = parse_arguments()
    try:
        from cmvae.benchmark.gradient_variance import variance_of_run

        by_settings = {AS_CONFIGURED: variance_of_run(arguments.run, [], arguments.draws)}
        for settings in arguments.beside:
            by_settings[settings] = variance_of_run(arguments.run, settings.split(), arguments.draws)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(to_markdown(by_settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
