"""Runs of one experiment that differ in their seed: plan and compare them, and choose one without labels."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from cmvae.clustering.arrays import IntArray
from cmvae.clustering.consensus import (
    NO_CLUSTER,
    choose_run,
    describe_disagreement,
    find_consensus,
    mean_agreement,
    pairwise_agreement,
)
from cmvae.config import CMVAEExperiment, flatten, is_resumable, load_run_config
from cmvae.data.index import ShardIndex
from cmvae.training.state import check_newest
from cmvae.utils.errors import UserError
from cmvae.utils.files import remove_folder, write_whole

RESTARTS_NAME = "restarts.json"
CONSENSUS_NAME = "consensus.csv"


@dataclass(frozen=True)
class Restart:
    """One of the runs, from the files in its folder."""

    seed: int
    folder: str
    num_clusters: int
    """Number of clusters of its export."""
    bound: float
    """Bound at its last validation, a mean over samples, in nats."""
    contrast: float | None
    """Alignment term at its last validation, in nats; None without this term."""
    criterion: str
    """The criterion that chose the number of clusters."""
    criteria: dict[str, float | None]
    """Value of every criterion at this number; None if its curve does not include it."""
    mean_ari: float
    """Mean adjusted Rand index between its clusters and those of the other runs."""


@dataclass(frozen=True)
class Answer:
    """Result of all runs; the content of `restarts.json`."""

    runs: list[Restart]
    failed: list[int]
    """Seeds of the runs that are not complete."""
    chosen: str
    """Folder of the chosen run."""
    mean_pairwise_ari: float
    pairwise_ari: list[list[float]]
    """(R, R) adjusted Rand indices, in the order of `runs`."""
    unanimous: float
    """Share of the samples on whose cluster all runs agree."""
    warning: str | None
    """A sentence if the runs disagree too much to trust any of them, else None."""


def restarts_folder(config: CMVAEExperiment) -> Path:
    """The folder of all runs of an experiment: its `output_dir`, else `runs/NAME-restarts`."""
    return config.output_dir if config.output_dir is not None else Path("runs") / f"{config.name}-restarts"


def plan_restarts(config: CMVAEExperiment, num_runs: int) -> list[CMVAEExperiment]:
    """The experiments of the runs, with consecutive seeds from that of `config`.

    Each has a folder of its own, named after its seed, below that of all of them.
    """
    folder = restarts_folder(config)
    return [
        config.model_copy(
            update={
                "seed": seed,
                "name": f"{config.name}-{seed}",
                "output_dir": folder / str(seed),
                "tracking": config.tracking.model_copy(update={"parent": folder}),
            }
        )
        for seed in range(config.seed, config.seed + num_runs)
    ]


def overrides_of(run: CMVAEExperiment) -> list[str]:
    """Overrides that turn the shared config into that of this run."""
    # A JSON string is a YAML string, whatever is in it: a name such as 2024-01-5 is no date then.
    texts = {"name": run.name, "output_dir": str(run.run_dir), "tracking.parent": str(run.tracking.parent)}
    return [f"seed={run.seed}", *(f"{key}={json.dumps(text)}" for key, text in texts.items())]


def is_complete(run: CMVAEExperiment) -> bool:
    """Whether a run is complete."""
    return (run.run_dir / "export").is_dir()


def check_earlier(runs: Sequence[CMVAEExperiment]) -> None:
    """Refuse to continue runs that were trained with other settings.

    Raises:
        UserError: it names the first such setting.
    """
    for run in runs:
        if not is_complete(run):
            check_newest(run, world_size=1)
            continue
        before, now = flatten(load_run_config(run.run_dir)), flatten(run)
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key) and not is_resumable(type(run), key):
                raise UserError(
                    f"{run.run_dir}: trained with {key}={before.get(key)!r}, and now it is "
                    f"{now.get(key)!r}. Set it back, add --overwrite to train all runs again, or give "
                    "output_dir=… to train elsewhere"
                )


def delete_earlier(folder: Path, runs: Sequence[CMVAEExperiment]) -> None:
    """Delete earlier runs and their results; other files stay."""
    for name in (RESTARTS_NAME, CONSENSUS_NAME):
        (folder / name).unlink(missing_ok=True)
    for run in runs:
        if (run.run_dir / "config.yaml").is_file():
            remove_folder(run.run_dir)


def find_answer(runs: Sequence[CMVAEExperiment], index: ShardIndex, folder: Path) -> Answer:
    """Assign all samples by every complete run, compare the runs and write the results.

    `folder` gets `restarts.json`, the answer, and `consensus.csv`, a row for each sample of all splits,
    sorted by key: `key`, `split`, `cluster` by the names of the chosen run, and `confidence`, the share of
    the runs that agree. The last two are empty where a sample has none of the model's modalities.

    Args:
        runs: those that were to be trained.
        index: of the data that they were trained on.
        folder: of all of them.

    Raises:
        UserError: fewer than two runs are complete, one is damaged, or the files cannot be written.
    """
    complete = [run for run in runs if is_complete(run)]
    if len(complete) < 2:
        raise UserError(
            f"{folder}: {len(complete)} of {len(runs)} runs complete, and it takes two to compare. The logs "
            f"{folder}/SEED.log say why the others failed; fix that and run the command again"
        )
    samples, labelings = _assign(complete, index)
    agreement = pairwise_agreement(labelings)
    agreements = mean_agreement(agreement)
    restarts = [_describe(run, float(mean)) for run, mean in zip(complete, agreements, strict=True)]
    chosen = choose_run(agreement, np.array([restart.bound for restart in restarts]))
    consensus = find_consensus(labelings, chosen)
    answer = Answer(
        runs=restarts,
        failed=[run.seed for run in runs if not is_complete(run)],
        chosen=restarts[chosen].folder,
        mean_pairwise_ari=float(agreements.mean()),
        pairwise_ari=agreement.tolist(),
        unanimous=float((consensus.confidence == 1).mean()),
        warning=describe_disagreement(float(agreements.mean())),
    )
    rows = [
        {"key": key, "split": split}
        | ({"cluster": int(cluster), "confidence": f"{share:.6f}"} if cluster != NO_CLUSTER else {})
        for (key, split), cluster, share in zip(
            samples, consensus.clusters, consensus.confidence, strict=True
        )
    ]
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, ["key", "split", "cluster", "confidence"], lineterminator="\n")
    table.writeheader()
    table.writerows(sorted(rows, key=lambda row: (row["key"], row["split"])))
    try:
        write_whole(folder / CONSENSUS_NAME, text.getvalue().encode())
        write_whole(folder / RESTARTS_NAME, (json.dumps(asdict(answer), indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from error
    return answer


def _assign(runs: Sequence[CMVAEExperiment], index: ShardIndex) -> tuple[list[tuple[str, str]], IntArray]:
    """Key and split of N samples, and their clusters by R runs, (R, N)."""
    from cmvae.commands.cluster_table import assign_samples

    samples: list[tuple[str, str]] = []
    labelings = []
    for run in runs:
        rows = assign_samples(
            run.run_dir / "export",
            run.data.shards,
            list(index.splits),
            list(run.model.modalities),
            run.evaluation.batch_size,
        )
        # All runs read the same shards in the same order.
        found = [((row["key"], row["split"]), row.get("cluster", NO_CLUSTER)) for row in rows]
        samples = [sample for sample, _ in found]
        labelings.append([cluster for _, cluster in found])
    return samples, np.array(labelings)


def _describe(run: CMVAEExperiment, mean_ari: float) -> Restart:
    from cmvae.models.export import load_clusters
    from cmvae.training.validation import load_validation

    validation = load_validation(run.run_dir)
    _, record = load_clusters(run.run_dir / "export")
    return Restart(
        seed=run.seed,
        folder=str(run.run_dir),
        num_clusters=record.num_clusters,
        bound=validation["bound"],
        contrast=validation.get("alignment"),
        criterion=record.criterion,
        criteria={
            name: dict(zip(curve.num_clusters, curve.values, strict=True)).get(record.num_clusters)
            for name, curve in record.curves.items()
        },
        mean_ari=mean_ari,
    )


def format_answer(answer: Answer) -> str:
    """Format the runs as a table for a terminal; an arrow marks the chosen one."""
    criterion = answer.runs[0].criterion
    rows = [["", "seed", "clusters", "bound", criterion, "contrast", "agreement (ARI)"]]
    for run in answer.runs:
        rows.append(
            [
                "->" if run.folder == answer.chosen else "",
                str(run.seed),
                str(run.num_clusters),
                f"{run.bound:.2f}",
                _format(run.criteria[criterion]),
                _format(run.contrast),
                f"{run.mean_ari:.3f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows
    )


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
