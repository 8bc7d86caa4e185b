"""Pack a data set into shards that training reads.

    cmvae pack digits --out shards/digits
    cmvae pack table data.csv --out shards/mine --config mine.yaml --image photo --text caption
    cmvae pack table new.csv --out shards/new --like runs/mine    # new rows for a trained run
    cmvae pack table --help

Several machines pack parts of the same data into one folder, then one command makes the index:

    cmvae pack table data.csv --out shards/mine --image photo --part 1/3    # 2/3 and 3/3 elsewhere
    cmvae pack join shards/mine --config mine.yaml

The same command continues a packing that was interrupted. With a data set that has no shipped experiment
comes a config that trains on it as it is, see --config.
"""

from __future__ import annotations

import argparse
import os
import shlex
import tempfile
import time
from pathlib import Path

from cmvae.commands.new_rows import load_modalities
from cmvae.config import load_run_table
from cmvae.data.index import OnError, ShardIndex
from cmvae.datasets import SOURCES
from cmvae.datasets.columns import ColumnSource
from cmvae.datasets.embedding import embed_source
from cmvae.datasets.packing import Part
from cmvae.datasets.table import check_report, open_new_rows
from cmvae.datasets.user_data import add_config_argument
from cmvae.utils.arguments import command_parser, non_negative_integer, positive_integer
from cmvae.utils.errors import UserError

JOIN = "make one index from the parts that --part packed"


def parse_arguments() -> argparse.Namespace:
    """The command line; the flags of a source are known to its subcommand only."""
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="source", metavar="SOURCE", required=True)
    for name, module in SOURCES.items():
        command = commands.add_parser(name, help=module.DESCRIPTION, description=module.DESCRIPTION)
        command.add_argument(
            "--out", type=Path, required=True, metavar="FOLDER", help="for example shards/NAME"
        )
        command.add_argument("--seed", type=non_negative_integer, default=0, help="default: 0")
        command.add_argument(
            "--workers",
            type=positive_integer,
            default=os.cpu_count() or 1,
            metavar="N",
            help="writer processes; the shards do not depend on it (default: one per processor)",
        )
        command.add_argument(
            "--shard-size",
            type=positive_integer,
            default=1000,
            metavar="N",
            help="samples per shard (default: 1000)",
        )
        command.add_argument(
            "--limit",
            type=positive_integer,
            metavar="N",
            help="for a quick trial: N train samples, and the same share of the other splits",
        )
        command.add_argument("--force", action="store_true", help="replace a data set that is in --out")
        command.add_argument(
            "--part",
            type=part,
            metavar="I/N",
            help="pack the I-th of N parts of the shards; any machine may pack any part, and cmvae pack join "
            "makes the index",
        )
        module.add_arguments(command)
    command = commands.add_parser("join", help=JOIN, description=JOIN)
    command.add_argument("out", type=Path, metavar="FOLDER", help="the --out of the parts")
    add_config_argument(command)
    return parser.parse_args()


def part(text: str) -> Part:
    """Type of `--part`."""
    number, _, count = text.partition("/")
    chosen = Part(positive_integer(number), positive_integer(count))
    if chosen.number > chosen.num_parts:
        raise argparse.ArgumentTypeError(f"{text!r}: there are only {chosen.num_parts} parts")
    return chosen


def main() -> int:
    """Pack or join, print a summary and the next command."""
    arguments = parse_arguments()
    if arguments.source == "join":
        return join(arguments.out, arguments.config)
    return pack(arguments)


def pack(arguments: argparse.Namespace) -> int:
    """Pack all shards and make the index, or pack the shards of `--part`."""
    # Slow to import; after the flags, so that a mistake in them shows at once.
    from cmvae.datasets.fingerprint import fingerprint
    from cmvae.datasets.packing import begin_packing, begin_part, describe_packing
    from cmvae.datasets.writer import write_part
    from cmvae.utils.progress import progress_bar

    started = time.perf_counter()
    module = SOURCES[arguments.source]
    like: Path | None = getattr(arguments, "like", None)
    on_error: OnError = getattr(arguments, "on_error", "error")
    known_config = module.config_for(arguments)
    config: Path | None = None if known_config is not None else arguments.config
    checks = getattr(arguments, "check", False)
    if arguments.part is not None:
        check_flags_of_part(arguments, config)
    if checks:
        print(check_report(arguments))
    elif config is not None:
        check_config_path(config, arguments.force)
    source = module.from_arguments(arguments) if like is None else open_like(arguments, like)
    if isinstance(source, ColumnSource) and hasattr(arguments, "embed") and not checks:
        source = embed_source(source, arguments.embed, only=arguments.embed_only, on_error=on_error)
    if known_config is None and like is None:
        from cmvae.training.trial import try_starter_config

        try_starter_config(source, arguments.out, on_error)
    if checks:
        print("Nothing is wrong. Pack the table without --check")
        return 0
    packing = describe_packing(
        source,
        fingerprint(source),
        seed=arguments.seed,
        shard_size=arguments.shard_size,
        limit=arguments.limit,
        table=source.table if isinstance(source, ColumnSource) else None,
        on_error=on_error,
        experiment=None if known_config is None else known_config.stem,
        like=None if like is None else str(like),
    )
    if arguments.part is None:
        begin_packing(arguments.out, packing, force=arguments.force)
    else:
        begin_part(arguments.out, packing)
    with progress_bar(desc=str(arguments.out), unit=" samples") as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        write_part(
            source,
            arguments.out,
            packing,
            arguments.part or Part(1, 1),
            num_workers=arguments.workers,
            report=report,
        )
    if arguments.part is None:
        finish(arguments.out, config, started)
    else:
        folder = shlex.quote(str(arguments.out))
        print(f"Part {arguments.part} is packed. After the last one: cmvae pack join {folder}")
    return 0


