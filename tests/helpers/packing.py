"""Sources and tables to pack, and the packed files."""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import numpy as np

from cmvae.datasets import table
from cmvae.datasets.base import Sample
from cmvae.modalities import ImageModality


def parse(path: Path, flags: str, *more: str) -> argparse.Namespace:
    """The arguments of a command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("shards/mine"))
    parser.add_argument("--seed", type=int, default=0)
    table.add_arguments(parser)
    return parser.parse_args([str(path), *flags.split(), *more])


def read(path: Path, flags: str, *more: str):
    """The table source for the arguments of a command line."""
    return table.from_arguments(parse(path, flags, *more))


def write_csv(path: Path, rows: list[dict[str, object]], **settings) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys(), **settings)
        writer.writeheader()
        writer.writerows(rows)
    return path


class NumberSource:
    """Samples whose pixels and label equal the index of the sample."""

    name = "numbers"
    modalities = {"m0": ImageModality(shape=(1, 2, 2))}  # noqa: RUF012
    class_names = tuple(str(number) for number in range(60))
    settings = {"source": "test"}  # noqa: RUF012
    split_sizes = {"train": 60, "test": 10}  # noqa: RUF012

    def __init__(self, bad: int = -1, action=None, seconds: float = 0.0):
        self.bad, self.action, self.seconds = bad, action, seconds

    def sample(self, split, index):
        time.sleep(self.seconds)
        if index == self.bad:
            self.action()
        return Sample({"m0": np.full((1, 2, 2), index, dtype=np.uint8)}, label=index)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}
