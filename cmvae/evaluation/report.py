"""Results of an evaluation: metrics, protocol, figures and texts, as files and as a table."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cmvae.utils.attempts import attempt
from cmvae.utils.errors import UserError
from cmvae.utils.files import whole_folder

if TYPE_CHECKING:  # slow to import
    from matplotlib.figure import Figure

_NOT_DRAWN = "could not be drawn, see the warning"
REFINED = "refined/"
"""Prefix of metrics of generated samples after refinement."""
RELEASED = "released/"
"""Prefix of metrics by the counting of the released code, see `cmvae.evaluation.released`."""


@dataclass
class GroupResult:
    """Results of one group of metrics; the same on every rank."""

    metrics: dict[str, float] = field(default_factory=dict)
    """Metric → finite value."""
    figures: dict[str, Figure] = field(default_factory=dict)
    """File name without suffix → figure."""
    protocol: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    """Parameters, seeds and numbers of samples, by dotted name."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Metric, or common prefix of metrics → why it was not computed."""
    texts: dict[str, str] = field(default_factory=dict)
    """File name without suffix → text."""

    def draw(self, name: str, draw: Callable[[], Figure]) -> None:
        """Add a figure; if drawing fails, it is left out with a warning."""
        figure = attempt(f"figure {name}", draw)
        if figure is None:
            self.left_out[f"figures/{name}"] = _NOT_DRAWN
        else:
            self.figures[name] = figure

    def add(self, other: GroupResult) -> None:
        """Add the results of another group."""
        self.metrics |= other.metrics
        self.figures |= other.figures
        self.texts |= other.texts
        self.protocol |= other.protocol
        self.left_out |= other.left_out


def write_report(folder: Path, result: GroupResult) -> None:
    """Replace the evaluation in a folder; if that fails, an earlier one is kept.

    `metrics.json` is a flat object of numbers, `protocol.json` says how they were computed and why others
    were left out, and `figures/NAME.png` and `texts/NAME.txt` show samples.

    Args:
        folder: usually `RUN_DIR/evaluation`.
        result: all results.

    Raises:
        ValueError: a metric is not finite, which JSON cannot represent.
        UserError: the folder cannot be written.
    """
    broken = [name for name, value in result.metrics.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(f"not finite: {', '.join(sorted(broken))}")
    try:
        with whole_folder(folder) as partial:
            (partial / "figures").mkdir()
            for name, figure in result.figures.items():
                draw = functools.partial(_save, figure, partial / "figures" / f"{name}.png")
                if attempt(f"figure {name}", draw, raised=(OSError,)) is None:
                    result.left_out[f"figures/{name}"] = _NOT_DRAWN
            for name, text in result.texts.items():
                (partial / "texts").mkdir(exist_ok=True)
                (partial / "texts" / f"{name}.txt").write_text(text, encoding="utf-8")
            _write_json(partial / "protocol.json", {**result.protocol, "left_out": result.left_out})
            _write_json(partial / "metrics.json", {name: float(x) for name, x in result.metrics.items()})
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); an earlier evaluation there is "
            "unchanged. Free some space or fix the permissions, then evaluate again"
        ) from error


def _save(figure: Figure, path: Path) -> Path:
    try:
        figure.savefig(path)
    except Exception:
        path.unlink(missing_ok=True)
        raise
    return path


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")


def format_report(result: GroupResult) -> str:
    """The metrics as a table, then the metrics left out with the reasons."""
    reasons = [f"left out: {name}: {reason}" for name, reason in result.left_out.items()]
    return "\n".join([format_table(result.metrics), *reasons])


def format_table(metrics: Mapping[str, float]) -> str:
    """The metrics as aligned lines of text, sorted by name; with a refiner, before and after refinement."""
    names = sorted(name for name in metrics if not name.startswith(REFINED))
    width = max(map(len, names), default=0)
    rows = [f"{name:<{width}}  {_format_number(metrics[name])}" for name in names]
    if len(names) == len(metrics):
        return "\n".join(rows)
    after = [_format_number(metrics[REFINED + name]) if REFINED + name in metrics else "" for name in names]
    head = f"{'':<{width}}  {'before':>10}  {'refined':>10}"
    return "\n".join([head, *(f"{row}  {value}".rstrip() for row, value in zip(rows, after, strict=True))])


def _format_number(value: float) -> str:
    """Counts without decimals, other values with four."""
    return f"{value:10.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:10.4f}"
