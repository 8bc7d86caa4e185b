"""The loader of the train split that an experiment asks for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cmvae.config import ExperimentConfig
from cmvae.data.plan import TrainingPlan
from cmvae.data.reader import TrainingLoader
from cmvae.data.resident import ResidentLoader
from cmvae.data.split_reader import SplitReader


def open_train_split(
    config: ExperimentConfig,
    modalities: Sequence[str],
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
) -> TrainingLoader | ResidentLoader:
    """Open the train split of `config.data`, as `data.on_device` says.

    Args:
        config: the experiment.
        modalities: names of the modalities to read.
        device: device of the training.
        rank: number of this rank.
        world_size: number of ranks.

    Raises:
        UserError: as `TrainingLoader` and `ResidentLoader`.
    """
    data, batch_size = config.data, config.train.batch_size_per_rank(world_size)
    if data.on_device:
        shards = SplitReader(data.shards, "train", modalities, data.on_error)
        plan = TrainingPlan(shards.sizes, batch_size * world_size, config.seed, data.shuffle_window)
        return ResidentLoader(shards, plan, rank, world_size, device)
    return TrainingLoader(
        data.shards,
        modalities=modalities,
        batch_size=batch_size,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        num_workers=data.num_workers,
        shuffle_window=data.shuffle_window,
        cache_bytes=data.cache_megabytes * 2**20,
        on_error=data.on_error,
    )
