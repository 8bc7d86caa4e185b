"""Clusters of packed data or of a table, as a CSV table, in constant memory and on any number of ranks."""

from __future__ import annotations

import base64
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmvae.commands.data_parts import DataPart, DataParts, ShardParts
from cmvae.commands.parts import PartFolder, Row, compute_parts, merge_unknown
from cmvae.data.batch import to_device
from cmvae.data.index import ShardIndex
from cmvae.data.remote import Location
from cmvae.datasets.values import Unknown
from cmvae.distributed import start_evaluation_accelerator
from cmvae.models.cmvae import CMVAE, stack_shared_locations
from cmvae.models.export import weights_sha256

_ROWS_TOGETHER = 1000
"""Rows whose groups are assigned together."""


class Clustered(NamedTuple):
    """What was written."""

    sizes: dict[str, int]
    """Number of samples of each cluster that has some; under "" of those without any modality."""
    unknown: dict[str, Unknown]
    """By modality the words and categories of a table that the model does not know."""


def assign_to_file(
    export: Path,
    data: DataParts,
    modalities: Sequence[str],
    out: Path,
    num_clusters: int | None = None,
    by_group: bool = False,
) -> Clustered | None:
    """Assign every sample to a cluster and write the table, whole or not at all; call it on all ranks.

    The columns are `key`, for packed data `split`, and by all modalities together `cluster` and `confidence`;
    then `MODALITY_cluster` and `MODALITY_confidence` of what each modality says on its own. Cells are empty
    where a sample lacks a modality, `cluster` and `confidence` where it lacks all. Rows of packed data are
    sorted by their keys, rows of a table are in its order. An interrupted call continues with the parts that
    are not computed yet. Memory does not depend on the number of samples, with `by_group` on that of groups.

    With `by_group` there is a column `group`, and the other cells are those of the sample's group: the
    locations of its members are averaged within each modality, and the group gets the cluster at the
    geometric median of the modalities' means, whatever the model's `assign_by` says. A modality's own cluster
    is that at its mean. A sample without a group is a group of its own.

    Args:
        export: of the model.
        data: the samples; it may have no labels, and lack modalities of the model.
        modalities: those of the model's modalities to assign from.
        out: the CSV file.
        num_clusters: so many clusters from the same model; None takes those that were selected.
        by_group: give the samples of one group, in whatever split, one cluster.

    Returns:
        Counts on rank 0; None on other ranks.

    Raises:
        UserError: the export or the data is missing or damaged, or the file cannot be written.
    """
    accelerator = start_evaluation_accelerator()
    try:
        model = CMVAE.from_pretrained(export, accelerator.device, num_clusters=num_clusters)
        prefixes = ["", *(f"{name}_" for name in modalities)]
        cells = [f"{prefix}{cell}" for prefix in prefixes for cell in ("cluster", "confidence")]
        named = ["key", *([] if data.is_table else ["split"]), *(["group"] if by_group else [])]

        def compute(part: DataPart) -> tuple[Mapping[str, Any], Iterable[Row]]:
            batches, unknown, _ = part.load()
            on_device = (to_device(batch, model.modalities, accelerator.device) for batch in batches)
            rows = itertools.chain.from_iterable(
                locate_batch(model, batch, modalities) if by_group else assign_batch(model, batch, modalities)
                for batch in on_device
            )
            columns = [*named, *(_LOCATED if by_group else cells)]
            table = [_as_row({**row, "split": part.split}, columns) for row in rows]
            return {"unknown": unknown}, table if data.is_table else sorted(table, key=_key_and_split)

        request = {
            "command": "cluster",
            "export": weights_sha256(export),
            "num_clusters": num_clusters,
            "modalities": list(modalities),
            "by_group": by_group,
        }
        folder = PartFolder(out)
        compute_parts(accelerator, data, folder, request, compute)
        if not accelerator.is_main_process:
            return None
        unknown = merge_unknown(folder.records())
        rows = folder.rows() if data.is_table else folder.sorted_rows(_key_and_split)
        if by_group:
            means = _group_means(folder.rows(), named)
            rows = _assign_groups(model, rows, means, named, cells, modalities)
        sizes: Counter[str] = Counter()

        def counted() -> Iterator[Row]:
            yield [*named, *cells]
            for row in rows:
                sizes[row[len(named)]] += 1
                yield row

        folder.finish(counted())
        return Clustered(dict(sizes), unknown)
    finally:
        accelerator.end_training()


def assign_samples(
    export: Path, shards: Location, splits: Sequence[str], modalities: Sequence[str], batch_size: int
) -> Iterator[dict[str, Any]]:
    """Yield the cells of every sample by column and its `split`, shard by shard.

    What a sample lacks, it has no cells of.

    Args:
        export: of the model.
        shards: the packed data, as for `assign_to_file`.
        splits: splits of it.
        modalities: those of the model's modalities to assign from.
        batch_size: samples that are encoded together.

    Raises:
        UserError: the export or the shards are missing or damaged, or a modality has another shape than the
            model was trained on.
    """
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = CMVAE.from_pretrained(export, device)
    ShardIndex.load(shards).check_modalities({name: model.modalities[name] for name in modalities}, shards)
    for part in ShardParts(shards, splits, modalities, batch_size):
        for batch in part.load().batches:
            for row in assign_batch(model, to_device(batch, model.modalities, device), modalities):
                yield {"split": part.split, **row}