def join(out: Path, config: Path | None) -> int:
    """Make one index from the parts in `out`."""
    from cmvae.datasets.packing import read_packing

    experiment = read_packing(out).experiment
    if config is not None and experiment is not None:
        raise UserError(f"--config {config}: the data has a config, configs/{experiment}.yaml. Leave it out")
    if config is not None:
        check_config_path(config, force=False)
    finish(out, config)
    return 0


def finish(out: Path, config: Path | None, started: float | None = None) -> None:
    """Make the index and a starter config, print a summary and the next command."""
    from cmvae.datasets.packing import SKIPPED_NAME, join_shards, read_packing
    from cmvae.training.starter_config import write_starter_config
    from cmvae.utils.files import write_whole

    packing = read_packing(out)
    index = join_shards(out)
    if packing.experiment is None and packing.like is None:
        starter = write_starter_config(index, out)
        if config is None:
            print(f"A config to start from; --config PATH writes it:\n\n{starter}")
        else:
            write_whole(config, starter.encode())
    print_summary(index, started)
    if (out / SKIPPED_NAME).is_file():
        print(f"Samples with a missing or damaged file were left out: {out / SKIPPED_NAME}")
    folder = shlex.quote(str(out))
    print(f"Look at it: cmvae inspect {folder}")
    if packing.like is not None:
        print(f"Assign it: cmvae cluster {packing.like} {folder} --out clusters.csv")
    if packing.experiment is not None:
        print(f"Train on it: cmvae train {packing.experiment} data.shards={folder}")
    elif config is not None:
        print(f"Train on it: cmvae train {shlex.quote(str(config))}")


def check_flags_of_part(arguments: argparse.Namespace, config: Path | None) -> None:
    """Refuse flags that do not go with `--part`.

    Raises:
        UserError: there is such a flag.
    """
    if arguments.force:
        raise UserError(
            f"--force: would delete what other parts packed. Delete {arguments.out} before the first part"
        )
    if config is not None:
        raise UserError(f"--config {config}: give it to cmvae pack join, which makes the index")
    if getattr(arguments, "check", False):
        raise UserError("--check: checks the whole table. Leave out --part")
    if getattr(arguments, "embed", None):
        raise UserError("--embed: every part would embed all samples. Leave out --part")


def check_config_path(path: Path, force: bool) -> None:
    """Check before anything is packed that the starter config can be written.

    Raises:
        UserError: it is there already and not to be replaced, or its folder cannot be written.
    """
    if path.exists() and not force:
        raise UserError(f"--config {path}: is there already. Choose another, or add --force")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"--config {path}: cannot be written: {error}. Choose another folder") from error


def open_like(arguments: argparse.Namespace, run: Path) -> ColumnSource:
    """The table with the modalities of a trained run.

    Raises:
        UserError: the run was not trained on a table, or the table does not fit it.
    """
    return open_new_rows(arguments, load_run_table(run), load_modalities(run))


def print_summary(index: ShardIndex, started: float | None) -> None:
    """Samples and shards of every split, and how long it took since `started`."""
    num_samples = sum(split.num_samples for split in index.splits.values())
    num_bytes = sum(split.num_bytes for split in index.splits.values())
    for name, split in index.splits.items():
        print(f"{name:>10}  {split.num_samples:>7,} samples in {split.num_shards} shards")
    summary = f"{num_samples:,} samples, {num_bytes:,} bytes"
    if started is not None:
        seconds = time.perf_counter() - started
        summary += f" in {seconds:.1f} s: {num_samples / seconds:,.0f} samples/s"
    print(summary)
