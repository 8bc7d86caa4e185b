"""What a model generates, as PNG files: a folder a modality, and one picture of the first samples."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmvae.config import ExperimentConfig, RefinerExperiment
from cmvae.data.batch import to_device
from cmvae.data.reader import EvaluationLoader
from cmvae.data.schema import ShardIndex
from cmvae.errors import UserError
from cmvae.evaluation.figures import sample_rows
from cmvae.files import holds_earlier, whole_folder
from cmvae.model import CMVAE
from cmvae.progress import progress_bar

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
    images: Mapping[str, Tensor]
    """Modality → (B, C, H, W), locations of the decoders."""
    given: Mapping[str, Tensor] = field(default_factory=dict)
    """Modality → (B, C, H, W) in [0, 1]: what they were generated from."""
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
    return write_generated(out, progress, request.targets, record)


def _load(config: ExperimentConfig, run_dir: Path, device: torch.device) -> tuple[CMVAE, Generate]:
    """The CMVAE of a run, and what generates: its method, or that of the two with the refiner."""
    if isinstance(config, RefinerExperiment):
        # diffusers takes seconds to import.
        from cmvae.dcmvae import DCMVAE

        both = DCMVAE.from_run(config, run_dir, device)
        return both.cmvae, both.generate
    model = CMVAE.from_pretrained(run_dir / "export", device)
    return model, model.generate


def generate_unconditional(
    generate: Generate, num_samples: int, batch_size: int, generator: torch.Generator
) -> Iterator[Generated]:
    """Joint generations from the prior, called by their index."""
    for indices in _batches(num_samples, batch_size):
        images = generate(len(indices), generator=generator)
        yield Generated([f"{index:06d}" for index in indices], images)


def generate_clusters(
    generate: Generate, clusters: Sequence[int], num_samples: int, batch_size: int, generator: torch.Generator
) -> Iterator[Generated]:
    """`num_samples` joint generations of each cluster, called by the cluster and their index in it."""
    for cluster in clusters:
        for indices in _batches(num_samples, batch_size):
            images = generate(len(indices), cluster=cluster, generator=generator)
            names = [f"cluster-{cluster:03d}_{index:06d}" for index in indices]
            yield Generated(names, images, group=f"cluster {cluster}")


def generate_given(
    model: CMVAE,
    generate: Generate,
    shards: Path,
    request: GenerationRequest,
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[Generated]:
    """One generation of each of the first samples of a split, called by its place in the split and its key.

    Raises:
        UserError: the shards are damaged, lack the split or a modality, or have another shape of it.
    """
    given = request.given or ()
    index = ShardIndex.load(shards)
    index.check_modalities({name: model.schemas[name] for name in given}, shards)
    num_samples = min(request.num_samples, index.split(request.split, shards).num_samples)
    loader = EvaluationLoader(shards, split=request.split, modalities=given, batch_size=batch_size)
    for raw, places in zip(loader, _batches(num_samples, batch_size), strict=False):
        batch = to_device(raw, model.schemas, model.private_scale.device)
        inputs = {name: batch[name][: len(places)] for name in given}
        # Without its tail, the last batch has neither padding nor more than was asked for.
        names = [f"{place:06d}_{safe_name(key)}" for place, key in zip(places, batch["key"], strict=False)]
        yield Generated(names, generate(given=inputs, generator=generator), given=inputs)


def safe_name(key: str) -> str:
    """A key as part of a file name; not one to one, so a file name needs something more."""
    return _UNSAFE.sub("-", key)[:_MAX_KEY_LENGTH]


def active_clusters(model: CMVAE, wanted: int | None) -> list[int]:
    """All clusters that the selection kept, or the one that is wanted.

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
    if holds_earlier(folder, RECORD_NAME, "generations") and not overwrite:
        raise UserError(
            f"--out {folder}: holds earlier generations. Add --overwrite to replace them, or give another "
            "folder"
        )


def write_generated(
    folder: Path, generated: Iterable[Generated], modalities: Sequence[str], record: Mapping[str, Any]
) -> int:
    """Write `MODALITY/NAME.png`, `grid.png` and `generation.json`, all of it or nothing.

    Args:
        folder: where to; what `check_output_folder` let be replaced is.
        generated: what to write, batch by batch.
        modalities: the modalities to write.
        record: how it was generated, for `generation.json`.

    Returns:
        The number of samples.

    Raises:
        UserError: it cannot be written.
    """
    num_samples = 0
    rows: dict[str, list[dict[str, np.ndarray]]] = {}
    try:
        with whole_folder(folder) as partial:
            for name in modalities:
                (partial / name).mkdir()
            for batch in generated:
                images = {name: _to_numpy(batch.images[name]) for name in modalities}
                for name, pictures in images.items():
                    for file_name, picture in zip(batch.names, pictures, strict=True):
                        _write_png(partial / name / f"{file_name}.png", picture)
                blocks = {f"given {name}": _to_numpy(x) for name, x in batch.given.items()}
                blocks |= {f"→ {name}" if batch.given else name: x for name, x in images.items()}
                shown = rows.setdefault(batch.group, [])
                for place in range(min(len(batch.names), _GRID_ROWS * _GRID_COLUMNS - len(shown))):
                    shown.append({name: x[place] for name, x in blocks.items()})
                num_samples += len(batch.names)
            _draw_grid(partial / GRID_NAME, rows)
            text = json.dumps({**record, "num_samples": num_samples}, indent=2, ensure_ascii=False)
            (partial / RECORD_NAME).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written: {error}") from error
    return num_samples


def _batches(num_samples: int, batch_size: int) -> Iterator[range]:
    for start in range(0, num_samples, batch_size):
        yield range(start, min(start + batch_size, num_samples))


def _to_numpy(images: Tensor) -> np.ndarray:
    return images.detach().clamp(0, 1).cpu().numpy()


def _write_png(path: Path, picture: np.ndarray) -> None:
    """A picture (C, H, W) in [0, 1]."""
    pixels = (picture * 255).round().astype(np.uint8)
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(path)


def _draw_grid(path: Path, groups: Mapping[str, list[dict[str, np.ndarray]]]) -> None:
    """A row a group where there are several; else the samples of the one group, row by row."""
    if len(groups) > 1:
        rows = {title: samples[:_GRID_COLUMNS] for title, samples in groups.items()}
    else:
        ((group, samples),) = groups.items()
        starts = range(0, len(samples), _GRID_COLUMNS)
        rows = {f"{group} {start}…".strip(): samples[start : start + _GRID_COLUMNS] for start in starts}
    num_columns = max(map(len, rows.values()))
    blocks = {}
    for name, image in next(iter(rows.values()))[0].items():
        # White, where the last row is not full.
        blocks[name] = np.ones((len(rows), num_columns, *image.shape), dtype=np.float32)
        for row, samples in enumerate(rows.values()):
            for column, sample in enumerate(samples):
                blocks[name][row, column] = sample[name]
    sample_rows(blocks, list(rows)).savefig(path)
