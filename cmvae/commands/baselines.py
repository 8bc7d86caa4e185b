"""What k-means finds in packed data: python tools/baselines.py shards/NAME."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from cmvae.utils.arguments import positive_integer

if TYPE_CHECKING:  # slow to import
    from cmvae.evaluation.baselines import Baseline


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="What a model's clusters have to be better than: k-means on each modality as it is, "
        "fitted on the train split, compared with the labels of another."
    )
    parser.add_argument(
        "location", help="what tools/make_shards.py wrote, for example shards/digits, or its URL"
    )
    parser.add_argument(
        "--split", default="test", help="whose labels the clusters are compared with (default: test)"
    )
    parser.add_argument(
        "--seeds", type=positive_integer, default=3, metavar="N", help="fits a line of the table (default: 3)"
    )
    parser.add_argument(
        "--num-clusters",
        type=positive_integer,
        metavar="N",
        help="(default: as many as there are classes, which a model is not told)",
    )
    return parser.parse_args(arguments)


def to_markdown(baselines: Iterable[Baseline]) -> str:
    """Mean and standard deviation over seeds, a line for each kind of features."""
    lines = ["| modality | k-means on | samples | ACC | NMI | ARI |", "|---|---|---|---|---|---|"]
    for baseline in baselines:
        cells = [baseline.modality, baseline.features, f"{baseline.num_samples:,}"]
        for values in baseline.metrics.values():
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Fit, compare, print."""
    arguments = parse_arguments()
    from cmvae.evaluation.baselines import evaluate_baselines
    from cmvae.utils.progress import progress_bar

    baselines = evaluate_baselines(
        arguments.location, arguments.split, arguments.seeds, arguments.num_clusters
    )
    bar = progress_bar(baselines, desc="k-means", unit=" kinds of features", leave=False)
    print(to_markdown(bar))
    return 0
