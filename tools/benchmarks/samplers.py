"""What the sampler of a refiner costs, and what it gives: the same generations refined in several ways."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from plots import distance_by_coherence, distance_by_steps
from torch import Tensor

from cmvae.config import RefinerExperiment, SamplerConfig
from cmvae.data.index import ShardIndex
from cmvae.distributed import start_evaluation_accelerator
from cmvae.evaluation.classifiers import NUM_FEATURES, load_classifiers
from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.feature_networks import FeatureNetworks
from cmvae.evaluation.frechet import refusal
from cmvae.evaluation.generative import Reference, measure_floor, measure_generated, read_reference
from cmvae.evaluation.report import REFINED
from cmvae.evaluation.run import load_context
from cmvae.models.cmvae import CMVAE
from cmvae.models.dcmvae import DCMVAE
from cmvae.models.export import weights_sha256
from cmvae.models.precision import autocast_dtype, network_precision
from cmvae.models.refiner import Refiner
from cmvae.utils.errors import UserError

FLOOR, UNREFINED = "real train images", "CMVAE alone"

KINDS: Mapping[str, tuple[str, str | None]] = {
    "unconditional": ("frechet/classifier/unconditional", "coherence/unconditional"),
    "conditional": ("frechet/classifier/conditional", None),
    "cross-modal": ("frechet/classifier/conditional_cross", "coherence/conditional"),
}
"""Kinds of generations to the metrics that say how sharp they are and how right. Of conditional generations,
self included, there is no coherence: by definition that is of other modalities."""


@dataclass(frozen=True)
class Measurement:
    """What was measured of one way to make images."""

    title: str
    sampler: SamplerConfig | None
    """None where nothing is refined."""
    metrics: Mapping[str, float]
    """As of `measure_generated`, of what was refined if anything was; of the floor distances only."""
    seconds: float
    """Wall time of generating, refining and reading."""
    images_per_second: float | None = None
    """Refined ones, in the time that refining took."""


def measure_samplers(
    config: RefinerExperiment,
    index: ShardIndex,
    run_dir: Path,
    samplers: Sequence[SamplerConfig],
    num_samples: int | None = None,
    unconditional: bool = False,
) -> Iterator[Measurement]:
    """Measure real images, the CMVAE alone and each sampler, one after the other, in this one process.

    Every sampler refines the same generations with the same seeds: all noise belongs to the sample.

    Args:
        config: the run's experiment; of `config.evaluation` the split, the seed and sizes are taken.
        index: the index of `config.data.shards`.
        run_dir: folder of the refiner's run, with its export.
        samplers: what to compare.
        num_samples: only the first so many samples of the split, and at most so many unconditional
            generations; None leaves both as they are.
        unconditional: only measure what is generated from nothing: a third of the images, or less.

    Yields:
        The floor, the CMVAE alone, then a measurement a sampler, each when it is done.

    Raises:
        UserError: an export, the shards or the classifiers are missing or damaged, there are too few samples
            for a distance, or the model generates values that are not finite.
    """
    config = _limit(config, num_samples)
    _check_sizes(config, index, num_samples)
    accelerator = start_evaluation_accelerator()
    try:
        if accelerator.num_processes > 1:
            raise UserError("times are those of one process: start without `accelerate launch`")
        context = load_context(config, index, run_dir, accelerator)
        context = replace(context, dcmvae=None)
        images = context.measured_by("generative")
        classifiers = load_classifiers(context.shards, index, images, context.device)
        networks = FeatureNetworks(images, classifiers, inception=None)
        reference = read_reference(context, networks, {"coherence", "frechet"}, num_samples)
        started = time.perf_counter()
        floor = measure_floor(context, reference, "train")
        yield Measurement(FLOOR, None, floor, time.perf_counter() - started)
        # Several sources are for coherence only, and are not refined.
        max_sources = 0 if unconditional else 1
        yield _measure(context, reference, UNREFINED, max_sources)
        dtype = autocast_dtype(config.train.mixed_precision, context.device)
        for sampler, title in zip(samplers, sampler_titles(samplers), strict=True):
            refiner = Refiner.from_pretrained(run_dir / "export", context.device, dtype, sampler)
            timed = _TimedDCMVAE(context.model, refiner)
            yield _measure(replace(context, dcmvae=timed), reference, title, max_sources)
    finally:
        accelerator.end_training()


def describe_measurements(
    config: RefinerExperiment, index: ShardIndex, run_dir: Path, num_samples: int | None = None
) -> dict[str, Any]:
    """The protocol of `measure_samplers`, in parameters; its arguments."""
    settings = _limit(config, num_samples).evaluation
    total = index.split(settings.split, config.data.shards).num_samples
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return {
        "run": str(run_dir),
        "export_sha256": weights_sha256(run_dir / "export"),
        "cmvae_sha256": weights_sha256(config.cmvae / "export"),
        "data": index.name,
        "split": settings.split,
        "num_samples": min(total, num_samples or total),
        "num_generated": settings.num_generated,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "precision": network_precision(config.train.mixed_precision, device),
        "device": str(device),
        "classifier_accuracy": {name: entry.accuracy for name, entry in index.classifiers.items()},
    }


def sampler_titles(samplers: Sequence[SamplerConfig]) -> list[str]:
    """A name each, with what differs between them: `dpm_solver, 20 steps, guidance 1.5`."""
    return [names.title for names in _name(samplers)]


def draw_samplers(measurements: Sequence[Measurement]) -> dict[str, Figure]:
    """The figures of a whole comparison, by file name without ending.

    Args:
        measurements: all that `measure_samplers` yielded; at least one of them of a sampler.

    Returns:
        `distance_by_steps`, and `distance_by_coherence` where there is coherence.
    """
    floor, unrefined, *refined = measurements
    samplers = [measurement.sampler for measurement in refined if measurement.sampler is not None]
    measured = list(
        zip(_name(samplers), samplers, [measurement.metrics for measurement in refined], strict=True)
    )
    measured.sort(key=lambda row: row[1].num_steps)
    lines = list(dict.fromkeys(names.line for names in _name(samplers)))

    curves, references, points, unrefined_points = {}, {}, {}, {}
    for kind, (distance, coherence) in KINDS.items():
        if distance not in unrefined.metrics:
            continue
        references[kind] = {m.title: m.metrics[distance] for m in (unrefined, floor)}
        curves[kind] = {
            line: [
                (sampler.num_steps, metrics[distance])
                for names, sampler, metrics in measured
                if names.line == line
            ]
            for line in lines
        }
        if coherence is None or coherence not in unrefined.metrics:
            continue
        unrefined_points[kind] = (unrefined.metrics[coherence], unrefined.metrics[distance])
        points[kind] = {
            line: [
                (names.point, metrics[coherence], metrics[distance])
                for names, _, metrics in measured
                if names.line == line
            ]
            for line in lines
        }
    drawn = {"distance_by_steps": distance_by_steps(curves, references)}
    if points:
        floors = {kind: references[kind][FLOOR] for kind in points}
        drawn["distance_by_coherence"] = distance_by_coherence(
            points, unrefined_points, floors, (UNREFINED, FLOOR)
        )
    return drawn


class _TimedDCMVAE(DCMVAE):
    """Knows how many images it refined in which time."""

    def __init__(self, cmvae: CMVAE, refiner: Refiner) -> None:
        super().__init__(cmvae, refiner)
        self._calls: list[tuple[int, float]] = []

    def refine(
        self,
        images: Mapping[str, Tensor],
        shared: Tensor | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """See `DCMVAE.refine`."""
        started = self._now()
        refined = super().refine(images, shared, seeds=seeds)
        known = [image for name, image in images.items() if name in self.refiner.modalities]
        self._calls.append((sum(map(len, known)), self._now() - started))
        return refined

    @property
    def images_per_second(self) -> float:
        """Over all calls but the first, in which a device makes itself ready, if there are others."""
        calls = self._calls[1:] or self._calls
        return sum(images for images, _ in calls) / sum(seconds for _, seconds in calls)

    @staticmethod
    def _now() -> float:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()


def _measure(context: EvaluationContext, reference: Reference, title: str, max_sources: int) -> Measurement:
    started = time.perf_counter()
    metrics = measure_generated(context, reference, max_sources=max_sources).metrics
    seconds = time.perf_counter() - started
    timed = context.dcmvae
    if not isinstance(timed, _TimedDCMVAE):
        return Measurement(title, None, metrics, seconds)
    refined = {
        name.removeprefix(REFINED): value for name, value in metrics.items() if name.startswith(REFINED)
    }
    return Measurement(title, timed.refiner.config.sampler, refined, seconds, timed.images_per_second)


def _limit(config: RefinerExperiment, num_samples: int | None) -> RefinerExperiment:
    """At most so many unconditional generations."""
    if num_samples is None:
        return config
    smaller = min(config.evaluation.num_generated, num_samples)
    settings = config.evaluation.model_copy(update={"num_generated": smaller})
    return config.model_copy(update={"evaluation": settings})


def _check_sizes(config: RefinerExperiment, index: ShardIndex, num_samples: int | None) -> None:
    """Refuse what would leave the distances out, which everything here is about."""
    settings = config.evaluation
    total = index.split(settings.split, config.data.shards).num_samples
    for what, size in (
        (f"split {settings.split}", min(total, num_samples or total)),
        ("unconditional generations (evaluation.num_generated)", settings.num_generated),
    ):
        reason = refusal(size, NUM_FEATURES)
        if reason is not None:
            raise UserError(f"{what}: {reason}. Take more samples")


class _Names(NamedTuple):
    """What a sampler is called among others."""

    title: str
    """In a table: all that differs, and its number of steps."""
    line: str
    """In a figure, the same for all that differ in their number of steps alone."""
    point: str
    """On that line, whose name and colour say the rest: its number of steps, if that differs."""


_WORDS = {"start": "start", "guidance": "guidance", "guidance_from": "from", "candidates": "best of"}


def _name(samplers: Sequence[SamplerConfig]) -> list[_Names]:
    """The names of samplers beside each other, in the same order."""
    differ = {
        key for key in SamplerConfig.model_fields if len({getattr(sampler, key) for sampler in samplers}) > 1
    }
    named = []
    for sampler in samplers:
        steps = f"{sampler.num_steps} step{'s' if sampler.num_steps > 1 else ''}"
        others = [f"{_WORDS[key]} {getattr(sampler, key):g}" for key in _WORDS if key in differ]
        line = ", ".join([sampler.name, *others])
        point = steps if "num_steps" in differ else ", ".join(others) or line
        named.append(_Names(", ".join([sampler.name, steps, *others]), line, point))
    return named
