"""Compare samplers of a refiner: python tools/benchmarks/samplers.py runs/NAME_refiner num_steps={5,10,20}.

A sampler is a comma-separated list of settings that change the run's own sampler, for example `num_steps=10`,
`name=ddpm,num_steps=1000` or `start=0.8,guidance=2`; the shell expands the braces. Every sampler refines the
same generated samples with the same seeds. Reported are Fréchet distance, coherence and time of each, of the
CMVAE alone and of real images.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from job import now
from plots import distance_by_coherence, distance_by_steps
from torch import Tensor

from cmvae.config import RefinerExperiment, SamplerConfig, check_against_shards, load_run_config
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
from cmvae.utils.arguments import positive_integer
from cmvae.utils.errors import UserError
from cmvae.utils.files import holds_earlier_output, whole_folder
from cmvae.utils.process_exit import run_main
from cmvae.utils.tables import markdown_table
from cmvae.visualize.style import Figure

FLOOR, UNREFINED = "real train images", "CMVAE alone"
RECORD_NAME = "samplers.json"

KINDS: Mapping[str, tuple[str, str | None]] = {
    "unconditional": ("frechet/classifier/unconditional", "coherence/unconditional"),
    "conditional": ("frechet/classifier/conditional", None),
    "cross-modal": ("frechet/classifier/conditional_cross", "coherence/conditional"),
}
"""Kind of generated samples → metrics of distance and coherence. Conditional samples include reconstructions,
which coherence by definition does not."""

COLUMNS = {
    "distance: uncond.": "frechet/classifier/unconditional",
    "conditional": "frechet/classifier/conditional",
    "cross-modal": "frechet/classifier/conditional_cross",
    "coherence: cond.": "coherence/conditional",
    "uncond.": "coherence/unconditional",
}
"""Column of the table → metric."""


@dataclass(frozen=True)
class Measurement:
    """Results of one sampler, of the CMVAE alone, or of real images."""

    title: str
    sampler: SamplerConfig | None
    """None where nothing is refined."""
    metrics: Mapping[str, float]
    """See `measure_generated`, without the prefix of refined samples; real images have distances only."""
    seconds: float
    """Wall time of generating, refining and extracting features."""
    images_per_second: float | None = None
    """Refined images per second of refinement."""


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Compare samplers of a refiner: Fréchet distance, coherence and time of the same "
        "generated samples, refined in several ways, beside those of the CMVAE alone and of real images."
    )
    parser.add_argument("run", type=Path, metavar="runs/NAME_refiner", help="folder of a refiner's run")
    parser.add_argument(
        "samplers",
        nargs="+",
        metavar="SAMPLER",
        help="settings that change the run's sampler, separated by commas, e.g. name=ddpm,num_steps=1000; "
        "equal samplers are measured once",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="output folder; an earlier comparison in it is replaced (default: samplers in the run's folder)",
    )
    parser.add_argument(
        "--num",
        type=positive_integer,
        metavar="N",
        help="measure only the first N samples of the split and N unconditional samples (default: as many as "
        "an evaluation)",
    )
    parser.add_argument(
        "--unconditional", action="store_true", help="measure unconditional samples only, which is faster"
    )
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="split to generate from (default: %(default)s)",
    )
    return parser.parse_intermixed_args(arguments)


def read_experiment(run: Path, split: str) -> RefinerExperiment:
    """The experiment of a refiner's run, with `split` as the split of its evaluation.

    Raises:
        UserError: the folder is not the run of a refiner.
    """
    config = load_run_config(run)
    if not isinstance(config, RefinerExperiment):
        raise UserError(
            f"{run}: is the run of a CMVAE, which has no sampler. Give the run of its refiner, or train one: "
            "cmvae train digits_refiner"
        )
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"split": split})})


def read_samplers(run: Path, texts: Sequence[str]) -> list[SamplerConfig]:
    """The run's sampler with the settings of each text, without duplicates.

    Raises:
        UserError: a setting is unknown, or its value is not valid.
    """
    samplers: dict[SamplerConfig, None] = {}
    for text in texts:
        config = load_run_config(run, [f"refiner.sampler.{setting}" for setting in text.split(",")])
        if isinstance(config, RefinerExperiment):
            samplers[config.refiner.sampler] = None
    return list(samplers)


def measure_samplers(
    config: RefinerExperiment,
    index: ShardIndex,
    run_dir: Path,
    samplers: Sequence[SamplerConfig],
    num_samples: int | None = None,
    unconditional: bool = False,
) -> Iterator[Measurement]:
    """Measure real images, the CMVAE alone and each sampler, one after the other, in this process.

    Args:
        config: the run's experiment; `config.evaluation` gives split, seed and sizes.
        index: the index of `config.data.shards`.
        run_dir: folder of the refiner's run, with its export.
        samplers: the samplers to compare.
        num_samples: measure only the first samples of the split, and at most so many unconditional samples.
        unconditional: measure unconditional samples only.

    Yields:
        One measurement at a time: real images, the CMVAE alone, then one per sampler.

    Raises:
        UserError: an export, the shards or the classifiers are missing or damaged, there are too few samples
            for a distance, or the model generates values that are not finite.
    """
    config = _limit(config, num_samples)
    _check_sizes(config, index, num_samples)
    accelerator = start_evaluation_accelerator()
    try:
        if accelerator.num_processes > 1:
            raise UserError("times are measured in one process: start without `accelerate launch`")
        context = replace(load_context(config, index, run_dir, accelerator), dcmvae=None)
        images = context.measured_by("generative")
        classifiers = load_classifiers(context.shards, index, images, context.device)
        networks = FeatureNetworks(images, classifiers, inception=None)
        reference = read_reference(context, networks, {"coherence", "frechet"}, num_samples)
        started = time.perf_counter()
        floor = measure_floor(context, reference, "train")
        yield Measurement(FLOOR, None, floor, time.perf_counter() - started)
        # Samples from several sources are not refined.
        max_sources = 0 if unconditional else 1
        yield _measure(context, reference, UNREFINED, max_sources)
        dtype = autocast_dtype(config.train.mixed_precision, context.device)
        for sampler, title in zip(samplers, sampler_titles(samplers), strict=True):
            refiner = Refiner.from_pretrained(run_dir / "export", context.device, dtype, sampler)
            timed = TimedDCMVAE(context.model, refiner)
            yield _measure(replace(context, dcmvae=timed), reference, title, max_sources)
    finally:
        accelerator.end_training()


def describe_measurements(
    config: RefinerExperiment, index: ShardIndex, run_dir: Path, num_samples: int | None = None
) -> dict[str, Any]:
    """The protocol of `measure_samplers` with the same arguments, for JSON."""
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
    """One title per sampler, with the settings that differ: `dpm_solver, 20 steps, guidance 1.5`."""
    return [names.title for names in _name(samplers)]


def draw_samplers(measurements: Sequence[Measurement]) -> dict[str, Figure]:
    """Draw a comparison.

    Args:
        measurements: all that `measure_samplers` yielded, with at least one sampler.

    Returns:
        File name without suffix → figure: `distance_by_steps` and, where there is coherence,
        `distance_by_coherence`.
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


