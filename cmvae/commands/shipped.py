"""The experiments and launch files that come with the package, by name: `digits`, `zero2`."""

from __future__ import annotations

import argparse
from pathlib import Path

from cmvae.utils.errors import UserError

# Package data; in a checkout a link to configs/ at its top.
_CONFIGS = (Path(__file__).parents[1] / "configs").resolve()


def add_experiment_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the experiment, `config`, and its `overrides`."""
    parser.add_argument("config", help="a YAML file, or the name of a shipped experiment, e.g. digits")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings to change, e.g. train.batch_size=64"
    )


def find_experiment(text: str) -> Path:
    """The YAML file of an experiment: `text` if it is a file, else the shipped experiment of that name.

    Raises:
        UserError: there is neither.
    """
    return _find(text, _CONFIGS, "experiment")


def find_launch_file(text: str) -> Path:
    """A config file of accelerate: `text` if it is a file, else the shipped one of that name.

    Raises:
        UserError: there is neither.
    """
    return _find(text, _CONFIGS / "accelerate", "launch file")


def find_deepspeed_file(text: str, launch_file: Path) -> Path:
    """The DeepSpeed JSON that a launch file names.

    Shipped launch files name it relative to the folder that holds configs/. Any other path is used as it is,
    relative to the current folder.
    """
    return _CONFIGS.parent / text if launch_file.is_relative_to(_CONFIGS) else Path(text)


def _find(text: str, folder: Path, what: str) -> Path:
    path = Path(text)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if text not in shipped:
        raise UserError(f"{text}: no such file, and no {what} has this name. Names: {', '.join(shipped)}")
    return shipped[text]
