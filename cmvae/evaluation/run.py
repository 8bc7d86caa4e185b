"""From a run's export to `evaluation/metrics.json`, figures and MLflow."""

from __future__ import annotations

from pathlib import Path

import torch

from cmvae.clustering import confusion
from cmvae.config import ExperimentConfig
from cmvae.data.batch import to_device
from cmvae.data.reader import EvaluationLoader
from cmvae.data.schema import ShardIndex
from cmvae.evaluation import figures
from cmvae.evaluation.clustering import (
    all_log_weights,
    encode_split,
    evaluate_clusters,
    select_model_clusters,
)
from cmvae.evaluation.pictures import draw_cluster_samples, draw_cross_modal, draw_latent_map
from cmvae.evaluation.report import write_report
from cmvae.model import CMVAE
from cmvae.tracking import resume_tracker

# Pictures are for looking at: so many samples in a grid, and of each cluster.
GRID_SAMPLES, CLUSTER_SAMPLES = 8, 6


def evaluate_run(config: ExperimentConfig, index: ShardIndex, run_dir: Path) -> dict[str, float]:
    """Clusters of the test split, and pictures; written below `run_dir/evaluation` and logged.

    Args:
        config: the run's experiment.
        index: the index of `config.data.shards`.
        run_dir: folder of the run, with its export.

    Returns:
        The metrics, by the names in `metrics.json`.

    Raises:
        UserError: the export or the shards are missing or damaged.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = CMVAE.from_pretrained(run_dir / "export", device)

    def loader(split: str) -> EvaluationLoader:
        return EvaluationLoader(
            config.data.shards,
            split=split,
            modalities=model.modality_names,
            batch_size=config.evaluation.batch_size,
        )

    validation, test = encode_split(model, loader("validation")), encode_split(model, loader("test"))
    active = model.cluster_prior.active.cpu().numpy()
    metrics, assignments = evaluate_clusters(test, all_log_weights(model), active)

    generator = torch.Generator(device).manual_seed(config.seed)
    first = to_device(next(iter(loader("test"))), device)
    inputs = {name: first[name][:GRID_SAMPLES] for name in model.modality_names}
    selection = select_model_clusters(model, validation, config.objective.beta)
    drawn = {
        "selection_curve": figures.selection_curve(selection),
        "cross_modal": draw_cross_modal(model, inputs, generator),
        "cluster_samples": draw_cluster_samples(model, CLUSTER_SAMPLES, generator),
        "latent_map": draw_latent_map(test, assignments, config.evaluation.map_samples, config.seed),
    }
    labelled = test.label >= 0
    if index.class_names is not None and labelled.any():
        counts, cluster_ids = confusion(
            assignments[labelled], test.label[labelled], len(index.class_names)
        )
        drawn["confusion_matrix"] = figures.confusion_matrix(counts, index.class_names, cluster_ids)

    write_report(run_dir / "evaluation", metrics, drawn)
    tracker = resume_tracker(config, run_dir, is_main=True)
    tracker.log_metrics({f"evaluation/{name}": value for name, value in metrics.items()}, step=0)
    for name, figure in drawn.items():
        tracker.log_figure(figure, name)
    tracker.log_artifact(run_dir / "evaluation" / "metrics.json")
    tracker.end("FINISHED")
    return metrics
