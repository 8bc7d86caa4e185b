"""Measure how fast the parts are: python tools/benchmarks {train,read,select,sample,evaluate} ….

Everything is timed several times, in turns (A B A B) where variants are compared, and reported as median and
range. See `python tools/benchmarks train --help` and so on, and docs/performance.md for results.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cmvae.config import MetricGroup, load_config
from cmvae.utils.arguments import non_negative_integer, positive_integer
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole
from cmvae.utils.process_exit import run_main
from cmvae.utils.tables import markdown_table

if TYPE_CHECKING:  # slow to import
    from turns import Measured, Variant


# What a GPU may gain from, each on top of the one before.
_GPU_SUITE = (
    "data.on_device=true",
    "data.on_device=true train.compile=true",
    "data.on_device=true train.compile=reduce-overhead",
)
_SUITE_UPDATES = 100


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Measure how fast the parts are.")
    commands = parser.add_subparsers(dest="command", required=True)

    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--repeats", type=positive_integer, default=5, metavar="N", help="timed runs (default: %(default)s)"
    )
    common.add_argument(
        "--warm-up",
        type=non_negative_integer,
        default=1,
        metavar="N",
        help="runs before the timed ones (default: %(default)s)",
    )
    common.add_argument("--out", type=Path, metavar="FILE.json", help="also write all measurements here")

    train = commands.add_parser(
        "train", parents=[common], help="updates of a CMVAE", description="Time updates of a CMVAE."
    )
    train.add_argument("config", metavar="configs/NAME.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    train.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="SETTINGS",
        help="also time the config with these settings, key=value separated by spaces; may be repeated",
    )
    train.add_argument(
        "--beside-checkout", type=Path, metavar="FOLDER", help="also time the code of another checkout"
    )
    train.add_argument(
        "--reference",
        action="store_true",
        help="also time the released code's way: one decoder call per pair, fp32, default memory layout",
    )
    train.add_argument(
        "--synthetic",
        type=positive_integer,
        metavar="M",
        help="train M copies of the config's first modality",
    )
    train.add_argument(
        "--image-size",
        type=positive_integer,
        default=28,
        metavar="PX",
        help="side of random images (default: %(default)s)",
    )
    train.add_argument(
        "--read",
        action="store_true",
        help="read the config's shards instead of one random batch; the variants follow each other, because "
        "readers work ahead",
    )
    train.add_argument(
        "--gpu-suite",
        action="store_true",
        help=f"the same as --read --updates {_SUITE_UPDATES} with --beside {', --beside '.join(_GPU_SUITE)}",
    )
    train.add_argument(
        "--updates",
        type=positive_integer,
        default=1,
        metavar="N",
        help="updates per timed run (default: %(default)s)",
    )
    train.add_argument(
        "--profile", type=Path, metavar="TRACE.json", help="write a trace of the first variant"
    )

    read = commands.add_parser(
        "read",
        parents=[common],
        help="the reader",
        description="Time the reader on a train split.",
    )
    read.add_argument("shards", metavar="shards/NAME")
    read.add_argument(
        "--workers",
        type=non_negative_integer,
        nargs="+",
        default=[0, 1, 2],
        metavar="N",
        help="numbers of reader processes (default: 0 1 2)",
    )
    read.add_argument("--batch-size", type=positive_integer, default=128, metavar="B")
    read.add_argument(
        "--batches",
        type=positive_integer,
        default=32,
        metavar="N",
        help="batches per timed run (default: %(default)s, with 128 samples the shuffle window)",
    )

    select = commands.add_parser(
        "select",
        parents=[common],
        help="the selection of clusters",
        description="Time the selection of clusters from one encoding pass, and with one pass per number.",
    )
    select.add_argument("run", metavar="runs/NAME")

    sample = commands.add_parser(
        "sample", parents=[common], help="refined images", description="Time the refinement of images."
    )
    sample.add_argument("run", metavar="runs/NAME_refiner")
    sample.add_argument("--steps", type=positive_integer, nargs="+", default=[10, 20, 50], metavar="N")
    sample.add_argument(
        "--images",
        type=positive_integer,
        default=1000,
        metavar="N",
        help="images per timed run (default: %(default)s)",
    )

    evaluate = commands.add_parser(
        "evaluate",
        parents=[common],
        help="groups of metrics",
        description="Time each group of metrics of an evaluation.",
    )
    evaluate.add_argument("run", metavar="runs/NAME")
    evaluate.add_argument("--metrics", nargs="+", choices=get_args(MetricGroup), metavar="GROUP")
    parsed, left = parser.parse_known_args(arguments)
    # argparse takes all positional arguments of a sub-command at once, so those after an option are left
    # over.
    overrides = [argument for argument in left if parsed.command == "train" and not argument.startswith("-")]
    if overrides != left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if parsed.command == "train" and parsed.gpu_suite:
        parsed.read, parsed.updates = True, _SUITE_UPDATES
        parsed.beside = [*_GPU_SUITE, *parsed.beside]
    if overrides:
        parsed.overrides = [*parsed.overrides, *overrides]
    return parsed


def check_files(arguments: argparse.Namespace) -> None:
    """Check that the output files can be written, before anything is measured.

    Raises:
        UserError: a folder is missing.
    """
    for option in ("out", "profile"):
        path: Path | None = getattr(arguments, option, None)
        if path is not None and not path.parent.is_dir():
            raise UserError(
                f"--{option} {path}: there is no folder {path.parent}. Create it, or name another"
            )


def train_variants(arguments: argparse.Namespace) -> list[Variant]:
    """The config as it is, what is timed beside it, and the ceilings of their precisions."""
    import torch
    from turns import Variant

    from cmvae.models.precision import network_precision

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    common = {
        "config_path": str(Path(arguments.config).resolve()),
        "synthetic": arguments.synthetic,
        "image_size": arguments.image_size,
        "read": arguments.read,
        "updates": arguments.updates,
    }
    own = {**common, "overrides": arguments.overrides}
    profile = str(arguments.profile.resolve()) if arguments.profile is not None else None
    variants = [Variant("as configured", "update", {**own, "profile": profile})]
    for settings in arguments.beside:
        overrides = [*arguments.overrides, *settings.split()]
        variants.append(Variant(settings, "update", {**common, "overrides": overrides}))
    if arguments.beside_checkout is not None:
        checkout = arguments.beside_checkout.resolve()
        if not (checkout / "cmvae").is_dir():
            raise UserError(f"--beside-checkout {arguments.beside_checkout}: has no folder cmvae/")
        variants.append(Variant(f"as in {arguments.beside_checkout}", "update", own, checkout))
    if arguments.reference:
        variants.append(Variant("pair by pair, fp32", "update", {**own, "reference": True}))
    last = variants[-1].title
    variants = [*(replace(variant, compared_with=last) for variant in variants[:-1]), variants[-1]]
    precisions = [
        "fp32"
        if variant.arguments.get("reference")
        else network_precision(
            load_config(arguments.config, variant.arguments["overrides"]).train.mixed_precision, device
        )
        for variant in variants
    ]
    return variants + [
        Variant(f"3×3 convolutions, {precision}", "ceiling", {"precision": precision})
        for precision in dict.fromkeys(precisions)
    ]


def measure(arguments: argparse.Namespace) -> list[Measured]:
    """Time what the arguments ask for."""
    from turns import Variant, measure_in_turns

    repeats, warm_up = arguments.repeats, arguments.warm_up
    if arguments.command == "train":
        return measure_in_turns(train_variants(arguments), repeats, warm_up, alone=arguments.read)
    if arguments.command == "read":
        common = {"shards": arguments.shards, "batch_size": arguments.batch_size}
        common["num_batches"] = arguments.batches
        variants = [
            Variant(f"{n} workers", "shards", {**common, "num_workers": n}) for n in arguments.workers
        ]
        # Reader processes work ahead, and would take the cores of another variant.
        return measure_in_turns(variants, repeats, warm_up, alone=True)
    if arguments.command == "select":
        again = Variant("one pass per number of clusters", "selection", {"run": arguments.run, "again": True})
        once = Variant("one encoding pass", "selection", {"run": arguments.run, "again": False})
        variants = [replace(once, compared_with=again.title), again]
    elif arguments.command == "sample":
        common = {"run": arguments.run, "num_images": arguments.images}
        variants = [
            Variant(f"{steps} steps", "refining", {**common, "overrides": [f"num_steps={steps}"]})
            for steps in arguments.steps
        ]
    else:
        groups = arguments.metrics or get_args(MetricGroup)
        variants = [Variant(group, "evaluation", {"run": arguments.run, "group": group}) for group in groups]
    return measure_in_turns(variants, repeats, warm_up)


def format_table(measured: Sequence[Measured]) -> str:
    """A Markdown table of medians, ranges, shares of the ceiling and ratios, without empty columns."""
    ceilings = {m.facts["precision"]: m.median_flops for m in measured if m.variant.job == "ceiling"}
    idle = [m for m in measured if m.facts.get("metrics") == 0]
    rows = [m for m in measured if m.variant.job != "ceiling" and m not in idle]
    header = [
        "",
        "items/s",
        "range",
        "seconds per run",
        "GFLOP/s",
        "of the ceiling",
        "data wait",
        "GiB",
        "speed",
    ]
    lines = []
    for m in rows:
        flops, share = m.median_flops, m.data_wait_share
        ceiling, ratio = ceilings.get(m.facts.get("precision")), rate_ratio(m, rows)
        lines.append(
            [
                m.variant.title,
                f"{m.median_rate:.3g}",
                f"{min(m.rates):.3g}–{max(m.rates):.3g}",
                f"{m.median_seconds:.3g}",
                "" if flops is None else f"{flops / 1e9:.0f}",
                "" if flops is None or ceiling is None else f"{flops / ceiling:.0%}",
                "" if share is None else f"{share:.1%}",
                f"{m.peak_memory_bytes / 2**30:.2f}",
                "" if ratio is None else f"{ratio:.2f} × {m.variant.compared_with}",
            ]
        )
    filled = [place for place in range(len(header)) if place == 0 or any(line[place] for line in lines)]
    table = markdown_table(
        [header[place] for place in filled], [[line[place] for place in filled] for line in lines]
    )
    notes = [
        f"{m.variant.title}, forward and backward: {m.median_flops / 1e9:.0f} GFLOP/s"
        for m in measured
        if m.variant.job == "ceiling" and m.median_flops is not None
    ]
    if all(m.variant.job == "evaluation" for m in measured):
        notes.append(f"sum: {sum(m.median_seconds for m in rows):.3g} seconds")
    if idle:
        notes.append(f"no metric for this run: {', '.join(m.variant.title for m in idle)}")
    return "\n\n".join([table, *notes])


def rate_ratio(measured: Measured, among: Sequence[Measured]) -> float | None:
    """The rate over that of the variant it is compared with; None if there is none."""
    others = (m for m in among if m.variant.title == measured.variant.compared_with)
    return next((measured.median_rate / other.median_rate for other in others), None)


def to_record(arguments: argparse.Namespace, measured: Sequence[Measured]) -> dict[str, Any]:
    """All measurements and the machine, for JSON."""
    import torch

    device = torch.accelerator.current_accelerator()
    return {
        "command": sys.argv[1:],
        "machine": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else str(device or "cpu"),
            "processor": platform.machine(),
            "threads": torch.get_num_threads(),
        },
        "measured": [
            {
                **asdict(m),
                "median_items_per_second": m.median_rate,
                "times_as_fast": rate_ratio(m, measured),
                "flops_per_second": m.median_flops,
            }
            for m in measured
        ],
    }


def main() -> int:
    """Measure, print the table, write the record."""
    arguments = parse_arguments()
    check_files(arguments)
    measured = measure(arguments)
    print(format_table(measured))
    if arguments.out is not None:
        record = json.dumps(to_record(arguments, measured), indent=2, default=str)
        try:
            write_whole(arguments.out, f"{record}\n".encode())
        except OSError as error:
            raise UserError(f"--out {arguments.out}: cannot be written: {error}") from error
    return 0


if __name__ == "__main__":
    run_main(main)
