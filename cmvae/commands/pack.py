"""Pack a data set into shards that training reads.

    cmvae pack digits --out shards/digits
    cmvae pack table data.csv --out shards/mine --config mine.yaml --image photo --text caption
    cmvae pack table new.csv --out shards/new --like runs/mine    # new rows for a trained run
    cmvae pack table --help

With a data set that has no shipped experiment comes a config that trains on it as it is, see
--config.
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
from cmvae.datasets.table import check_report, open_new_rows
from cmvae.utils.arguments import command_parser, non_negative_integer, positive_integer
from cmvae.utils.errors import UserError


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
        module.add_arguments(command)
    return parser.parse_args()


def main() -> int:
    """Pack, print a summary and the next command."""
    arguments = parse_arguments()
    # Slow to import; after the flags, so that a mistake in them shows at once.
    from cmvae.datasets.writer import SKIPPED_NAME, write_shards
    from cmvae.training.starter_config import write_starter_config
    from cmvae.training.trial import try_starter_config
    from cmvae.utils.files import write_whole
    from cmvae.utils.progress import progress_bar

    started = time.perf_counter()
    module = SOURCES[arguments.source]
    like: Path | None = getattr(arguments, "like", None)
    on_error: OnError = getattr(arguments, "on_error", "error")
    known_config = module.config_for(arguments)
    config: Path | None = known_config if known_config is not None else arguments.config
    checks = getattr(arguments, "check", False)
    if checks:
        print(check_report(arguments))
    elif known_config is None and config is not None:
        check_config_path(config, arguments.force)
    source = module.from_arguments(arguments) if like is None else open_like(arguments, like)
    if isinstance(source, ColumnSource) and hasattr(arguments, "embed") and not checks:
        source = embed_source(source, arguments.embed, only=arguments.embed_only, on_error=on_error)
    if known_config is None and like is None:
        try_starter_config(source, arguments.out, on_error)
    if checks:
        print("Nothing is wrong. Pack the table without --check")
        return 0
    with progress_bar(desc=str(arguments.out), unit=" samples") as bar:

        def report(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        index = write_shards(
            source,
            arguments.out,
            seed=arguments.seed,
            shard_size=arguments.shard_size,
            num_workers=arguments.workers,
            limit=arguments.limit,
            force=arguments.force,
            on_error=on_error,
            table=source.table if isinstance(source, ColumnSource) else None,
            report=report,
        )
    if known_config is None and like is None:
        starter = write_starter_config(index, arguments.out)
        if config is None:
            print(f"A config to start from; --config PATH writes it:\n\n{starter}")
        else:
            write_whole(config, starter.encode())
    print_summary(index, time.perf_counter() - started)
    if (arguments.out / SKIPPED_NAME).is_file():
        print(f"Samples with a missing or damaged file were left out: {arguments.out / SKIPPED_NAME}")
    print(f"Look at it: cmvae inspect {shlex.quote(str(arguments.out))}")
    if like is not None:
        print(f"Assign it: cmvae cluster {like} {arguments.out} --out clusters.csv")
    if known_config is not None:
        print(f"Train on it: cmvae train {known_config.stem} data.shards={arguments.out}")
    elif config is not None:
        print(f"Train on it: cmvae train {shlex.quote(str(config))}")
    return 0


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


def print_summary(index: ShardIndex, seconds: float) -> None:
    """Samples and shards of every split, and how long it took."""
    num_samples = sum(split.num_samples for split in index.splits.values())
    num_bytes = sum(shard.num_bytes for split in index.splits.values() for shard in split.shards)
    for name, split in index.splits.items():
        print(f"{name:>10}  {split.num_samples:>7,} samples in {len(split.shards)} shards")
    rate = num_samples / seconds
    print(f"{num_samples:,} samples, {num_bytes:,} bytes in {seconds:.1f} s: {rate:,.0f} samples/s")