def assign_batch(
    model: CMVAE, batch: Mapping[str, Any], modalities: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """The cells of every sample of a batch on the model's device, by column, without `split`.

    What a sample lacks, it has no cells of.
    """
    mask = batch["mask"]
    # Whoever has nothing cannot vote; what is said of such a sample is not written.
    voters = mask | ~mask.any(1, keepdim=True)
    assignment = model.assign({name: batch[name] for name in modalities}, voters)
    confidences, clusters = assignment.responsibilities.max(dim=2)
    for row, there in enumerate(mask.tolist()):
        cells = {"key": batch["key"][row]}
        if any(there):
            cells |= _cells("", assignment.cluster[row], assignment.confidence[row])
        for m, name in itertools.compress(enumerate(modalities), there):
            cells |= _cells(f"{name}_", clusters[row, m], confidences[row, m])
        yield cells


_LOCATED = ("present", "locations")
"""Columns of the parts of a clustering by group: M digits 0 and 1, and (M, D_z) float32 in base64."""


@torch.no_grad()
def locate_batch(
    model: CMVAE, batch: Mapping[str, Any], modalities: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Key, group and location in z of every sample of a batch on the model's device."""
    located = stack_shared_locations(model.encode({name: batch[name] for name in modalities})).cpu().numpy()
    groups = batch.get("group_name", [None] * len(located))
    for key, group, there, location in zip(
        batch["key"], groups, batch["mask"].tolist(), located, strict=True
    ):
        yield {
            "key": key,
            "group": group,
            "present": "".join("01"[has] for has in there),
            "locations": base64.b64encode(location.astype(np.float32).tobytes()).decode(),
        }


class _Mean:
    """Mean of the members of a group, per modality over those that have it."""

    def __init__(self) -> None:
        self._sum: Any = 0.0
        self._count: Any = 0

    def add(self, location: np.ndarray, present: np.ndarray) -> None:
        self._sum = self._sum + np.where(present[:, None], location, 0).astype(np.float64)
        self._count = self._count + present.astype(np.int64)

    def get(self) -> tuple[np.ndarray, np.ndarray]:
        mean = self._sum / np.maximum(self._count, 1)[:, None]
        return mean.astype(np.float32), self._count > 0


def _read_location(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Location (M, D_z) of a row of a part, and the modalities (M,) that it has."""
    present = np.array([digit == "1" for digit in row[-2]])
    location = np.frombuffer(base64.b64decode(row[-1]), dtype=np.float32)
    return location.reshape(len(present), -1), present


def _group_means(rows: Iterable[Row], named: Sequence[str]) -> dict[str, _Mean]:
    """The mean of every group by its name."""
    means: dict[str, _Mean] = {}
    for row in rows:
        group = row[named.index("group")]
        if group:
            means.setdefault(group, _Mean()).add(*_read_location(row))
    return means


def _assign_groups(
    model: CMVAE,
    rows: Iterable[Row],
    means: Mapping[str, _Mean],
    named: Sequence[str],
    columns: Sequence[str],
    modalities: Sequence[str],
) -> Iterator[Row]:
    """The rows with the cells of their groups; those of a modality that no member has are empty."""
    rows = iter(rows)
    place = named.index("group")
    while some := list(itertools.islice(rows, _ROWS_TOGETHER)):
        located = [means[row[place]].get() if row[place] else _read_location(row) for row in some]
        locations, present = (np.stack(values) for values in zip(*located, strict=True))
        cells: list[dict[str, Any]] = [{} for _ in some]
        together = {"": list(range(len(modalities)))}
        for prefix, places in (together | {f"{name}_": [m] for m, name in enumerate(modalities)}).items():
            there = present[:, places].any(axis=1)
            if there.any():
                found = model.assign_jointly(locations[there][:, places], present[there][:, places])
                for number, cluster, confidence in zip(np.flatnonzero(there), *found, strict=True):
                    cells[number] |= _cells(prefix, cluster, confidence)
        for row, found_cells in zip(some, cells, strict=True):
            yield [*row[: len(named)], *_as_row(found_cells, columns)]


def _as_row(cells: Mapping[str, Any], columns: Sequence[str]) -> Row:
    return ["" if cells.get(column) is None else str(cells[column]) for column in columns]


def _key_and_split(row: Row) -> tuple[str, str]:
    return row[0], row[1]


def _cells(prefix: str, cluster: Tensor | np.integer, confidence: Tensor | np.floating) -> dict[str, Any]:
    return {f"{prefix}cluster": int(cluster), f"{prefix}confidence": f"{float(confidence):.6f}"}