class TimedDCMVAE(DCMVAE):
    """A `DCMVAE` that measures the time of refinement."""

    def __init__(self, cmvae: CMVAE, refiner: Refiner) -> None:
        super().__init__(cmvae, refiner)
        self._calls: list[tuple[int, float]] = []

    def refine(
        self,
        images: Mapping[str, Tensor],
        shared: Tensor | None = None,
        private: Mapping[str, Tensor] | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """See `DCMVAE.refine`."""
        started = now()
        refined = super().refine(images, shared, private, seeds=seeds)
        known = [image for name, image in images.items() if name in self.refiner.modalities]
        self._calls.append((sum(map(len, known)), now() - started))
        return refined

    @property
    def images_per_second(self) -> float:
        """Rate over all calls but the first, which warms up, if there are others."""
        calls = self._calls[1:] or self._calls
        return sum(images for images, _ in calls) / sum(seconds for _, seconds in calls)


def _measure(context: EvaluationContext, reference: Reference, title: str, max_sources: int) -> Measurement:
    started = time.perf_counter()
    metrics = measure_generated(context, reference, max_sources=max_sources).metrics
    seconds = time.perf_counter() - started
    timed = context.dcmvae
    if not isinstance(timed, TimedDCMVAE):
        return Measurement(title, None, metrics, seconds)
    refined = {
        name.removeprefix(REFINED): value for name, value in metrics.items() if name.startswith(REFINED)
    }
    return Measurement(title, timed.refiner.config.sampler, refined, seconds, timed.images_per_second)


def _limit(config: RefinerExperiment, num_samples: int | None) -> RefinerExperiment:
    """The experiment with at most `num_samples` unconditional samples in its evaluation."""
    if num_samples is None:
        return config
    smaller = min(config.evaluation.num_generated, num_samples)
    settings = config.evaluation.model_copy(update={"num_generated": smaller})
    return config.model_copy(update={"evaluation": settings})


def _check_sizes(config: RefinerExperiment, index: ShardIndex, num_samples: int | None) -> None:
    """Raise if there are too few samples for a distance."""
    settings = config.evaluation
    total = index.split(settings.split, config.data.shards).num_samples
    for what, size in (
        (f"split {settings.split}", min(total, num_samples or total)),
        ("unconditional samples (evaluation.num_generated)", settings.num_generated),
    ):
        reason = refusal(size, NUM_FEATURES)
        if reason is not None:
            raise UserError(f"{what}: {reason}. Take more samples")


class _Names(NamedTuple):
    """Names of a sampler among others."""

    title: str
    """All settings that differ, and the number of steps."""
    line: str
    """Name of a line in a figure; samplers that differ in their number of steps only share one."""
    point: str
    """Label of the point on that line."""


_WORDS = {"start": "start", "guidance": "guidance", "guidance_from": "from", "candidates": "best of"}


def _name(samplers: Sequence[SamplerConfig]) -> list[_Names]:
    """The names of samplers, in the same order."""
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


def format_comparison(protocol: Mapping[str, Any], measurements: Sequence[Measurement]) -> str:
    """The comparison in Markdown."""
    rows = [[measurement.title, *_format_values(measurement)] for measurement in measurements]
    return (
        f"# Samplers of {protocol['run']}\n\n"
        f"{protocol['num_samples']:,} samples of the {protocol['split']} split of {protocol['data']} and "
        f"{protocol['num_generated']:,} unconditional samples, seed {protocol['seed']}. Distances are "
        "Fréchet distances to real images in the classifiers' features; `conditional` has reconstructions, "
        f"`cross-modal` and coherence do not. Times are those of {protocol['device']}.\n\n"
        f"{markdown_table(['sampler', *COLUMNS, 'seconds', 'images/s'], rows)}\n"
    )


def _format_values(measurement: Measurement) -> list[str]:
    values = [(measurement.metrics.get(metric), 4) for metric in COLUMNS.values()]
    values += [(measurement.seconds, 1), (measurement.images_per_second, 1)]
    return ["–" if value is None else f"{value:.{digits}f}" for value, digits in values]


def write_comparison(
    folder: Path, table: str, protocol: Mapping[str, Any], measurements: Sequence[Measurement]
) -> None:
    """Write `samplers.json`, `samplers.md` and the figures, all of them or none.

    Args:
        folder: output folder.
        table: the comparison in Markdown.
        protocol: see `describe_measurements`.
        measurements: all measurements.

    Raises:
        UserError: the folder cannot be written.
    """
    record = {
        "protocol": protocol,
        "measurements": [
            {
                "title": measurement.title,
                "sampler": measurement.sampler.model_dump() if measurement.sampler is not None else None,
                "metrics": measurement.metrics,
                "seconds": measurement.seconds,
                "images_per_second": measurement.images_per_second,
            }
            for measurement in measurements
        ],
    }
    try:
        with whole_folder(folder) as partial:
            text = json.dumps(record, indent=2, allow_nan=False) + "\n"
            (partial / RECORD_NAME).write_text(text, encoding="utf-8")
            (partial / "samplers.md").write_text(table, encoding="utf-8")
            for name, figure in draw_samplers(measurements).items():
                figure.savefig(partial / f"{name}.png")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written: {error}") from error


def main() -> int:
    """Check the arguments, measure, print and write."""
    arguments = parse_arguments()
    out = arguments.out or arguments.run / "samplers"
    config = read_experiment(arguments.run, arguments.split)
    samplers = read_samplers(arguments.run, arguments.samplers)
    index = ShardIndex.load(config.data.shards)
    check_against_shards(config, index, str(arguments.run / "config.yaml"))
    index.split(config.evaluation.split, config.data.shards)
    holds_earlier_output(out, RECORD_NAME)

    protocol = describe_measurements(config, index, arguments.run, arguments.num)
    measurements = []
    for measurement in measure_samplers(
        config, index, arguments.run, samplers, arguments.num, arguments.unconditional
    ):
        measurements.append(measurement)
        # At once, because the next one may take hours or be interrupted.
        values = zip(COLUMNS, _format_values(measurement), strict=False)
        print(f"{measurement.title}: {', '.join(f'{name} {value}' for name, value in values)}", flush=True)
    table = format_comparison(protocol, measurements)
    print(f"\n{table}")
    write_comparison(out, table, protocol, measurements)
    print(f"written to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 0


if __name__ == "__main__":
    run_main(main)
