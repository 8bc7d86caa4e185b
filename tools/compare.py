"""Compare evaluated runs over seeds: python tools/compare.py runs/A runs/B."""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works in a checkout that is not installed

from cmvae.config import flatten, load_run_config
from cmvae.errors import UserError
from cmvae.files import write_whole

# What does not make an experiment, or the protocol of its evaluation, another one.
REPEAT_SETTINGS = frozenset({"name", "output_dir", "seed"})
REPEAT_PROTOCOL = frozenset({"export_sha256"})


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


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Compare evaluated runs; those that differ only in seed and name are taken together."
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="runs/NAME", help="folders of evaluated runs")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/comparison"),
        metavar="FOLDER",
        help="for comparison.md and comparison.png (default: runs/comparison)",
    )
    return parser.parse_args(arguments)


def read_run(folder: Path) -> Run:
    """A run with its metrics and their protocol.

    Raises:
        UserError: the folder is no run, or its evaluation is missing or damaged.
    """
    config = load_run_config(folder)
    settings = {key: value for key, value in flatten(config).items() if key not in REPEAT_SETTINGS}
    path = folder / "evaluation" / "metrics.json"
    if not path.is_file():
        raise UserError(f"{path}: missing. Evaluate the run first: python launch/evaluate.py {folder}")
    metrics = _read_object(path, folder)
    if not metrics:
        raise UserError(
            f"{path}: holds no metric. Evaluate the run again: python launch/evaluate.py {folder}"
        )
    for name, value in metrics.items():
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            raise UserError(
                f"{path}: {name}: {value!r} is no finite number. Evaluate the run again: "
                f"python launch/evaluate.py {folder}"
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
            f"{path}: cannot be read as JSON: {error}. Evaluate the run again: "
            f"python launch/evaluate.py {folder}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: holds {type(content).__name__}, not an object. Evaluate the run again: "
            f"python launch/evaluate.py {folder}"
        )
    return content


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
        _format_table(["metric", *titles], rows),
    ]
    for title, rows in (
        ("Settings that differ", _differences(groups, lambda run: run.settings)),
        ("Protocol that differs", _differences(groups, lambda run: run.protocol)),
    ):
        if rows:
            parts += [f"## {title}", _format_table(["key", *titles], rows)]
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


def _format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def main() -> int:
    """Read, print the table, write it and the figure."""
    arguments = parse_arguments()
    try:
        groups = group_runs([read_run(folder) for folder in arguments.runs])
        # Slow to import; after the runs, so that a mistake in them shows at once.
        from cmvae.evaluation.figures import metric_comparison

        comparison = format_comparison(groups)
        figure = metric_comparison(
            {
                group.title: {name: group.values(name) for run in group.runs for name in run.metrics}
                for group in groups
            }
        )
        try:
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_whole(arguments.out / "comparison.md", comparison.encode())
            figure.savefig(arguments.out / "comparison.png")
        except OSError as error:
            raise UserError(f"--out {arguments.out}: cannot be written: {error}") from error
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(comparison)
    print(f"written to {arguments.out}: comparison.md, comparison.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
