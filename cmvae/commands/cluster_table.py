"""Clusters of any packed data, as a CSV table."""

from __future__ import annotations

import csv
import io
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmvae.clustering import mean_by_group, number_groups
from cmvae.data.batch import to_device
from cmvae.data.groups import NO_GROUP
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.data.remote import Location
from cmvae.models.cmvae import CMVAE, stack_shared_locations
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole
from cmvae.utils.progress import progress_bar


def assign_to_file(
    export: Path,
    shards: Location,
    splits: Sequence[str],
    modalities: Sequence[str],
    batch_size: int,
    out: Path,
    num_clusters: int | None = None,
    by_group: bool = False,
) -> dict[int | None, int]:
    """Assign every sample to a cluster and write the table, whole or not at all, with a progress bar.

    The columns are `key`, `split`, and by all modalities together `cluster` and `confidence`; then
    `MODALITY_cluster` and `MODALITY_confidence` of what each modality says on its own. Cells are empty where
    a sample lacks a modality, `cluster` and `confidence` where it lacks all. Rows are sorted by their keys:
    those of a table of one's own stand as they do there.

    With `by_group` a column `group` follows `split`, and the other cells are those of the sample's group, see
    `assign_by_group`.

    Args:
        export: of the model.
        shards: the packed data; it may have no labels, and modalities that are not in `modalities`.
        splits: splits of it.
        modalities: those of the model's modalities to assign from.
        batch_size: samples that are encoded together.
        out: the CSV file.
        num_clusters: so many clusters from the same model; None takes those that were selected.
        by_group: give the samples of one group, in whatever split, one cluster.

    Returns:
        The number of samples of each cluster that has some; of those that have no modality to assign from
        under None.

    Raises:
        UserError: the export or the shards are missing or damaged, a modality has another shape than the
            model was trained on, or the file cannot be written.
    """
    columns = ["key", "split", *(["group"] if by_group else []), "cluster", "confidence"]
    for name in modalities:
        columns += [f"{name}_cluster", f"{name}_confidence"]
    if by_group:
        model = _load_model(export, shards, modalities, num_clusters)
        rows = assign_by_group(model, _read(model, shards, splits, modalities, batch_size), modalities)
    else:
        rows = list(assign_samples(export, shards, splits, modalities, batch_size, num_clusters))
    write_table(out, columns, rows)
    return dict(Counter(row.get("cluster") for row in rows))


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
    model = _load_model(export, shards, modalities, num_clusters)
    for split, batch in _read(model, shards, splits, modalities, batch_size):
        for row in assign_batch(model, batch, modalities):
            yield {"split": split, **row}


def _load_model(export: Path, shards: Location, modalities: Sequence[str], num_clusters: int | None) -> CMVAE:
    """The model on the accelerator, if there is one, that the shards fit."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = CMVAE.from_pretrained(export, device, num_clusters=num_clusters)
    index = ShardIndex.load(shards)
    index.check_modalities({name: model.modalities[name] for name in modalities}, shards)
    return model


def _read(
    model: CMVAE, shards: Location, splits: Sequence[str], modalities: Sequence[str], batch_size: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each split's name and batches on the model's device; draws a progress bar."""
    device, index = model.private_scale.device, ShardIndex.load(shards)
    total = sum(index.split(split, shards).num_samples for split in splits)
    with progress_bar(total=total, desc=str(shards), unit=" samples", leave=False) as progress:
        for split in splits:
            loader = EvaluationLoader(shards, split=split, modalities=modalities, batch_size=batch_size)
            for batch in loader:
                yield split, to_device(batch, model.modalities, device)
                progress.update(int(batch["valid"].sum()))


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


@torch.no_grad()
def assign_by_group(
    model: CMVAE, batches: Iterable[tuple[str, Mapping[str, Any]]], modalities: Sequence[str]
) -> list[dict[str, Any]]:
    """The cells of every valid sample, by column, where the samples of one group are decided together.

    The locations of a group's members are averaged within each modality, and the group gets the cluster at
    the geometric median of the modalities' means, whatever the model's `assign_by` says. A modality's own
    cluster is that at its mean. A sample without a group is a group of its own. The rows of a group have no
    cells of a modality that no member has.

    Args:
        model: whose active clusters count.
        batches: the split and the batch, on the model's device.
        modalities: those to assign from.
    """
    rows: list[dict[str, Any]] = []
    parts: list[tuple[np.ndarray, ...]] = []
    for split, batch in batches:
        valid = batch["valid"]
        numbers = batch.get("group", torch.full_like(valid, NO_GROUP, dtype=torch.int64))
        names = batch.get("group_name", [None] * len(valid))
        shared_loc = stack_shared_locations(model.encode({name: batch[name] for name in modalities}))
        parts.append(tuple(values[valid].cpu().numpy() for values in (shared_loc, batch["mask"], numbers)))
        rows += [
            {"key": batch["key"][row], "split": split, "group": names[row]}
            for row in valid.nonzero().flatten().tolist()
        ]
    locations, present, numbers = (np.concatenate(values) for values in zip(*parts, strict=True))
    groups = number_groups(numbers)
    locations, present = mean_by_group(locations, present, groups)
    cells: list[dict[str, Any]] = [{} for _ in present]
    together = {"": list(range(len(modalities)))}
    for prefix, places in (together | {f"{name}_": [m] for m, name in enumerate(modalities)}).items():
        there = present[:, places].any(axis=1)
        if there.any():
            found = model.assign_jointly(locations[there][:, places], present[there][:, places])
            for group, cluster, confidence in zip(np.flatnonzero(there), *found, strict=True):
                cells[group] |= _cells(prefix, cluster, confidence)
    return [{**row, **cells[group]} for row, group in zip(rows, groups, strict=True)]


def _cells(prefix: str, cluster: Tensor | np.integer, confidence: Tensor | np.floating) -> dict[str, Any]:
    return {f"{prefix}cluster": int(cluster), f"{prefix}confidence": f"{float(confidence):.6f}"}
