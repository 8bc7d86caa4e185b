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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from job import now
from torch import Tensor

from cmvae.config import RefinerExperiment, SamplerConfig, check_against_shards, load_run_config
from cmvae.data.index import ShardIndex
from cmvae.distributed import start_evaluation_accelerator
from cmvae.evaluation.classifiers import load_classifiers
from cmvae.evaluation.feature_networks import FeatureNetworks
from cmvae.evaluation.generative import measure_floor, measure_generated, read_reference
from cmvae.evaluation.report import REFINED
from cmvae.evaluation.run import load_context
from cmvae.models.cmvae import CMVAE
from cmvae.models.dcmvae import DCMVAE
from cmvae.models.export import weights_sha256
from cmvae.models.precision import autocast_dtype
from cmvae.models.refiner import Refiner
from cmvae.utils.arguments import positive_integer
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole
from cmvae.utils.process_exit import run_main
from cmvae.utils.tables import markdown_table

FLOOR, UNREFINED = "real train images", "CMVAE alone"

# Conditional samples include reconstructions, which cross-modal ones and coherence by definition do not.
COLUMNS = {
    "distance: uncond.": "frechet/classifier/unconditional",
    "conditional": "frechet/classifier/conditional",
    "cross-modal": "frechet/classifier/conditional_cross",
    "coherence: cond.": "coherence/conditional",
    "uncond.": "coherence/unconditional",
}
"""Column of the table → metric."""
_WORDS = {"start": "start", "guidance": "guidance", "guidance_from": "from", "candidates": "best of"}


@dataclass(frozen=True)
class Measurement:
    """Results of one sampler, of the CMVAE alone, or of real images."""

    title: str
    metrics: Mapping[str, float]
    """See `measure_generated`, without the prefix of refined samples; real images have distances only."""
    seconds: float
    """Wall time of generating, refining and extracting features."""
    images_per_second: float | None = None
    """Refined images per second of refinement."""

    def cells(self) -> list[str]:
        """One row of the table."""
        values = [(self.metrics.get(metric), 4) for metric in COLUMNS.values()]
        values += [(self.seconds, 1), (self.images_per_second, 1)]
        return [self.title, *("–" if x is None else f"{x:.{digits}f}" for x, digits in values)]


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
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write all measurements here")
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


def read_experiment(run: Path, split: str, num_samples: int | None) -> RefinerExperiment:
    """The experiment of a refiner's run, with the split and number of samples of its evaluation changed.

    Raises:
        UserError: the folder is not the run of a refiner.
    """
    config = load_run_config(run)
    if not isinstance(config, RefinerExperiment):
        raise UserError(
            f"{run}: is the run of a CMVAE, which has no sampler. Give the run of its refiner, or train one: "
            "cmvae train digits_refiner"
        )
    settings = config.evaluation
    num_generated = min(settings.num_generated, num_samples or settings.num_generated)
    changed = settings.model_copy(update={"split": split, "num_generated": num_generated})
    return config.model_copy(update={"evaluation": changed})


