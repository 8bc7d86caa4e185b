"""Compare samplers of a refiner: python tools/benchmarks/compare_samplers.py runs/NAME num_steps={5,10,20}.

Each SAMPLER is a list of settings, separated by commas, that change the run's own sampler, for example
`num_steps=10`, `name=ddpm,num_steps=1000` or `start=0.8,guidance=2`; braces are the shell's. Of real images,
of the CMVAE alone and of each sampler's refinements of the same generations: Fréchet distance, coherence and
time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cmvae.config import RefinerExperiment, SamplerConfig, check_against_shards, load_run_config
from cmvae.data.index import ShardIndex
from cmvae.utils.arguments import positive_integer
from cmvae.utils.errors import UserError
from cmvae.utils.files import holds_earlier_output, whole_folder
from cmvae.utils.process_exit import run_main

if TYPE_CHECKING:  # slow to import
    from matplotlib.figure import Figure
    from samplers import Measurement

RECORD_NAME = "samplers.json"
# Heading of a column to the metric in it.
COLUMNS = {
    "distance: uncond.": "frechet/classifier/unconditional",
    "conditional": "frechet/classifier/conditional",
    "cross-modal": "frechet/classifier/conditional_cross",
    "coherence: cond.": "coherence/conditional",
    "uncond.": "coherence/unconditional",
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Compare samplers of a refiner: Fréchet distance, coherence and time of the same "
        "generations, refined in several ways, beside those of the CMVAE alone and of real images."
    )
    parser.add_argument("run", type=Path, metavar="runs/NAME_refiner", help="folder of a refiner's run")
    parser.add_argument(
        "samplers",
        nargs="+",
        metavar="SAMPLER",
        help="settings that change the run's sampler, separated by commas, e.g. name=ddpm,num_steps=1000; "
        "the same sampler is measured once",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for the table and the figures; an earlier comparison there is replaced (default: samplers in "
        "the run's folder)",
    )
    parser.add_argument(
        "--num",
        type=positive_integer,
        metavar="N",
        help="take only the first N samples of the split and N unconditional generations, for samplers that "
        "take long (default: as launch/evaluate.py does)",
    )
    parser.add_argument(
        "--unconditional",
        action="store_true",
        help="only measure what is generated from nothing, for samplers that take longer still",
    )
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="what to generate from (default: test)",
    )
    return parser.parse_intermixed_args(arguments)


def read_experiment(run: Path, split: str) -> RefinerExperiment:
    """The experiment of a refiner's run, to be evaluated on `split`.

    Raises:
        UserError: the folder is no run, or that of a CMVAE.
    """
    config = load_run_config(run)
    if not isinstance(config, RefinerExperiment):
        raise UserError(
            f"{run}: the run of a CMVAE, which has no sampler. Give that of its refiner, or train one: "
            "launch/train.py configs/digits_refiner.yaml"
        )
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"split": split})})


def read_samplers(run: Path, texts: Sequence[str]) -> list[SamplerConfig]:
    """The run's own sampler with the settings of each text; of equal ones the first.

    Raises:
        UserError: a setting is unknown, or a value does not fit.
    """
    samplers: dict[SamplerConfig, None] = {}
    for text in texts:
        config = load_run_config(run, [f"refiner.sampler.{setting}" for setting in text.split(",")])
        if isinstance(config, RefinerExperiment):
            samplers[config.refiner.sampler] = None
    return list(samplers)


def format_head(titles: Sequence[str]) -> str:
    """The first two lines of a Markdown table whose rows are written one by one.

    Args:
        titles: of all rows to come.
    """
    widths = [max(map(len, titles)), *map(len, [*COLUMNS, *_TIMES])]
    cells = [cell.ljust(width) for cell, width in zip(("sampler", *COLUMNS, *_TIMES), widths, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in (cells, rule))


_TIMES = ("seconds", "images/s")


def format_row(measurement: Measurement, width: int) -> str:
    """A row of the table.

    Args:
        measurement: what it shows.
        width: of its first column, in characters.
    """
    values = [measurement.metrics.get(metric) for metric in COLUMNS.values()]
    cells = [(name, value, 4) for name, value in zip(COLUMNS, values, strict=True)]
    cells += [("seconds", measurement.seconds, 1), ("images/s", measurement.images_per_second, 1)]
    numbers = [
        ("–" if value is None else f"{value:.{digits}f}").rjust(len(name)) for name, value, digits in cells
    ]
    return f"| {' | '.join([measurement.title.ljust(width), *numbers])} |"


def write_comparison(
    folder: Path,
    table: str,
    protocol: Mapping[str, Any],
    measurements: Sequence[Measurement],
    figures: Mapping[str, Figure],
) -> None:
    """Write `samplers.json`, `samplers.md` and the figures, all of it or nothing.

    Args:
        folder: where to.
        table: in Markdown.
        protocol: how it was measured.
        measurements: all of them.
        figures: by file name without ending.

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
            for name, figure in figures.items():
                figure.savefig(partial / f"{name}.png")
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written: {error}") from error


def describe(protocol: Mapping[str, Any]) -> str:
    """What the table is of, in Markdown."""
    return (
        f"# Samplers of {protocol['run']}\n\n"
        f"{protocol['num_samples']:,} samples of the {protocol['split']} split of {protocol['data']} and "
        f"{protocol['num_generated']:,} unconditional generations, seed {protocol['seed']}. Distances are "
        "Fréchet distances to real images in the classifiers' features; `conditional` has the source's own "
        f"modality in it, `cross-modal` and coherence have not. Times are those of {protocol['device']}.\n\n"
    )


def main() -> int:
    """Check everything, measure and print a row after the other, write all of it."""
    arguments = parse_arguments()
    out = arguments.out or arguments.run / "samplers"
    config = read_experiment(arguments.run, arguments.split)
    samplers = read_samplers(arguments.run, arguments.samplers)
    index = ShardIndex.load(config.data.shards)
    check_against_shards(config, index, str(arguments.run / "config.yaml"))
    index.split(config.evaluation.split, config.data.shards)
    holds_earlier_output(out, RECORD_NAME)

    from samplers import (
        FLOOR,
        UNREFINED,
        describe_measurements,
        draw_samplers,
        measure_samplers,
        sampler_titles,
    )

    protocol = describe_measurements(config, index, arguments.run, arguments.num)
    titles = [FLOOR, UNREFINED, *sampler_titles(samplers)]
    head = describe(protocol) + format_head(titles)
    table = ""
    measurements: list[Measurement] = []
    for measurement in measure_samplers(
        config, index, arguments.run, samplers, arguments.num, arguments.unconditional
    ):
        row = format_row(measurement, max(map(len, titles)))
        lines = row if measurements else f"{head}\n{row}"
        # As soon as it is known: the next one may take hours, or be stopped.
        print(lines, flush=True)
        table += f"{lines}\n"
        measurements.append(measurement)
    write_comparison(out, table, protocol, measurements, draw_samplers(measurements))
    print(f"\nwritten to {out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
    return 0


if __name__ == "__main__":
    run_main(main)
