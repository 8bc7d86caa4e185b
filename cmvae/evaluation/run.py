"""From a run's export to `evaluation/`, metrics, protocol and figures, and to MLflow."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from matplotlib.figure import Figure

from cmvae.config import ExperimentConfig
from cmvae.data.schema import ShardIndex
from cmvae.distributed import start_evaluation_accelerator
from cmvae.evaluation.clustering import evaluate_clustering
from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.likelihood import evaluate_likelihood
from cmvae.evaluation.pictures import draw_cross_modal
from cmvae.evaluation.probes import evaluate_probes
from cmvae.evaluation.report import write_report
from cmvae.evaluation.result import GroupResult
from cmvae.model import CMVAE, WEIGHTS_NAME
from cmvae.tracking import resume_tracker

# One pass of generations feeds all of them.
GENERATIVE_GROUPS = frozenset({"coherence", "frechet", "fidelity"})
# Samples in the picture of generations.
GRID_SAMPLES = 8


def evaluate_run(config: ExperimentConfig, index: ShardIndex, run_dir: Path) -> GroupResult | None:
    """Evaluate an export by the groups of `config.evaluation.metrics`; to be called on every rank.

    Args:
        config: the run's experiment.
        index: the index of `config.data.shards`.
        run_dir: folder of the run, with its export; the result is written below `run_dir/evaluation`.

    Returns:
        What was written, on rank 0; None on other ranks.

    Raises:
        UserError: the export or the shards are missing or damaged, or the result cannot be written.
    """
    accelerator = start_evaluation_accelerator()
    try:
        model = CMVAE.from_pretrained(run_dir / "export", accelerator.device)
        context = EvaluationContext(model, config.data.shards, index, config.evaluation, accelerator)
        index.check_modalities(model.schemas, config.data.shards)
        result = _describe(context, run_dir / "export" / WEIGHTS_NAME)
        for group in _evaluate_groups(context, config.objective.beta):
            result.add(group)
        if not accelerator.is_main_process:
            return None
        result.figures["cross_modal"] = _draw_cross_modal(context)
        write_report(run_dir / "evaluation", result)
        _track(config, run_dir, result)
        return result
    finally:
        accelerator.end_training()


def _evaluate_groups(context: EvaluationContext, beta: float) -> Iterator[GroupResult]:
    """The groups that were asked for, one after the other; β is the objective's, for the selection curve."""
    wanted = set(context.settings.metrics)
    if "clustering" in wanted:
        yield evaluate_clustering(context, beta)
    if wanted & GENERATIVE_GROUPS:
        # torchmetrics takes four seconds to import.
        from cmvae.evaluation.generative import evaluate_generative

        yield evaluate_generative(context, wanted & GENERATIVE_GROUPS)
    if "probe" in wanted:
        yield evaluate_probes(context)
    if "likelihood" in wanted:
        yield evaluate_likelihood(context)


def _describe(context: EvaluationContext, weights: Path) -> GroupResult:
    """What all groups share: which weights on which data, with which seed."""
    settings = context.settings
    split = context.index.split(settings.split, context.shards)
    protocol: dict[str, str | int | float | bool | None] = {
        "export_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
        "data": context.index.name,
        "split": settings.split,
        "num_samples": split.num_samples,
        "seed": settings.seed,
    }
    return GroupResult(protocol=protocol)


def _draw_cross_modal(context: EvaluationContext) -> Figure:
    """The first samples of the split, each modality generated from each."""
    batch = next(iter(context.batches(context.settings.split)))
    shown = batch["valid"].nonzero().flatten()[:GRID_SAMPLES]
    inputs = {name: batch[name][shown] for name in context.model.modality_names}
    generator = torch.Generator(context.device).manual_seed(context.settings.seed)
    return draw_cross_modal(context.model, inputs, generator)


def _track(config: ExperimentConfig, run_dir: Path, result: GroupResult) -> None:
    tracker = resume_tracker(config, run_dir, is_main=True)
    tracker.log_metrics({f"evaluation/{name}": value for name, value in result.metrics.items()}, step=0)
    for name, figure in result.figures.items():
        tracker.log_figure(figure, name)
    for name in ("metrics.json", "protocol.json"):
        tracker.log_artifact(run_dir / "evaluation" / name)
    tracker.end("FINISHED")
