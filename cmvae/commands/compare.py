"""Compare evaluated runs; those that differ only in seed and name are taken together.

    cmvae compare runs/digits runs/digits-1 runs/digits-2
    cmvae compare runs/beta-* --along objective.beta --metric clustering/acc

Prints a table of means and standard deviations, settings and protocols that differ, and writes it
with a figure to runs/comparison/ (or --out).
"""

from __future__ import annotations

import argparse
import difflib
import functools
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from cmvae.config import flatten, load_run_config
from cmvae.data.index import ShardIndex
from cmvae.utils.arguments import command_parser
from cmvae.utils.attempts import attempt
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole
from cmvae.utils.tables import markdown_table

# What does not make an experiment, or the protocol of its evaluation, another one.
REPEAT_SETTINGS = frozenset({"name", "output_dir", "seed"})
REPEAT_PROTOCOL = frozenset({"export_sha256"})
# Before the name of a setting that the shards of a run were packed with.
SOURCE_PREFIX = "data.source."


@dataclass(frozen=True)
class Run:
    """An evaluated run."""

    folder: Path
    seed: int
    settings: Mapping[str, Any]
    """By dotted key, without those that differ between repeats."""
    metrics: Mapping[str, float]
    protocol: Mapping[str, Any]
    """Parameters of the evaluation and, as `left_out.METRIC`, why a metric is missing."""


@dataclass(frozen=True)
class Group:
    """Runs that differ only in seed and name."""

    title: str
    runs: Sequence[Run]

    def values(self, metric: str) -> list[float]:
        """The metric in those runs that have it."""
        return [run.metrics[metric] for run in self.runs if metric in run.metrics]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="runs/NAME", help="folders of evaluated runs")
    parser.add_argument(
        "--along",
        metavar="KEY",
        help="draw the metrics over a number that the experiments differ by: a key of their configs, such as "
        f"objective.beta, or {SOURCE_PREFIX}NAME, what their shards were packed with",
    )
    parser.add_argument(
        "--metric",
        action="append",
        dest="metrics",
        metavar="NAME",
        help="what the figure shows, in this order; may be given several times (default: the main ones)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/comparison"),
        metavar="FOLDER",
        help="for comparison.md and comparison.png (default: runs/comparison)",
    )
    return parser.parse_args()


def read_run(folder: Path) -> Run:
    """A run with its metrics and their protocol.

    Raises:
        UserError: the folder is no run, or its evaluation is missing or damaged.
    """
    config = load_run_config(folder)
    settings = {key: value for key, value in flatten(config).items() if key not in REPEAT_SETTINGS}
    path = folder / "evaluation" / "metrics.json"
    if not path.is_file():
        raise UserError(f"{path}: missing. Evaluate the run first: cmvae evaluate {folder}")
    metrics = _read_object(path, folder)
    if not metrics:
        raise UserError(f"{path}: holds no metric. Evaluate the run again: cmvae evaluate {folder}")
    for name, value in metrics.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise UserError(
                f"{path}: {name}: {value!r} is no finite number. Evaluate the run again: "
                f"cmvae evaluate {folder}"
            )
    return Run(folder, config.seed, settings, metrics, _read_protocol(folder))


def _read_protocol(folder: Path) -> dict[str, Any]:
    path = folder / "evaluation" / "protocol.json"
    if not path.is_file():
        return {}
    content = _read_object(path, folder)
    reasons = content.pop("left_out", {})
    protocol = {key: value for key, value in content.items() if key not in REPEAT_PROTOCOL}
    return protocol | {f"left_out.{name}": reason for name, reason in reasons.items()}


def _read_object(path: Path, folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read as JSON: {error}. Evaluate the run again: cmvae evaluate {folder}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds {type(content).__name__}, not an object. Evaluate the run again: "
            f"cmvae evaluate {folder}"
        )
    return content


