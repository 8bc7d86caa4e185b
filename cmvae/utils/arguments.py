"""Types of command-line arguments for argparse, without slow imports."""

from __future__ import annotations

import argparse


def positive_integer(text: str) -> int:
    """Parse an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def non_negative_integer(text: str) -> int:
    """Parse an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def fraction_below_one(text: str) -> float:
    """Parse a number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def comma_separated(text: str) -> tuple[str, ...]:
    """Parse names separated by commas, without repetitions."""
    parts = [name.strip() for name in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give one name, or several separated by commas, such as m0,m1"
        )
    return tuple(dict.fromkeys(parts))


def add_num_clusters_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--num-clusters`, of commands that use a trained model."""
    parser.add_argument(
        "--num-clusters",
        type=positive_integer,
        metavar="K",
        help="number of clusters, from the same model (default: what its export selected)",
    )


def command_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose `--help` begins with `doc`, the docstring of a command's module, as it is formatted."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
