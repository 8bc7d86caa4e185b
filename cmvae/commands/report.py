"""Write one HTML page that says what the clusters of a trained run are.

    cmvae report runs/digits
    cmvae report runs/digits --split test --out digits.html

The page needs neither a server nor a network. Per cluster: its size, stability and nearest neighbours
in the tree, the samples nearest to its mean and the least sure ones, the columns, words and categories
that set it apart, mean images, and what the model generates from it. Also a map of z, labels against
clusters, the samples whose modalities disagree, the curves of the training and the settings.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cmvae.config import check_against_shards, load_cmvae_run
from cmvae.data.index import ShardIndex
from cmvae.utils.arguments import add_num_clusters_argument, command_parser
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/digits")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="default: RUN/report.html")
    parser.add_argument("--split", default="all", help="one split of the data, or all (default)")
    add_num_clusters_argument(parser)
    return parser.parse_args()


def main() -> int:
    """Check, read the data once, write the page."""
    arguments = parse_arguments()
    config = load_cmvae_run(arguments.run)
    shards = config.data.shards
    index = ShardIndex.load(shards)
    check_against_shards(config, index, str(arguments.run / "config.yaml"))
    if arguments.split != "all":
        index.split(arguments.split, shards)
    out = arguments.out or arguments.run / "report.html"
    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"--out {out}: not a file in a folder that exists. Give a path such as report.html")

    from cmvae.evaluation.cluster_report import make_page, read_clusters
    from cmvae.visualize.cluster_page import render_page

    splits = list(index.splits) if arguments.split == "all" else [arguments.split]
    html = render_page(
        make_page(*read_clusters(config, index, arguments.run, splits, arguments.num_clusters))
    )
    try:
        write_whole(out, html.encode())
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}. Give another path with --out") from error
    print(f"{out}: open it in a browser")
    return 0