def with_setting(run: Run, key: str) -> Run:
    """The run, and among its settings for certain the number called `key`.

    Raises:
        UserError: there is no such setting, it is no number, or the run's shards cannot be read.
    """
    settings = run.settings
    if key.startswith(SOURCE_PREFIX):
        source = ShardIndex.load(run.settings["data.shards"]).source
        settings = {**settings, **{SOURCE_PREFIX + name: value for name, value in source.items()}}
    if key not in settings:
        near = difflib.get_close_matches(key, settings, n=1)
        remedy = f"Did you mean {near[0]}?" if near else f"Give one of {run.folder}/config.yaml"
        raise UserError(f"--along {key}: {run.folder} has no such setting. {remedy}")
    value = settings[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise UserError(
            f"--along {key}: {value!r} of {run.folder} is no number. Choose a setting that is one"
        )
    return replace(run, settings={**run.settings, key: value})


def check_along(groups: Sequence[Group], key: str) -> None:
    """Refuse two experiments at one place of the axis.

    Raises:
        UserError: it names both.
    """
    at: dict[float, Group] = {}
    for group in groups:
        value = group.runs[0].settings[key]
        if value in at:
            raise UserError(
                f"--along {key}: {at[value].title} and {group.title} both have {value} and differ in other "
                "settings. Leave one of them out, or do without --along and see in which"
            )
        at[value] = group


def check_metrics(groups: Sequence[Group], metrics: Sequence[str]) -> None:
    """Refuse to draw what no run has.

    Raises:
        UserError: it names the first such metric.
    """
    known = {name for group in groups for run in group.runs for name in run.metrics}
    for name in metrics:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"Did you mean {near[0]}?" if near else f"They have {', '.join(sorted(known))}"
            raise UserError(f"--metric {name}: none of the runs has it. {remedy}")


def group_runs(runs: Sequence[Run]) -> list[Group]:
    """Runs of the same experiment together, in the order in which they were given.

    Raises:
        UserError: a folder was given twice, or two runs of one experiment have the same seed, so that they
            are no independent repeats.
    """
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        repeats = by_settings.setdefault(json.dumps(run.settings, sort_keys=True), [])
        for other in repeats:
            if other.seed == run.seed:
                raise UserError(
                    f"{other.folder} and {run.folder}: the same experiment with the same seed "
                    f"{run.seed}, which says nothing about the spread. Leave one of them out"
                )
        repeats.append(run)
    names = [group[0].folder.resolve().name for group in by_settings.values()]
    return [
        Group(name if names.count(name) == 1 else str(group[0].folder), group)
        for name, group in zip(names, by_settings.values(), strict=True)
    ]


def format_comparison(groups: Sequence[Group]) -> str:
    """The comparison in Markdown: metrics, then settings and protocol where the groups differ."""
    titles = [f"{group.title} (n = {len(group.runs)})" for group in groups]
    metrics = sorted({name for group in groups for run in group.runs for name in run.metrics})
    rows = [
        [name, *(_format_spread(group.values(name), len(group.runs)) for group in groups)] for name in metrics
    ]
    parts = [
        "# Comparison",
        "Mean ± standard deviation over seeds; (n) where only some of the runs have the metric.",
        markdown_table(["metric", *titles], rows),
    ]
    for title, rows in (
        ("Settings that differ", _differences(groups, lambda run: run.settings)),
        ("Protocol that differs", _differences(groups, lambda run: run.protocol)),
    ):
        if rows:
            parts += [f"## {title}", markdown_table(["key", *titles], rows)]
    members = [f"- {group.title}: {', '.join(str(run.folder) for run in group.runs)}" for group in groups]
    parts += ["## Runs", "\n".join(members)]
    return "\n\n".join(parts) + "\n"


def _format_spread(values: Sequence[float], num_runs: int) -> str:
    if not values:
        return "–"
    text = f"{statistics.fmean(values):.4f}"
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.4f}"
    return text if len(values) == num_runs else f"{text} ({len(values)})"


def _differences(groups: Sequence[Group], read: Callable[[Run], Mapping[str, Any]]) -> list[list[str]]:
    """A row for each key that has not one and the same value in all runs."""
    keys = dict.fromkeys(key for group in groups for run in group.runs for key in read(run))
    rows = []
    for key in keys:
        values = [[str(read(run).get(key, "–")) for run in group.runs] for group in groups]
        if len(set(chain.from_iterable(values))) > 1:
            rows.append([key, *(", ".join(dict.fromkeys(cell)) for cell in values)])
    return rows


def main() -> int:
    """Read, print the table, write it and the figure."""
    arguments = parse_arguments()
    runs = [read_run(folder) for folder in arguments.runs]
    if arguments.along is not None:
        runs = [with_setting(run, arguments.along) for run in runs]
    groups = group_runs(runs)
    if arguments.along is not None:
        check_along(groups, arguments.along)
    check_metrics(groups, arguments.metrics or ())
    # Slow to import; after the runs, so that a mistake in them shows at once.
    from cmvae.visualize.comparisons import metric_comparison, metrics_along

    comparison = format_comparison(groups)
    values = {
        group.title: {name: group.values(name) for run in group.runs for name in run.metrics}
        for group in groups
    }
    if arguments.along is None:
        figure = metric_comparison(values, arguments.metrics)
    else:
        along = {group.runs[0].settings[arguments.along]: values[group.title] for group in groups}
        figure = metrics_along(along, arguments.along, arguments.metrics)
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.out / "comparison.md", comparison.encode())
        attempt("comparison.png", functools.partial(figure.savefig, arguments.out / "comparison.png"))
    except OSError as error:
        raise UserError(f"--out {arguments.out}: cannot be written: {error}") from error
    print(comparison)
    print(f"written to {arguments.out}: comparison.md, comparison.png")
    return 0
