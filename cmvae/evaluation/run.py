"""Evaluate the export of a run: write `evaluation/`, and log it to MLflow."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from cmvae.config import CMVAEExperiment, ExperimentConfig, RefinerExperiment
from cmvae.data.index import ShardIndex
from cmvae.distributed import start_evaluation_accelerator
from cmvae.evaluation.cluster_report import PAGE_NAME, make_page, read_clusters
from cmvae.evaluation.cluster_summary import MIN_MAP_SAMPLES, ClusterSummary
from cmvae.evaluation.clustering import evaluate_clustering
from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.likelihood import evaluate_likelihood
from cmvae.evaluation.prediction import evaluate_prediction
from cmvae.evaluation.probes import evaluate_probes
from cmvae.evaluation.released import evaluate_released_clustering, evaluate_released_probes
from cmvae.evaluation.report import GroupResult, write_report
from cmvae.models.cmvae import CMVAE
from cmvae.models.export import weights_sha256
from cmvae.tracking import resume_tracker
from cmvae.utils.attempts import attempt
from cmvae.utils.files import write_whole
from cmvae.visualize import plots
from cmvae.visualize.cluster_page import render_page
from cmvae.visualize.previews import generate_cross_modal, generate_refinements

_LOGGER = logging.getLogger(__name__)
# Groups that share one pass of generated samples.
GENERATIVE_GROUPS = frozenset({"coherence", "frechet", "fidelity"})
# Samples in the preview.
GRID_SAMPLES = 8


def evaluate_run(config: ExperimentConfig, index: ShardIndex, run_dir: Path) -> GroupResult | None:
    """Evaluate an export by the groups of `config.evaluation.metrics`; all ranks must call it.

    A refiner's run is evaluated by the generative groups only, before and after refinement; the others belong
    to the run of its CMVAE.

    Args:
        config: the experiment of the run.
        index: the index of `config.data.shards`.
        run_dir: folder of the run, with its export; results are written to `run_dir/evaluation`.

    Returns:
        The results on rank 0; None on other ranks.

    Raises:
        UserError: the export or the shards are missing or damaged, or the results cannot be written.
    """
    accelerator = start_evaluation_accelerator()
    try:
        context = load_context(config, index, run_dir, accelerator)
        result = _describe(context, run_dir / "export")
        for group in evaluate_groups(context, config, run_dir):
            result.add(group)
        if accelerator.is_main_process:
            result.add(_show_generations(context))
            html = _describe_clusters(context, config, run_dir, result)
            write_report(run_dir / "evaluation", result)
            _track(config, run_dir, result, None if html is None else _write_page(run_dir, html))
        # A rank that leaves while rank 0 still writes would close its connections.
        accelerator.wait_for_everyone()
        return result if accelerator.is_main_process else None
    finally:
        accelerator.end_training()


def load_context(
    config: ExperimentConfig, index: ShardIndex, run_dir: Path, accelerator: Accelerator
) -> EvaluationContext:
    """Load model, refiner and data of a run; for arguments and errors see `evaluate_run`."""
    if isinstance(config, RefinerExperiment):
        from cmvae.models.dcmvae import DCMVAE

        dcmvae = DCMVAE.from_run(config, run_dir, accelerator.device)
        model = dcmvae.cmvae
    else:
        dcmvae, model = None, CMVAE.from_pretrained(run_dir / "export", accelerator.device)
    index.check_modalities(model.modalities, config.data.shards)
    return EvaluationContext(model, config.data.shards, index, config.evaluation, accelerator, dcmvae)


def evaluate_groups(
    context: EvaluationContext, config: ExperimentConfig, run_dir: Path
) -> Iterator[GroupResult]:
    """Compute the configured groups that apply to the run, one after the other."""
    wanted = set(context.settings.metrics)
    if wanted & GENERATIVE_GROUPS:
        # Imports torchmetrics, which takes four seconds.
        from cmvae.evaluation.generative import evaluate_generative

        yield evaluate_generative(context, wanted & GENERATIVE_GROUPS)
    if isinstance(config, RefinerExperiment):
        reason = f"does not depend on the refiner: evaluate {config.cmvae}"
        yield GroupResult(left_out=dict.fromkeys(sorted(wanted - GENERATIVE_GROUPS), reason))
    if not isinstance(config, CMVAEExperiment):
        return
    released = context.settings.protocol == "released"
    if "clustering" in wanted:
        yield evaluate_clustering(context, run_dir / "export")
        if released:
            yield evaluate_released_clustering(context, run_dir / "export", config.objective.beta)
    if "text" in wanted:
        # Imports torchmetrics.
        from cmvae.evaluation.text import evaluate_text

        yield evaluate_text(context)
    if "prediction" in wanted:
        yield evaluate_prediction(context)
    if "probe" in wanted:
        yield evaluate_released_probes(context) if released else evaluate_probes(context)
    if "likelihood" in wanted:
        yield evaluate_likelihood(context)


def _describe(context: EvaluationContext, export: Path) -> GroupResult:
    """The protocol that all groups share: weights, data and seed."""
    settings = context.settings
    split = context.index.split(settings.split, context.shards)
    protocol: dict[str, str | int | float | bool | None] = {
        "export_sha256": weights_sha256(export),
        "data": context.index.name,
        "split": settings.split,
        "num_samples": split.num_samples,
        "seed": settings.seed,
    }
    return GroupResult(protocol=protocol)


def _show_generations(context: EvaluationContext) -> GroupResult:
    """Preview of the first samples of the split, with every modality generated from every modality."""
    batch = next(iter(context.batches(context.settings.split)))
    shown = batch["valid"].nonzero().flatten()[:GRID_SAMPLES]
    inputs = {name: batch[name][shown] for name in context.model.modality_names}
    mask = batch["mask"][shown]
    generator = torch.Generator(context.device).manual_seed(context.settings.seed)
    result = GroupResult()
    if context.dcmvae is not None:
        result.draw("refinements", generate_refinements(context.dcmvae, inputs, mask, generator).draw)
        return result
    made = generate_cross_modal(context.model, inputs, mask, generator)
    result.draw("cross_modal", made.draw)
    text = attempt("text cross_modal", made.write)
    if text is not None:
        result.texts["cross_modal"] = text
    return result


def _describe_clusters(
    context: EvaluationContext, config: ExperimentConfig, run_dir: Path, result: GroupResult
) -> str | None:
    """The page of the clusters in the evaluated split, whose map becomes a figure of the result.

    Returns:
        None for a refiner, or if it failed.
    """
    if not isinstance(config, CMVAEExperiment):
        return None
    try:
        splits = [context.settings.split]
        source, summary = read_clusters(config, context.index, run_dir, splits, device=context.device)
        if "clustering" in context.settings.metrics:
            _draw_map(summary, result)
        return render_page(make_page(source, summary))
    # The metrics, which may have taken hours, are complete without the page.
    except Exception as error:
        _warn_of_page(run_dir, error)
        return None


def _draw_map(summary: ClusterSummary, result: GroupResult) -> None:
    """Add the points of the page's map as a figure, or the reason why it is left out."""
    if summary.map_points is None:
        result.left_out["figures/latent_map"] = f"takes at least {MIN_MAP_SAMPLES} samples"
        return
    members = summary.map.items()
    clusters, labels = (np.array([getattr(m, name) for m in members]) for name in ("cluster", "label"))
    shown = labels if (labels >= 0).any() else None
    result.draw("latent_map", partial(plots.latent_map, summary.map_points, clusters, shown))


def _write_page(run_dir: Path, html: str) -> Path | None:
    page = run_dir / "evaluation" / PAGE_NAME
    try:
        write_whole(page, html.encode())
    except OSError as error:
        _warn_of_page(run_dir, error)
        return None
    return page


def _warn_of_page(run_dir: Path, error: Exception) -> None:
    _LOGGER.warning(
        "%s: not written (%s: %s). The evaluation is complete without it; cmvae report %s writes it",
        run_dir / "evaluation" / PAGE_NAME,
        type(error).__name__,
        error,
        run_dir,
    )


def _track(config: ExperimentConfig, run_dir: Path, result: GroupResult, page: Path | None) -> None:
    tracker = resume_tracker(config, run_dir, is_main=True)
    tracker.log_metrics({f"evaluation/{name}": value for name, value in result.metrics.items()}, step=0)
    for name, figure in result.figures.items():
        tracker.log_figure(figure, name)
    for name, text in result.texts.items():
        tracker.log_text(text, name)
    for name in ("metrics.json", "protocol.json"):
        tracker.log_artifact(run_dir / "evaluation" / name)
    if page is not None:
        tracker.log_artifact(page)
    tracker.end("FINISHED")
