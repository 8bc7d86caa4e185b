"""Runs of an untrained refiner and its untrained CMVAE on disk, for commands that start from exports."""

from __future__ import annotations

from pathlib import Path

import torch

from cmvae.config import (
    CMVAEExperiment,
    EvaluationConfig,
    ModalityConfig,
    ModelConfig,
    RefinerConfig,
    RefinerExperiment,
    save_config,
)
from cmvae.data.index import ShardIndex
from cmvae.models.cmvae import CMVAE
from cmvae.models.export import weights_sha256
from cmvae.models.refiner import Refiner


def write_refiner_run(folder: Path, shards: Path, **evaluation: object) -> RefinerExperiment:
    """Write the runs `folder/cmvae` and `folder/refiner`, with 20 timesteps and a sampler of two steps.

    Args:
        folder: parent folder of the runs.
        shards: packed data with small images.
        evaluation: overrides of the evaluation settings.
    """
    index = ShardIndex.load(shards)
    modalities = {name: ModalityConfig(width=2) for name in index.modalities}
    shared = {
        "data": {"shards": shards},
        "train": {"max_steps": 1},
        "tracking": {"enabled": False},
        "evaluation": EvaluationConfig(**{"num_generated": 50, "batch_size": 64} | evaluation),
    }
    cmvae = CMVAEExperiment(
        name="cmvae",
        output_dir=folder / "cmvae",
        model=ModelConfig(shared_dim=3, private_dim=2, num_clusters=4, modalities=modalities),
        **shared,
    )
    refiner = RefinerConfig.model_validate(
        {
            "network": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "dropout": 0.0},
            "diffusion": {"num_timesteps": 20},
            "conditioning": {"dropout": 0.1},
            "sampler": {"num_steps": 2},
        }
    )
    config = RefinerExperiment(
        name="refiner", output_dir=folder / "refiner", cmvae=cmvae.run_dir, refiner=refiner, **shared
    )
    torch.manual_seed(0)
    CMVAE(cmvae.model, index.modalities).save_pretrained(cmvae.run_dir / "export")
    sha256 = weights_sha256(cmvae.run_dir / "export")
    Refiner(refiner, index.modalities, 3, 2, sha256).save_pretrained(config.run_dir / "export")
    for experiment in (cmvae, config):
        save_config(experiment, experiment.run_dir / "config.yaml")
    return config
