"""What a source of samples is: the one interface between a data set and the shard writer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cmvae.data.index import SplitName
from cmvae.modalities import Modality

SPLIT_NUMBERS: dict[SplitName, int] = {"train": 0, "validation": 1, "test": 2}
"""Place of each split in the keys of random streams."""


@dataclass(frozen=True)
class Sample:
    """One sample as it goes into a shard."""

    values: Mapping[str, np.ndarray]
    """Modality to what is stored of it, see `cmvae.modalities`; without those optional ones that it lacks."""
    label: int | None
    """Number of the class, null where the data has no labels."""
    key: str | None = None
    """What it is called in the shards, without dots and slashes; None is the split and its number there."""
    group: str | None = None
    """Name of the samples that it belongs together with, such as their photograph; None is a sample alone."""


class Source(Protocol):
    """A data set that can be packed.

    A sample must be a function of (split, index) and the settings of the source alone, never of what was
    asked for before: several processes ask, each for other samples.
    """

    @property
    def name(self) -> str:
        """Name of the data set."""

    @property
    def modalities(self) -> Mapping[str, Modality]:
        """What each sample holds."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels 0, 1, …; null where the data has no labels."""

    @property
    def settings(self) -> Mapping[str, str | int | float | bool | None]:
        """Where the data came from and how it was made, for `ShardIndex.source`."""

    @property
    def split_sizes(self) -> Mapping[SplitName, int]:
        """Samples of each split."""

    def sample(self, split: SplitName, index: int) -> Sample:
        """Sample number `index`, below `split_sizes[split]`, of `split`."""


class SourceModule(Protocol):
    """What a module in `cmvae.datasets` offers to `cmvae pack`."""

    @property
    def DESCRIPTION(self) -> str:  # noqa: N802 (a constant of the module)
        """What it is, in a line."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the source's own flags to its sub-command."""

    def config_for(self, arguments: argparse.Namespace) -> Path | None:
        """The experiment in configs/ that fits what the flags describe.

        None for people's own data: there a config to start from is made of what was packed, and a flag
        `--config PATH` says where to.
        """

    def from_arguments(self, arguments: argparse.Namespace) -> Source:
        """Open the source.

        Raises:
            UserError: what it reads is missing or damaged.
        """


def random_stream(seed: int, *key: int) -> np.random.Generator:
    """The random numbers that belong to `key`, whatever was drawn for other keys or in other processes."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
