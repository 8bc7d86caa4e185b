"""Assign packed data to the clusters of a trained run, and write a CSV table.

    cmvae cluster runs/digits shards/digits --out clusters.csv
    cmvae cluster runs/digits shards/digits --out three.csv --num-clusters 3 --modalities m0,m1

The data needs no labels. Modalities that the run does not know are not read; where the data lacks
some of the run's modalities, the others decide. Columns: key, split, cluster and confidence by all
modalities together, then MODALITY_cluster and MODALITY_confidence; a cell is empty where a sample
lacks the modality. Rows are sorted by key, which for a table is the order of its rows.

With --by-group the samples of one group (`cmvae pack table --group`, the captions of one bird) get
one cluster. There is still one row per sample, with the group in a column after split.
MODALITY_cluster is then what the modality says about the group, empty where no member has it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cmvae.config import CMVAEExperiment, load_cmvae_run
from cmvae.data.index import ShardIndex
from cmvae.utils.arguments import comma_separated, command_parser, positive_integer
from cmvae.utils.errors import UserError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/digits")
    parser.add_argument("shards", help="packed data, e.g. shards/digits, or its URL")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="the table to write")
    parser.add_argument("--split", default="all", help="one split of the data, or all (default)")
    parser.add_argument(
        "--num-clusters",
        type=positive_integer,
        metavar="K",
        help="number of clusters, from the same model (default: what its export selected)",
    )
    parser.add_argument(
        "--modalities",
        type=comma_separated,
        metavar="NAME[,NAME…]",
        help="assign from these alone (default: all of the run that the data has)",
    )
    parser.add_argument(
        "--by-group", action="store_true", help="one cluster for all samples of one group, decided together"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file --out")
    return parser.parse_args()


def check_out(path: Path, overwrite: bool) -> None:
    """Refuse a table that could not be written, before anything is computed.

    Raises:
        UserError: the file is there already, or its folder is not.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"--out {path}: not a file in a folder that exists. Give a path such as clusters.csv")
    if path.exists() and not overwrite:
        raise UserError(f"--out {path}: exists. Add --overwrite to replace it, or give another path")


def choose_modalities(config: CMVAEExperiment, index: ShardIndex, arguments: argparse.Namespace) -> list[str]:
    """The modalities to read: what --modalities says, or those of the run that the data has.

    Says on stderr which of the run's are missing.

    Raises:
        UserError: the data has none of them, or the run or the data lacks one that --modalities names.
    """
    wanted = list(config.model.modalities)
    if arguments.modalities is not None:
        for name in arguments.modalities:
            for where, known in ((arguments.run, wanted), (arguments.shards, list(index.modalities))):
                if name not in known:
                    raise UserError(
                        f"--modalities {name}: {where} has no such modality, only {', '.join(known)}. "
                        "Name some of those"
                    )
        return list(arguments.modalities)
    present = [name for name in wanted if name in index.modalities]
    if not present:
        raise UserError(
            f"{arguments.shards}: modalities: it has {', '.join(index.modalities)}, but the run "
            f"{arguments.run} knows only {', '.join(wanted)}. Pack the data under those names"
        )
    missing = [name for name in wanted if name not in present]
    if missing:
        print(
            f"note: {arguments.shards} has no {', '.join(missing)}: clusters are read from "
            f"{', '.join(present)} alone",
            file=sys.stderr,
        )
    return present


def check_groups(index: ShardIndex, splits: Sequence[str], arguments: argparse.Namespace) -> None:
    """Refuse --by-group where no sample has a group.

    Raises:
        UserError: none has.
    """
    if not any(index.split(split, arguments.shards).num_groups for split in splits):
        raise UserError(
            f"--by-group: {arguments.shards}: no sample of {', '.join(splits)} has a group. Pack the data "
            "again with this version and its groups (cmvae pack table … --group COLUMN; cubicc has "
            "them by itself), or leave out --by-group"
        )


def main() -> int:
    """Check, assign, write."""
    arguments = parse_arguments()
    config = load_cmvae_run(arguments.run)
    index = ShardIndex.load(arguments.shards)
    if arguments.split != "all":
        index.split(arguments.split, arguments.shards)
    splits = list(index.splits) if arguments.split == "all" else [arguments.split]
    modalities = choose_modalities(config, index, arguments)
    if arguments.by_group:
        check_groups(index, splits, arguments)
    check_out(arguments.out, arguments.overwrite)

    from cmvae.commands.cluster_table import assign_to_file

    sizes = assign_to_file(
        arguments.run / "export",
        arguments.shards,
        splits,
        modalities,
        config.evaluation.batch_size,
        arguments.out,
        arguments.num_clusters,
        arguments.by_group,
    )
    unknown = sizes.pop(None, 0)
    print(f"{sum(sizes.values())} samples in {len(sizes)} clusters: {arguments.out}")
    if unknown:
        print(f"{unknown} samples have none of {', '.join(modalities)} and are in no cluster")
    for cluster, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"cluster {cluster:>4}  {size:>8,}")
    return 0
