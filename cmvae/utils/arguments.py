"""Types of command-line arguments, for argparse; imports nothing heavy."""

from __future__ import annotations

import argparse


def positive_integer(text: str) -> int:
    """An integer from 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def non_negative_integer(text: str) -> int:
    """An integer from 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def share_below_one(text: str) -> float:
    """A share from 0, below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to below 1")
    return value


def comma_separated(text: str) -> tuple[str, ...]:
    """Names with commas between them, in their order, each once."""
    parts = [name.strip() for name in text.split(",")]
    if not all(parts):
        raise argparse.ArgumentTypeError(f"{text!r}: write NAME, or several with commas, such as m0,m1")
    return tuple(dict.fromkeys(parts))


def command_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose `--help` begins with the documentation of a command's module as it stands there."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
