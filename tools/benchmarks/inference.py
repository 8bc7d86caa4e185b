"""Jobs on a trained run: selection of clusters, refinement of images, groups of metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from job import Job

from cmvae.config import CMVAEExperiment, RefinerExperiment, load_run_config
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.distributed import start_evaluation_accelerator
from cmvae.evaluation.report import GroupResult
from cmvae.evaluation.run import evaluate_groups, load_context
from cmvae.models.cmvae import CMVAE
from cmvae.models.dcmvae import DCMVAE
from cmvae.models.encoding import all_log_weights, encode_split, select_model_clusters
from cmvae.utils.errors import UserError


def selection_job(run: str, again: bool) -> Job:
    """Select the clusters of a run on its validation split.

    Args:
        run: folder of a CMVAE's run.
        again: encode the split once per number of clusters, as the released code does, instead of once.

    Raises:
        UserError: the folder is not the run of a CMVAE.
    """
    config = load_run_config(Path(run))
    if not isinstance(config, CMVAEExperiment):
        raise UserError(f"{run}: is the run of a refiner, which has no clusters. Give the run of its CMVAE")
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = CMVAE.from_pretrained(Path(run) / "export", device)
    # In memory, so that reading is not timed.
    batches = list(
        EvaluationLoader(
            config.data.shards,
            split="validation",
            modalities=model.modality_names,
            batch_size=config.evaluation.batch_size,
        )
    )
    passes = len(all_log_weights(model)) - 1 if again else 1

    def run_once() -> None:
        for _ in range(passes):
            encoded = encode_split(model, batches)
        select_model_clusters(model, encoded, config.objective.beta)

    return Job(run_once, sum(int(batch["valid"].sum()) for batch in batches), {"encoding_passes": passes})


def refining_job(run: str, overrides: list[str], num_images: int) -> Job:
    """Refine unconditional samples, which are generated before the first run.

    Args:
        run: folder of a refiner's run.
        overrides: sampler settings to change, such as `num_steps=20`.
        num_images: images per run over all modalities, rounded up to equally many of each.

    Raises:
        UserError: the folder is not the run of a refiner.
    """
    config = load_run_config(Path(run), [f"refiner.sampler.{setting}" for setting in overrides])
    if not isinstance(config, RefinerExperiment):
        raise UserError(f"{run}: is the run of a CMVAE, which refines nothing. Give the run of its refiner")
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    both = DCMVAE.from_run(config, Path(run), device)
    images = list(both.refiner.modalities)
    each = -(-num_images // len(images))
    latents = both.cmvae.sample_latents(each, generator=torch.Generator(device).manual_seed(config.seed))
    blurred = both.cmvae.decode(latents.shared, {name: latents.private[name] for name in images})
    size = config.evaluation.batch_size

    def run_once() -> None:
        for first in range(0, each, size):
            rows = slice(first, first + size)
            seeds = range(each)[rows]
            part = {name: x[rows] for name, x in blurred.items()}
            private = {name: w[rows] for name, w in latents.private.items()}
            both.refine(part, latents.shared[rows], private, seeds=seeds)

    return Job(run_once, each * len(images))


def evaluation_job(run: str, group: str) -> Job:
    """Compute one group of metrics of a run, without writing anything.

    Args:
        run: folder of a run.
        group: one of `evaluation.metrics`. After a run, the fact `metrics` is the number of metrics, and
            `left_out` names those that are not available for this model.
    """
    config = load_run_config(Path(run), [f"evaluation.metrics=[{group}]"])
    index = ShardIndex.load(config.data.shards)
    context = load_context(config, index, Path(run), start_evaluation_accelerator())

    def run_once() -> None:
        total = GroupResult()
        for result in evaluate_groups(context, config, Path(run)):
            total.add(result)
        facts.update(metrics=len(total.metrics), left_out=total.left_out)

    facts: dict[str, Any] = {}
    num_samples = index.split(config.evaluation.split, config.data.shards).num_samples
    return Job(run_once, num_samples, facts)
