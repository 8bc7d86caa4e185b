"""Draw the coherence and the clustering accuracy of runs against the hours of their trainings, from MLflow.

python tools/benchmarks/learning_curves.py runs/polymnist_cpu --out docs/polymnist_curves.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure
from mlflow import MlflowClient

from cmvae.tracking import RUN_RECORD_NAME
from cmvae.utils.errors import UserError
from cmvae.utils.process_exit import run_main
from cmvae.visualize.style import INK, lighten

METRICS = {
    "validation/coherence/conditional": "conditional coherence",
    "validation/coherence/unconditional": "unconditional coherence, trained mixture",
    "validation/clustering/acc": "clustering accuracy, trained mixture",
}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Draw learning curves against hours.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs with train.coherence_samples")
    parser.add_argument("--out", type=Path, required=True, help="image file")
    return parser.parse_args()


def read_hours(run: Path, metric: str) -> list[tuple[float, float]]:
    """(hours since the start of the run, value) of every validation.

    Time between a stop and `--resume` counts.
    """
    record = json.loads((run / RUN_RECORD_NAME).read_text(encoding="utf-8"))
    client = MlflowClient(tracking_uri=record["tracking_uri"])
    started = client.get_run(record["run_id"]).info.start_time
    points = client.get_metric_history(record["run_id"], metric)
    return [((point.timestamp - started) / 3.6e6, point.value) for point in points]


def main() -> int:
    """Read and draw."""
    arguments = parse_arguments()
    figure = Figure(figsize=(3.6 * len(METRICS), 3.2), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(METRICS), sharey=True)
    for ax, (metric, title) in zip(axes, METRICS.items(), strict=True):
        for run in arguments.runs:
            points = read_hours(run, metric)
            if not points:
                raise UserError(
                    f"{run}: no metric {metric!r} in MLflow. Train with train.coherence_samples=1000"
                )
            ax.plot(*zip(*points, strict=True), "o-", markersize=3, linewidth=1.3, label=run.name)
        ax.set_title(title, fontsize=9, color=INK, loc="left")
        ax.set_xlabel("hours", fontsize=9, color=INK)
        ax.set_ylim(0, 1)
        lighten(ax)
    if len(arguments.runs) > 1:
        axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(arguments.out)
    return 0


if __name__ == "__main__":
    run_main(main)
