"""The interface between a data set and the shard writer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from cmvae.data.index import SplitName
from cmvae.modalities import Modality
from cmvae.utils.errors import UserError


class DamagedSampleError(UserError):
    """A file of one sample is missing or damaged; with `--on-error skip` the sample is left out."""


SPLIT_NUMBERS: dict[SplitName, int] = {"train": 0, "validation": 1, "test": 2}
"""Number of each split in the keys of random streams."""


@dataclass(frozen=True)
class Sample:
    """One sample to be written to a shard."""

    values: Mapping[str, np.ndarray]
    """Stored value of each modality that the sample has; see `cmvae.modalities`."""
    label: int | None
    """Number of its class; None if it has no label."""
    key: str | None = None
    """Its key in the shards, without dots and slashes; None makes one from split and index."""
    group: str | None = None
    """Name of the group that it belongs to, such as the samples of one photograph; None if it has none."""


class Source(Protocol):
    """A data set that can be packed.

    A sample must be a function of (split, index) and the settings of the source, not of earlier calls:
    several processes read different samples.
    """

    @property
    def name(self) -> str:
        """Name of the data set."""

    @property
    def modalities(self) -> Mapping[str, Modality]:
        """The modalities of the samples, by name."""

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the labels 0, 1, …; None if the data has no labels."""

    @property
    def settings(self) -> Mapping[str, str | int | float | bool | None]:
        """Origin of the data and how it was made, for `ShardIndex.source`."""

    @property
    def split_sizes(self) -> Mapping[SplitName, int]:
        """Number of samples of each split."""

    def sample(self, split: SplitName, index: int) -> Sample:
        """Sample number `index` of `split`, from 0 to below `split_sizes[split]`."""


class SourceModule(Protocol):
    """What a module in `cmvae.datasets` offers to `cmvae pack`."""

    @property
    def DESCRIPTION(self) -> str:  # noqa: N802 (a constant of the module)
        """Description of the data set in one line."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the flags of the source to its sub-command."""

    def config_for(self, arguments: argparse.Namespace) -> Path | None:
        """The experiment in configs/ for the data that the flags describe.

        None for users' own data: a starter config is made from the packed data instead, and written to the
        file of the flag `--config`.
        """

    def from_arguments(self, arguments: argparse.Namespace) -> Source:
        """Open the source that the flags describe.

        Raises:
            UserError: files are missing or damaged, or flags do not fit together.
        """


def random_stream(seed: int, *key: int) -> np.random.Generator:
    """Random numbers for `key`, independent of draws for other keys and in other processes."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
