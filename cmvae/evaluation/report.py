"""What an evaluation leaves behind: metrics, protocol, pictures, texts, and a table for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from cmvae.evaluation.result import REFINED, GroupResult
from cmvae.utils.errors import UserError
from cmvae.utils.files import whole_folder


def write_report(folder: Path, result: GroupResult) -> None:
    """Write a whole evaluation, which takes the place of an earlier one; or leave that as it was.

    `metrics.json` is one flat object of numbers, `protocol.json` says how they were computed and what was
    left out for which reason, `figures/NAME.png` are the pictures, `texts/NAME.txt` what is to be read.

    Args:
        folder: usually `RUN_DIR/evaluation`.
        result: everything that was computed.

    Raises:
        ValueError: a metric is not finite, which JSON cannot say.
        UserError: the folder cannot be written, say because the disk is full.
    """
    broken = [name for name, value in result.metrics.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(f"not finite: {', '.join(sorted(broken))}")
    try:
        with whole_folder(folder) as partial:
            (partial / "figures").mkdir()
            for name, figure in result.figures.items():
                figure.savefig(partial / "figures" / f"{name}.png")
            for name, text in result.texts.items():
                (partial / "texts").mkdir(exist_ok=True)
                (partial / "texts" / f"{name}.txt").write_text(text, encoding="utf-8")
            _write_json(partial / "protocol.json", {**result.protocol, "left_out": result.left_out})
            _write_json(partial / "metrics.json", {name: float(x) for name, x in result.metrics.items()})
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written ({error.strerror or error}); what an earlier evaluation left there "
            "is untouched. Make room or mend the permissions, then evaluate again"
        ) from error


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")


def format_report(result: GroupResult) -> str:
    """The metrics as a table, then what was left out and why."""
    reasons = [f"left out: {name}: {reason}" for name, reason in result.left_out.items()]
    return "\n".join([format_table(result.metrics), *reasons])


def format_table(metrics: Mapping[str, float]) -> str:
    """The metrics as lines of text, sorted by name, the numbers below each other.

    Where generations were refined, a metric's value after it stands beside the one before.
    """
    names = sorted(name for name in metrics if not name.startswith(REFINED))
    width = max(map(len, names), default=0)
    rows = [f"{name:<{width}}  {_format_number(metrics[name])}" for name in names]
    if len(names) == len(metrics):
        return "\n".join(rows)
    after = [_format_number(metrics[REFINED + name]) if REFINED + name in metrics else "" for name in names]
    head = f"{'':<{width}}  {'before':>10}  {'refined':>10}"
    return "\n".join([head, *(f"{row}  {value}".rstrip() for row, value in zip(rows, after, strict=True))])


def _format_number(value: float) -> str:
    """Counts without decimals, shares and nats with four."""
    return f"{value:10.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:10.4f}"
