"""Clusters of any packed data, as a CSV table."""

from __future__ import annotations

import csv
import io
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cmvae.data.batch import to_device
from cmvae.data.reader import EvaluationLoader
from cmvae.data.schema import ShardIndex
from cmvae.data.store import Location
from cmvae.errors import UserError
from cmvae.files import write_whole
from cmvae.model import CMVAE
from cmvae.progress import progress_bar


def assign_to_file(
    export: Path,
    shards: Location,
    splits: Sequence[str],
    modalities: Sequence[str],
    batch_size: int,
    out: Path,
    num_clusters: int | None = None,
) -> dict[int | None, int]:
    """Assign every sample to a cluster and write the table, whole or not at all, with a progress bar.

    The columns are `key`, `split`, and by all modalities together `cluster` and `confidence`; then
    `MODALITY_cluster` and `MODALITY_confidence` of what each modality says on its own. Cells are empty where
    a sample lacks a modality, `cluster` and `confidence` where it lacks all. Rows are sorted by their keys:
    those of a table of one's own stand as they do there.

    Args:
        export: of the model.
        shards: the packed data; it may have no labels, and modalities that are not in `modalities`.
        splits: splits of it.
        modalities: those of the model's modalities to assign from.
        batch_size: samples that are encoded together.
        out: the CSV file.
        num_clusters: so many clusters from the same model; None takes those that were selected.

    Returns:
        The number of samples of each cluster that has some; of those that have no modality to assign from
        under None.

    Raises:
        UserError: the export or the shards are missing or damaged, a modality has another shape than the
            model was trained on, or the file cannot be written.
    """
    columns = ["key", "split", "cluster", "confidence"]
    for name in modalities:
        columns += [f"{name}_cluster", f"{name}_confidence"]
    sizes: Counter[int | None] = Counter()
    rows: list[dict[str, Any]] = []
    for row in assign_samples(export, shards, splits, modalities, batch_size, num_clusters):
        rows.append(row)
        sizes[row.get("cluster")] += 1
    write_table(out, columns, rows)
    return dict(sizes)


def write_table(out: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows with a `key` and a `split` as CSV, sorted by both, whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(sorted(rows, key=lambda row: (row["key"], row["split"])))
    try:
        write_whole(out, text.getvalue().encode())
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from error


def assign_samples(
    export: Path,
    shards: Location,
    splits: Sequence[str],
    modalities: Sequence[str],
    batch_size: int,
    num_clusters: int | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the cells of every sample by column and its `split`, shard by shard; draws a progress bar.

    What a sample lacks, it has no cells of.

    Args:
        export: of the model.
        shards: the packed data, as for `assign_to_file`.
        splits: splits of it.
        modalities: those of the model's modalities to assign from.
        batch_size: samples that are encoded together.
        num_clusters: so many clusters from the same model; None takes those that were selected.

    Raises:
        UserError: the export or the shards are missing or damaged, or a modality has another shape than the
            model was trained on.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = CMVAE.from_pretrained(export, device, num_clusters=num_clusters)
    index = ShardIndex.load(shards)
    index.check_modalities({name: model.schemas[name] for name in modalities}, shards)
    total = sum(index.split(split, shards).num_samples for split in splits)
    with progress_bar(total=total, desc=str(shards), unit=" samples", leave=False) as progress:
        for split in splits:
            loader = EvaluationLoader(shards, split=split, modalities=modalities, batch_size=batch_size)
            for batch in loader:
                for row in assign_batch(model, to_device(batch, model.schemas, device), modalities):
                    yield {"split": split, **row}
                    progress.update()


def assign_batch(
    model: CMVAE, batch: Mapping[str, Any], modalities: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The cells of every valid sample of a batch on the model's device, by column, without `split`.

    What a sample lacks, it has no cells of.
    """
    mask = batch["mask"]
    # Whoever has nothing cannot vote; what is said of such a sample is not written.
    voters = mask | ~mask.any(1, keepdim=True)
    assignment = model.assign({name: batch[name] for name in modalities}, voters)
    confidences, clusters = assignment.responsibilities.max(dim=2)
    for row in batch["valid"].nonzero().flatten().tolist():
        there = mask[row].tolist()
        cells = {"key": batch["key"][row]}
        if any(there):
            cells |= _cells("", assignment.cluster[row], assignment.confidence[row])
        for m, name in itertools.compress(enumerate(modalities), there):
            cells |= _cells(f"{name}_", clusters[row, m], confidences[row, m])
        yield cells


def _cells(prefix: str, cluster: Tensor, confidence: Tensor) -> dict[str, Any]:
    return {f"{prefix}cluster": int(cluster), f"{prefix}confidence": f"{float(confidence):.6f}"}