def read_samplers(run: Path, texts: Sequence[str]) -> list[SamplerConfig]:
    """The run's sampler with the settings of each text, without duplicates.

    Raises:
        UserError: a setting is unknown, or its value is not valid.
    """
    configs = [
        load_run_config(run, [f"refiner.sampler.{setting}" for setting in text.split(",")]) for text in texts
    ]
    return list(dict.fromkeys(c.refiner.sampler for c in configs if isinstance(c, RefinerExperiment)))


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
        num_samples: measure only the first samples of the split.
        unconditional: measure unconditional samples only.

    Yields:
        One measurement at a time: real images, the CMVAE alone, then one per sampler.

    Raises:
        UserError: an export, the shards or the classifiers are missing or damaged, there are too few samples
            for a distance, or the model generates values that are not finite.
    """
    accelerator = start_evaluation_accelerator()
    try:
        if accelerator.num_processes > 1:
            raise UserError("times are measured in one process: start without `accelerate launch`")
        context = replace(load_context(config, index, run_dir, accelerator), dcmvae=None)
        images = context.measured_by("generative")
        classifiers = load_classifiers(context.shards, index, images, context.device)
        networks = FeatureNetworks(images, classifiers, inception=None)
        reference = read_reference(context, networks, {"coherence", "frechet"}, num_samples)
        for metric, reason in reference.left_out.items():
            if metric.startswith("frechet/"):
                raise UserError(f"{metric}: {reason}. Take more samples")
        started = time.perf_counter()
        floor = measure_floor(context, reference, "train")
        yield Measurement(FLOOR, floor, time.perf_counter() - started)
        # Samples from several sources are not refined.
        max_sources = 0 if unconditional else 1
        started = time.perf_counter()
        metrics = measure_generated(context, reference, max_sources=max_sources).metrics
        yield Measurement(UNREFINED, metrics, time.perf_counter() - started)
        dtype = autocast_dtype(config.train.mixed_precision, context.device)
        for sampler, title in zip(samplers, sampler_titles(samplers), strict=True):
            refiner = Refiner.from_pretrained(run_dir / "export", context.device, dtype, sampler)
            timed = TimedDCMVAE(context.model, refiner)
            started = time.perf_counter()
            metrics = measure_generated(
                replace(context, dcmvae=timed), reference, max_sources=max_sources
            ).metrics
            refined = {k.removeprefix(REFINED): x for k, x in metrics.items() if k.startswith(REFINED)}
            yield Measurement(title, refined, time.perf_counter() - started, timed.images_per_second)
    finally:
        accelerator.end_training()


def sampler_titles(samplers: Sequence[SamplerConfig]) -> list[str]:
    """One title per sampler, with the settings that differ: `dpm_solver, 20 steps, guidance 1.5`."""
    differ = [key for key in _WORDS if len({getattr(sampler, key) for sampler in samplers}) > 1]
    return [
        ", ".join(
            [
                sampler.name,
                f"{sampler.num_steps} step{'s' if sampler.num_steps > 1 else ''}",
                *(f"{_WORDS[key]} {getattr(sampler, key):g}" for key in differ),
            ]
        )
        for sampler in samplers
    ]


class TimedDCMVAE(DCMVAE):
    """A `DCMVAE` that measures the time of refinement."""

    def __init__(self, cmvae: CMVAE, refiner: Refiner) -> None:
        super().__init__(cmvae, refiner)
        self._calls: list[tuple[int, float]] = []

    def refine(self, images: Mapping[str, Tensor], *latents: Any, **settings: Any) -> dict[str, Tensor]:
        """See `DCMVAE.refine`."""
        started = now()
        refined = super().refine(images, *latents, **settings)
        known = [image for name, image in images.items() if name in self.refiner.modalities]
        self._calls.append((sum(map(len, known)), now() - started))
        return refined

    @property
    def images_per_second(self) -> float:
        """Rate over all calls but the first, which warms up, if there are others."""
        calls = self._calls[1:] or self._calls
        return sum(images for images, _ in calls) / sum(seconds for _, seconds in calls)


def main() -> int:
    """Check the arguments, measure, print and write."""
    arguments = parse_arguments()
    config = read_experiment(arguments.run, arguments.split, arguments.num)
    samplers = read_samplers(arguments.run, arguments.samplers)
    index = ShardIndex.load(config.data.shards)
    check_against_shards(config, index, str(arguments.run / "config.yaml"))
    index.split(config.evaluation.split, config.data.shards)
    if arguments.out is not None and not arguments.out.parent.is_dir():
        raise UserError(f"--out {arguments.out}: there is no folder {arguments.out.parent}. Create it")
    measurements = []
    for measurement in measure_samplers(
        config, index, arguments.run, samplers, arguments.num, arguments.unconditional
    ):
        measurements.append(measurement)
        # At once, because the next one may take hours or be interrupted.
        title, *cells = measurement.cells()
        values = ", ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, cells, strict=False))
        print(f"{title}: {values}", flush=True)
    rows = [measurement.cells() for measurement in measurements]
    print(f"\n{markdown_table(['sampler', *COLUMNS, 'seconds', 'images/s'], rows)}")
    if arguments.out is not None:
        record = {
            "export_sha256": weights_sha256(arguments.run / "export"),
            "evaluation": config.evaluation.model_dump(mode="json"),
            "num_samples": arguments.num,
            "measurements": [asdict(measurement) for measurement in measurements],
        }
        write_whole(arguments.out, f"{json.dumps(record, indent=2, allow_nan=False)}\n".encode())
    return 0


if __name__ == "__main__":
    run_main(main)
