"""Assign packed data, or the rows of a table, to the clusters of a trained run, and write a CSV table.

    cmvae cluster runs/digits shards/digits --out clusters.csv
    cmvae cluster runs/digits shards/digits --out three.csv --num-clusters 3 --modalities m0,m1
    cmvae cluster runs/mine new.csv --out clusters.csv             # new rows of a CSV or Parquet file
    cmvae cluster runs/digits shards/digits --out clusters.csv --launch ddp --num-processes 4

The data needs no labels. Modalities that the run does not know are not read; where the data lacks
some of the run's modalities, the others decide. Columns: key, split, cluster and confidence by all
modalities together, then MODALITY_cluster and MODALITY_confidence; a cell is empty where a sample
lacks the modality. Rows are sorted by key, which for a table that was packed is the order of its
rows.

A table is read from the columns that the run was trained on, with the vocabulary, categories and
standardisation of the run. Words and categories that it does not know are reported, and read as
<unk> and missing. The output has no column split and the rows of the table in their order.

With --by-group the samples of one group (`cmvae pack table --group`, the captions of one bird) get
one cluster. There is still one row per sample, with the group in a column of its own.
MODALITY_cluster is then what the modality says about the group, empty where no member has it.

A command that was interrupted continues where it was if it is started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmvae.commands.launcher import add_launch_arguments, read_launch
from cmvae.commands.new_rows import is_table, load_modalities, note, open_rows, report_unknown
from cmvae.config import CMVAEExperiment, load_cmvae_run
from cmvae.data.index import ShardIndex
from cmvae.datasets.table_rows import add_form_arguments
from cmvae.utils.arguments import add_num_clusters_argument, comma_separated, command_parser
from cmvae.utils.errors import UserError

if TYPE_CHECKING:  # imports torch
    from cmvae.commands.data_parts import DataParts


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/digits")
    parser.add_argument("data", help="packed data, e.g. shards/digits, or its URL; or a table, e.g. new.csv")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="the table to write")
    parser.add_argument("--split", default="all", help="one split of packed data, or all (default)")
    add_num_clusters_argument(parser)
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
    add_form_arguments(parser)
    add_launch_arguments(parser)
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


def choose_modalities(
    config: CMVAEExperiment, known: Sequence[str], arguments: argparse.Namespace
) -> list[str]:
    """The modalities to read: what --modalities says, or those of the run that the data has.

    Says on stderr which of the run's are missing.

    Args:
        config: the experiment of the run.
        known: modalities of the data.
        arguments: the flags.

    Raises:
        UserError: the data has none of them, or the run or the data lacks one that --modalities names.
    """
    wanted = list(config.model.modalities)
    if arguments.modalities is not None:
        for name in arguments.modalities:
            for where, names in ((arguments.run, wanted), (arguments.data, known)):
                if name not in names:
                    raise UserError(
                        f"--modalities {name}: {where} has no such modality, only {', '.join(names)}. "
                        "Name some of those"
                    )
        return list(arguments.modalities)
    present = [name for name in wanted if name in known]
    if not present:
        raise UserError(
            f"{arguments.data}: modalities: it has {', '.join(known)}, but the run {arguments.run} knows "
            f"only {', '.join(wanted)}. Pack the data under those names, a table with --like {arguments.run}"
        )
    missing = [name for name in wanted if name not in present]
    if missing:
        note(
            f"{arguments.data} has no {', '.join(missing)}: clusters are read from {', '.join(present)} alone"
        )
    return present


def check_groups(index: ShardIndex, splits: Sequence[str], arguments: argparse.Namespace) -> None:
    """Refuse --by-group where no sample has a group.

    Raises:
        UserError: none has.
    """
    if not any(index.split(split, arguments.data).num_groups for split in splits):
        raise UserError(
            f"--by-group: {arguments.data}: no sample of {', '.join(splits)} has a group. Pack the data "
            "again with this version and its groups (cmvae pack table … --group COLUMN; cubicc has "
            "them by itself), or leave out --by-group"
        )


def open_shards(config: CMVAEExperiment, arguments: argparse.Namespace) -> tuple[DataParts, list[str]]:
    """The packed data, and the modalities to read.

    Raises:
        UserError: the data is missing, damaged or does not fit the run or the flags.
    """
    from cmvae.commands.data_parts import ShardParts

    index = ShardIndex.load(arguments.data)
    if arguments.split != "all":
        index.split(arguments.split, arguments.data)
    splits = list(index.splits) if arguments.split == "all" else [arguments.split]
    names = choose_modalities(config, list(index.modalities), arguments)
    if arguments.by_group:
        check_groups(index, splits, arguments)
    modalities = load_modalities(arguments.run)
    index.check_modalities({name: modalities[name] for name in names}, arguments.data)
    return ShardParts(arguments.data, splits, names, config.evaluation.batch_size), names


def open_table(config: CMVAEExperiment, arguments: argparse.Namespace) -> tuple[DataParts, list[str]]:
    """The rows of a table, and the modalities to read.

    Raises:
        UserError: the table is missing or does not fit the run or the flags.
    """
    from cmvae.commands.data_parts import TableParts

    path = Path(arguments.data)
    if arguments.split != "all":
        raise UserError(f"--split {arguments.split}: {path} is a table, which has no splits. Leave it out")
    _, schema, modalities = open_rows(arguments.run, path, arguments)
    if not arguments.by_group:
        schema = schema.model_copy(update={"group": None})
    elif schema.group is None:
        raise UserError(
            f"--by-group: {path} has no column of groups like the table that the run was trained on. Add it, "
            "or leave out --by-group"
        )
    names = choose_modalities(config, list(modalities), arguments)
    chosen = {name: modalities[name] for name in names}
    return TableParts(path, schema, chosen, config.evaluation.batch_size), names


def main() -> int:
    """Check, assign, write."""
    arguments = parse_arguments()
    launch = read_launch(arguments)
    config = load_cmvae_run(arguments.run)
    check_out(arguments.out, arguments.overwrite)
    if launch:
        return launch.run("cluster")
    open_data = open_table if is_table(arguments.data) else open_shards
    data, names = open_data(config, arguments)

    from cmvae.commands.cluster_table import assign_to_file

    result = assign_to_file(
        arguments.run / "export", data, names, arguments.out, arguments.num_clusters, arguments.by_group
    )
    if result is None:
        return 0
    report_unknown(result.unknown, load_modalities(arguments.run))
    sizes = dict(result.sizes)
    unassigned = sizes.pop("", 0)
    print(f"{sum(sizes.values())} samples in {len(sizes)} clusters: {arguments.out}")
    if unassigned:
        print(f"{unassigned} samples have none of {', '.join(names)} and are in no cluster")
    for cluster, size in sorted(sizes.items(), key=lambda item: (-item[1], int(item[0]))):
        print(f"cluster {cluster:>4}  {size:>8,}")
    return 0
