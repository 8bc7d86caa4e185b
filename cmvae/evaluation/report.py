"""What an evaluation leaves behind: `metrics.json`, pictures, and a table for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from cmvae.files import write_whole


def write_report(folder: Path, metrics: Mapping[str, float], figures: Mapping[str, Figure]) -> None:
    """Write `folder/metrics.json`, one flat object sorted by name, and `folder/figures/NAME.png`.

    What an earlier evaluation wrote under the same names is replaced. The metrics are written last: where
    they are, the pictures are too.

    Args:
        folder: usually `RUN_DIR/evaluation`.
        metrics: name → value.
        figures: name → figure.

    Raises:
        ValueError: a metric is not finite, which JSON cannot say.
    """
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise ValueError(f"not finite: {', '.join(sorted(broken))}")
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(folder / "figures" / f"{name}.png")
    values = {name: float(value) for name, value in metrics.items()}
    content = json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n"
    write_whole(folder / "metrics.json", content.encode())


def format_table(metrics: Mapping[str, float]) -> str:
    """The metrics as lines of text, sorted by name, the numbers below each other."""
    width = max(map(len, metrics), default=0)
    return "\n".join(f"{name:<{width}}  {_format_number(metrics[name])}" for name in sorted(metrics))


def _format_number(value: float) -> str:
    """Counts without decimals, shares and nats with four."""
    return f"{value:10.0f}" if float(value).is_integer() and abs(value) > 1 else f"{value:10.4f}"
