"""What a model's clusters have to be better than: k-means on each modality as it is.

    cmvae baselines shards/digits

k-means is fitted on the train split and compared with the labels of another. Prints mean and
standard deviation over seeds as a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterable
from typing import TYPE_CHECKING

from cmvae.utils.arguments import command_parser, positive_integer
from cmvae.utils.tables import markdown_table

if TYPE_CHECKING:  # slow to import
    from cmvae.evaluation.baselines import Baseline


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    parser.add_argument("location", help="what `cmvae pack` wrote, for example shards/digits, or its URL")
    parser.add_argument(
        "--split", default="test", help="whose labels the clusters are compared with (default: test)"
    )
    parser.add_argument(
        "--seeds", type=positive_integer, default=3, metavar="N", help="number of fits (default: 3)"
    )
    parser.add_argument(
        "--num-clusters",
        type=positive_integer,
        metavar="N",
        help="default: the number of classes, which a model does not know",
    )
    return parser.parse_args()


def to_markdown(baselines: Iterable[Baseline]) -> str:
    """Mean and standard deviation over seeds, one line per kind of features."""
    rows = []
    for baseline in baselines:
        cells = [baseline.modality, baseline.features, f"{baseline.num_samples:,}"]
        for values in baseline.metrics.values():
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        rows.append(cells)
    return markdown_table(["modality", "k-means on", "samples", "ACC", "NMI", "ARI"], rows)


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
