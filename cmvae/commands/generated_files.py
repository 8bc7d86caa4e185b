"""What a model generates, as files, and one picture of the first samples.

Of an image modality a folder of PNG files, of any other a table: text, or numbers in the data's own units.
"""

from __future__ import annotations

import csv
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cmvae.config import ExperimentConfig, RefinerExperiment
from cmvae.data.batch import to_device
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.data.remote import Location
from cmvae.modalities import Modality
from cmvae.models.cmvae import CMVAE
from cmvae.utils.attempts import attempt
from cmvae.utils.errors import UserError
from cmvae.utils.files import holds_earlier_output, whole_folder
from cmvae.utils.progress import progress_bar
from cmvae.visualize.grids import sample_rows

RECORD_NAME = "generation.json"
GRID_NAME = "grid.png"
# The picture is for looking at: so many rows of so many samples at most.
_GRID_ROWS, _GRID_COLUMNS = 8, 8
# A key may hold what a file system does not allow or a shell takes for something else.
_UNSAFE = re.compile(r"[^A-Za-z0-9_-]+")
_MAX_KEY_LENGTH = 80


Generate = Callable[..., dict[str, Tensor]]
"""`CMVAE.generate` or `DCMVAE.generate`."""


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate."""

    num_samples: int
    """How many; of each cluster if `cluster` is set, at most as many as the split has if `given` is."""
    cluster: int | Literal["all"] | None
    """One cluster, or all that the selection kept, one by one; None is the prior of all."""
    given: tuple[str, ...] | None
    """Modalities to generate from; not together with `cluster`."""
    split: str
    """Split of the samples that are given."""
    targets: tuple[str, ...]
    """Modalities to write."""
    seed: int


@dataclass(frozen=True)
class Generated:
    """A batch of B joint generations."""

    names: Sequence[str]
    """B file names without ending, unlike all others."""
    values: Mapping[str, Tensor]
    """Modality → data (B, *shape), as `CMVAE.decode` gives it."""
    given: Mapping[str, Tensor] = field(default_factory=dict)
    """Modality → data (B, *shape): what they were generated from."""
    present: Mapping[str, Tensor] = field(default_factory=dict)
    """Modality → (B,) bool, of those given: false where a sample lacks it."""
    group: str = ""
    """What the samples have in common, where there are several groups."""


def run_generation(
    config: ExperimentConfig, run_dir: Path, request: GenerationRequest, out: Path, overwrite: bool
) -> int:
    """Generate with a run's export and write it below `out`, with a progress bar; with a refiner's, refined.

    Args:
        config: the run's experiment; its shards are read for `request.given` only.
        run_dir: folder of the run.
        request: what to generate.
        out: where to.
        overwrite: replace earlier generations there.

    Returns:
        The number of samples.

    Raises:
        UserError: the export or the shards are missing, damaged or do not fit, or `out` cannot be written.
    """
    check_output_folder(out, overwrite)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model, generate = _load(config, run_dir, device)
    generator = torch.Generator(device).manual_seed(request.seed)
    batch_size = min(config.evaluation.batch_size, request.num_samples)
    if request.given is not None:
        made = generate_given(model, generate, config.data.shards, request, batch_size, generator)
    elif request.cluster is not None:
        clusters = active_clusters(model, None if request.cluster == "all" else request.cluster)
        made = generate_clusters(generate, clusters, request.num_samples, batch_size, generator)
    else:
        made = generate_unconditional(generate, request.num_samples, batch_size, generator)
    record = {"run": str(run_dir), **asdict(request)}
    progress = progress_bar(made, desc=str(run_dir), unit=" batches", leave=False)
    return write_generated(out, progress, request.targets, model.modalities, record)


def _load(config: ExperimentConfig, run_dir: Path, device: torch.device) -> tuple[CMVAE, Generate]:
    """The CMVAE of a run, and what generates: its method, or that of the two with the refiner."""
    if isinstance(config, RefinerExperiment):
        # diffusers takes seconds to import.
        from cmvae.models.dcmvae import DCMVAE

        both = DCMVAE.from_run(config, run_dir, device)
        return both.cmvae, both.generate
    model = CMVAE.from_pretrained(run_dir / "export", device)
    return model, model.generate


def generate_unconditional(
    generate: Generate, num_samples: int, batch_size: int, generator: torch.Generator
) -> Iterator[Generated]:
    """Joint generations from the prior, called by their index."""
    for indices in _batches(num_samples, batch_size):
        values = generate(len(indices), generator=generator)
        yield Generated([f"{index:06d}" for index in indices], values)


def generate_clusters(
    generate: Generate, clusters: Sequence[int], num_samples: int, batch_size: int, generator: torch.Generator
) -> Iterator[Generated]:
    """`num_samples` joint generations of each cluster, called by the cluster and their index in it."""
    for cluster in clusters:
        for indices in _batches(num_samples, batch_size):
            values = generate(len(indices), cluster=cluster, generator=generator)
            names = [f"cluster-{cluster:03d}_{index:06d}" for index in indices]
            yield Generated(names, values, group=f"cluster {cluster}")


def generate_given(
    model: CMVAE,
    generate: Generate,
    shards: Location,
    request: GenerationRequest,
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[Generated]:
    """One generation of each of the first samples of a split, called by its place in the split and its key.

    What a sample lacks is no source of it; one that has none of what is to be given is left out.

    Raises:
        UserError: the shards are damaged, lack the split or a modality, or have another shape of it; or no
            sample has any of what is to be given.
    """
    given = request.given or ()
    index = ShardIndex.load(shards)
    index.check_modalities({name: model.modalities[name] for name in given}, shards)
    num_samples = min(request.num_samples, index.split(request.split, shards).num_samples)
    loader = EvaluationLoader(shards, split=request.split, modalities=given, batch_size=batch_size)
    nothing = True
    for raw, places in zip(loader, _batches(num_samples, batch_size), strict=False):
        batch = to_device(raw, model.modalities, model.private_scale.device)
        # Without its tail, the last batch has neither padding nor more than was asked for.
        rows = batch["mask"][: len(places)].any(1).nonzero().flatten().tolist()
        if not rows:
            continue
        nothing = False
        inputs, mask = {name: batch[name][rows] for name in given}, batch["mask"][rows]
        names = [f"{places[row]:06d}_{safe_name(batch['key'][row])}" for row in rows]
        values = generate(given=inputs, mask=None if mask.all() else mask, generator=generator)
        yield Generated(names, values, inputs, dict(zip(given, mask.T, strict=True)))
    if nothing:
        raise UserError(
            f"--given {','.join(given)}: the first {num_samples} samples of the {request.split} split of "
            f"{shards} all lack it. Give another modality, or more samples with --num"
        )


def safe_name(key: str) -> str:
    """A key as part of a file name; not one to one, so a file name needs something more."""
    return _UNSAFE.sub("-", key)[:_MAX_KEY_LENGTH]


def active_clusters(model: CMVAE, wanted: int | None) -> list[int]:
    """All active clusters, or the given one.

    Raises:
        UserError: the model has no such cluster, or the selection dropped it.
    """
    active = model.cluster_prior.active.nonzero().flatten().tolist()
    if wanted is None:
        return active
    if wanted not in active:
        raise UserError(
            f"--cluster {wanted}: not one of the clusters that the selection kept: "
            f"{', '.join(map(str, active))}. Take one of those, or all"
        )
    return [wanted]


def check_output_folder(folder: Path, overwrite: bool) -> None:
    """Refuse to bury what is in `folder`: generations unless `overwrite` is set, anything else always.

    Raises:
        UserError: there is something.
    """
    if holds_earlier_output(folder, RECORD_NAME) and not overwrite:
        raise UserError(
            f"--out {folder}: holds earlier generations. Add --overwrite to replace them, or give another "
            "folder"
        )


def write_generated(
    folder: Path,
    generated: Iterable[Generated],
    targets: Sequence[str],
    modalities: Mapping[str, Modality],
    record: Mapping[str, Any],
) -> int:
    """Write `MODALITY/NAME.png` (or another ending) or `MODALITY.csv`, and `grid.png` and `generation.json`.

    All of it or nothing.

    Args:
        folder: where to; what `check_output_folder` let be replaced is.
        generated: what to write, batch by batch; at least one.
        targets: names of the modalities to write.
        modalities: all modalities, by name.
        record: how it was generated, for `generation.json`.

    Returns:
        The number of samples.

    Raises:
        UserError: it cannot be written.
    """
    num_samples = 0
    rows: dict[str, list[_Shown]] = {}
    try:
        with whole_folder(folder) as partial:
            for name in targets:
                _start_modality(partial, name, modalities[name])
            for batch in generated:
                made = {name: modalities[name].to_stored(batch.values[name]) for name in targets}
                for name, values in made.items():
                    _write_values(partial, name, modalities[name], batch.names, values)
                shown = rows.setdefault(batch.group, [])
                shown += _first_samples(batch, made, modalities, _GRID_ROWS * _GRID_COLUMNS - len(shown))
                num_samples += len(batch.names)
            attempt(GRID_NAME, functools.partial(_draw_grid, partial / GRID_NAME, rows, modalities))
            text = json.dumps({**record, "num_samples": num_samples}, indent=2, ensure_ascii=False)
            (partial / RECORD_NAME).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from error
    return num_samples


def _start_modality(folder: Path, name: str, modality: Modality) -> None:
    """An empty folder, or a table with its headings."""
    columns = modality.table_columns
    if not columns:
        (folder / name).mkdir()
        return
    with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerow(("name", *columns))


def _write_values(
    folder: Path, name: str, modality: Modality, value_names: Sequence[str], values: np.ndarray
) -> None:
    """Add stored values (B, *shape) of one modality, called `value_names`."""
    if not modality.table_columns:
        for value_name, value in zip(value_names, values, strict=True):
            (folder / name / f"{value_name}.{modality.suffix}").write_bytes(modality.encode(value))
        return
    with (folder / f"{name}.csv").open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(
            (value_name, *modality.table_cells(value))
            for value_name, value in zip(value_names, values, strict=True)
        )


def _batches(num_samples: int, batch_size: int) -> Iterator[range]:
    for start in range(0, num_samples, batch_size):
        yield range(start, min(start + batch_size, num_samples))


_Shown = Mapping[str, tuple[str, np.ndarray | None]]
"""One sample of the picture: by title of a block its modality and the stored value, None if it is missing."""


def _first_samples(
    batch: Generated, made: Mapping[str, np.ndarray], modalities: Mapping[str, Modality], limit: int
) -> list[_Shown]:
    """The first samples of a batch: what was given beside what was made, as stored by modality."""
    if limit <= 0:
        return []
    blocks = {f"given {name}": (name, modalities[name].to_stored(x)) for name, x in batch.given.items()}
    for name, values in made.items():
        blocks[f"→ {name}" if batch.given else name] = (name, values)
    lacking = {f"given {name}": (~there).tolist() for name, there in batch.present.items()}
    return [
        {
            title: (name, None if title in lacking and lacking[title][place] else values[place])
            for title, (name, values) in blocks.items()
        }
        for place in range(min(len(batch.names), limit))
    ]


def _draw_grid(path: Path, groups: Mapping[str, list[_Shown]], modalities: Mapping[str, Modality]) -> None:
    """A row a group where there are several; else the samples of the one group, row by row."""
    if len(groups) > 1:
        rows = {title: samples[:_GRID_COLUMNS] for title, samples in groups.items()}
    else:
        ((group, samples),) = groups.items()
        starts = range(0, len(samples), _GRID_COLUMNS)
        rows = {f"{group} {start}…".strip(): samples[start : start + _GRID_COLUMNS] for start in starts}
    num_columns = max(map(len, rows.values()))
    blocks, present, of_blocks = {}, {}, {}
    for block, (name, _) in next(iter(rows.values()))[0].items():
        modality = of_blocks[block] = modalities[name]
        blocks[block] = np.zeros((len(rows), num_columns, *modality.shape), dtype=modality.dtype)
        # The last row may not be full, and of what was given something may be missing.
        present[block] = np.zeros((len(rows), num_columns), dtype=bool)
        for row, samples in enumerate(rows.values()):
            for column, sample in enumerate(samples):
                _, value = sample[block]
                if value is not None:
                    blocks[block][row, column], present[block][row, column] = value, True
    sample_rows(blocks, list(rows), modalities=of_blocks, present=present).savefig(path)
