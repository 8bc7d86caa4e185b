"""The two tasks: CMVAE and refiner."""

from __future__ import annotations

import torch

from cmvae.config import CMVAEExperiment, ExperimentConfig, RefinerExperiment
from cmvae.data.index import ShardIndex
from cmvae.models.cmvae import CMVAE
from cmvae.training.cmvae_task import CMVAETask
from cmvae.training.task import Task


def build_task(
    config: ExperimentConfig,
    index: ShardIndex,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
) -> Task:
    """The task of an experiment, with fresh weights.

    Args:
        config: the experiment.
        index: the index of its shards.
        device: where what is not trained is put; the task itself stays on the CPU.
        autocast_dtype: precision of the networks.

    Raises:
        UserError: networks and data do not fit, or the CMVAE to refine is missing or damaged.
    """
    if isinstance(config, RefinerExperiment):
        # diffusers takes seconds to import.
        from cmvae.training.refiner_task import build_refiner_task

        return build_refiner_task(config, index, device, autocast_dtype)
    if isinstance(config, CMVAEExperiment):
        return CMVAETask(
            CMVAE(config.model, index.modalities, autocast_dtype), config.objective, config.clusters
        )
    raise TypeError(f"{type(config).__name__} trains nothing")


__all__ = ["CMVAETask", "Task", "build_task"]
