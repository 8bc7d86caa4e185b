"""Generate with a trained run, to files.

    cmvae generate runs/digits --num 64                     # from the prior
    cmvae generate runs/digits --cluster all --num 8        # 8 samples per cluster
    cmvae generate runs/digits --given m0 --to m1,m2        # from one modality of packed samples

w always comes from its prior. The run of a refiner generates with its CMVAE and refines. Starts
from the export of the run and writes to runs/NAME/generated/ (or --out): MODALITY/NAME.png for
images, MODALITY.csv for other modalities (name, then text or numbers in the data's own units),
grid.png with the first samples and generation.json. Samples that have none of the given modalities
are left out. Several ranks (--launch ddp --num-processes N) share the samples; the files are the
same. A command that was interrupted continues where it was if it is started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from cmvae.commands.launcher import add_launch_arguments, read_launch
from cmvae.config import load_run_config, read_modalities
from cmvae.data.index import ShardIndex
from cmvae.utils.arguments import comma_separated, command_parser, positive_integer
from cmvae.utils.errors import UserError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    parser.add_argument("run", type=Path, help="folder of the run, e.g. runs/digits")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, e.g. refiner.sampler.num_steps=50"
    )
    parser.add_argument(
        "--num", type=positive_integer, default=64, metavar="N", help="samples, of each cluster (default: 64)"
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--cluster", type=_cluster, metavar="C", help="of cluster C, or of all one by one")
    source.add_argument(
        "--given", type=comma_separated, metavar="MODALITY,…", help="from these, of the first samples"
    )
    parser.add_argument("--split", metavar="SPLIT", help="split of the samples for --given (default: test)")
    parser.add_argument(
        "--to", type=comma_separated, metavar="MODALITY,…", help="what to write (default: all)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: generated in the run's folder")
    parser.add_argument("--overwrite", action="store_true", help="replace earlier generations in --out")
    add_launch_arguments(parser)
    arguments = parser.parse_intermixed_args()
    if arguments.split is not None and arguments.given is None:
        parser.error("--split: only samples for --given are read from a split")
    return arguments


def _cluster(text: str) -> int | Literal["all"]:
    if text == "all":
        return "all"
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a cluster nor all")
    return int(text)


def check_names(flag: str, names: Sequence[str], modalities: Sequence[str]) -> None:
    """Refuse names that are no modalities of the run.

    Raises:
        UserError: there is one.
    """
    for name in names:
        if name not in modalities:
            raise UserError(f"{flag} {name}: the run has no such modality; it has {', '.join(modalities)}")


def main() -> int:
    """Check, generate, say where it is."""
    arguments = parse_arguments()
    launch = read_launch(arguments)
    config = load_run_config(arguments.run, arguments.overrides)
    modalities = read_modalities(config)
    targets = arguments.to or modalities
    split = arguments.split or "test"
    check_names("--to", targets, modalities)
    if arguments.given is not None:
        check_names("--given", arguments.given, modalities)
        ShardIndex.load(config.data.shards).split(split, config.data.shards)

    if launch:
        return launch.run("generate")

    from cmvae.commands.generated_files import GenerationRequest, run_generation

    out = arguments.out or arguments.run / "generated"
    request = GenerationRequest(
        num_samples=arguments.num,
        cluster=arguments.cluster,
        given=arguments.given,
        split=split,
        targets=targets,
        seed=arguments.seed,
    )
    num_samples = run_generation(config, arguments.run, request, out, arguments.overwrite)
    if num_samples is not None:
        print(f"{num_samples} samples of {', '.join(targets)}: {out}")
    return 0
