"""Fill the missing cells of a table with what a trained run generates.

    cmvae impute runs/mine new.csv --out full.csv
    cmvae impute runs/mine new.parquet --out full.csv --draws 100
    cmvae impute runs/mine new.csv --out full.csv --launch ddp --num-processes 4

The table is a CSV or Parquet file with columns of the table that the run was trained on; columns
that it lacks are added. A cell is generated --draws times from the modalities that its row has, and
gets the mean of numbers, or the most frequent category or text. A number is in the units of the
table. Columns at the end show how sure it is: COLUMN_sd, the standard deviation of the number under
the model, including the noise of its likelihood, and COLUMN_confidence, the share of the draws with
this category; they are empty for cells that were not missing, which stay as they are. A vector that
lacks one of its cells is generated as a whole, and only that cell is taken from it. Images and
dates are not filled, see cmvae generate. Blank rows are left out.

A command that was interrupted continues where it was if it is started again.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cmvae.commands.cluster import check_out
from cmvae.commands.launcher import add_launch_arguments, read_launch
from cmvae.commands.new_rows import is_table, load_modalities, note, open_rows, report_unknown
from cmvae.config import load_cmvae_run
from cmvae.datasets.table_rows import add_form_arguments
from cmvae.utils.arguments import command_parser, non_negative_integer, positive_integer
from cmvae.utils.errors import UserError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/mine")
    parser.add_argument("table", type=Path, help="a .csv, .tsv or .parquet file with column names")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.csv", help="the table to write")
    parser.add_argument(
        "--draws", type=positive_integer, default=20, metavar="N", help="generations per cell (default: 20)"
    )
    parser.add_argument("--seed", type=non_negative_integer, default=0, help="default: 0")
    parser.add_argument("--overwrite", action="store_true", help="replace the file --out")
    add_form_arguments(parser)
    add_launch_arguments(parser)
    return parser.parse_args()


def main() -> int:
    """Check, generate, write."""
    arguments = parse_arguments()
    launch = read_launch(arguments)
    config = load_cmvae_run(arguments.run)
    check_out(arguments.out, arguments.overwrite)
    if arguments.out.suffix.lower() not in (".csv", ".tsv"):
        raise UserError(f"--out {arguments.out}: the filled table is written as text. Name it .csv or .tsv")
    if not is_table(arguments.table):
        raise UserError(f"{arguments.table}: is not a table. Give the path of a .csv, .tsv or .parquet file")
    if launch:
        return launch.run("impute")
    rows = open_rows(arguments.run, arguments.table, arguments)

    from cmvae.commands.imputed_table import impute_to_file

    result = impute_to_file(
        arguments.run / "export",
        rows,
        arguments.out,
        num_draws=arguments.draws,
        seed=arguments.seed,
        batch_size=config.evaluation.batch_size,
    )
    if result is None:
        return 0
    modalities = load_modalities(arguments.run)
    report_unknown(result.unknown, modalities)
    for name, number in result.left.items():
        note(f"{name}: missing in {number:,} rows, and not imputed: images and dates are not written")
    total = sum(result.filled.values())
    print(f"{total:,} cells filled in {result.num_rows:,} rows: {arguments.out}")
    for column, number in result.filled.items():
        print(f"{column:>20}  {number:>8,}")
    return 0
