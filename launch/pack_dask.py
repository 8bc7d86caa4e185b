"""Pack a data set on the workers of a Dask cluster, one part after the other on each.

    python launch/pack_dask.py tcp://scheduler:8786 64 table data.csv --out shards/mine --image photo
    cmvae pack join shards/mine --config configs/mine.yaml

The arguments are the address of the scheduler, the number of parts, and those of `cmvae pack`. All machines
need the same file system and the package. Start one worker with one thread per machine (`dask worker
ADDRESS --nworkers 1 --nthreads 1`), because each part uses all processors. If a machine is lost, another one
continues its part; so does the same command. Needs `pip install 'cmvae[dask]'`.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from cmvae.utils.arguments import command_parser, positive_integer
from cmvae.utils.errors import UserError
from cmvae.utils.process_exit import run_main


def pack_part(arguments: Sequence[str], part: str, folder: str) -> str:
    """Pack a part, on a worker.

    Returns:
        What went wrong; empty if nothing did.
    """
    command = [sys.executable, "-m", "cmvae.commands", "pack", *arguments, "--part", part]
    done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)  # noqa: S603
    return "" if done.returncode == 0 else f"part {part}: {done.stderr.strip()}"


def main() -> int:
    """Pack all parts."""
    parser = command_parser(__doc__)
    parser.add_argument("scheduler", metavar="ADDRESS", help="of the scheduler, such as tcp://host:8786")
    parser.add_argument("num_parts", type=positive_integer, metavar="PARTS", help="several per machine")
    parser.add_argument("pack", nargs=argparse.REMAINDER, metavar="…", help="arguments of cmvae pack")
    arguments = parser.parse_args()
    from distributed import Client, KilledWorker, as_completed

    total = arguments.num_parts
    try:
        with Client(arguments.scheduler) as client:
            futures = [
                client.submit(pack_part, arguments.pack, f"{number}/{total}", os.getcwd(), pure=False)
                for number in range(1, total + 1)
            ]
            for done, future in enumerate(as_completed(futures), start=1):
                problem = future.result()
                if problem:
                    raise UserError(problem)
                print(f"{done} of {total} parts are packed", flush=True)
    except (OSError, KilledWorker) as error:
        raise UserError(f"{arguments.scheduler}: {error}. Check the cluster, and run this again") from error
    return 0


if __name__ == "__main__":
    run_main(main)
