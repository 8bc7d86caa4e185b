"""Train the image classifiers that evaluation reads generated images with, one per modality.

    cmvae classifiers shards/digits

Once per packed data set: they are trained on its labelled train split and saved beside the shards,
in classifiers/. Coherence and the distances in classifier features need them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from cmvae.data.index import ShardIndex
from cmvae.data.remote import is_remote
from cmvae.utils.arguments import command_parser, non_negative_integer, positive_integer
from cmvae.utils.errors import UserError


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    parser.add_argument("folder", help="what `cmvae pack` wrote, for example shards/digits")
    parser.add_argument(
        "--epochs", type=positive_integer, metavar="N", help="default: about 30,000 images, at least 5 epochs"
    )
    parser.add_argument(
        "--width",
        type=positive_integer,
        default=16,
        metavar="N",
        help="channels of the first convolution (default: 16)",
    )
    parser.add_argument("--seed", type=non_negative_integer, default=0, help="default: 0")
    return parser.parse_args()


def main() -> int:
    """Train, and print the accuracy of each classifier."""
    arguments = parse_arguments()
    started = time.perf_counter()
    # A wrong folder is reported before the slow imports.
    if is_remote(arguments.folder):
        raise UserError(
            f"{arguments.folder}: classifiers are kept with the data. Train them on the folder that it "
            "is a copy of, and copy its classifiers/ and index.json there, too"
        )
    ShardIndex.load(arguments.folder)

    import torch

    from cmvae.evaluation.classifiers import GOOD_ACCURACY, MIN_ACCURACY, train_classifiers
    from cmvae.utils.progress import progress_bar

    with progress_bar(unit=" steps") as bar:

        def report(modality: str, total: int, step: int) -> None:
            if step == 1:
                bar.set_description(modality)
                bar.reset(total)
            bar.update()

        classifiers = train_classifiers(
            Path(arguments.folder),
            device=torch.accelerator.current_accelerator() or torch.device("cpu"),
            width=arguments.width,
            epochs=arguments.epochs,
            seed=arguments.seed,
            report=report,
        )
    print(f"{'modality':<12}{'accuracy on test':>18}")
    for modality, classifier in classifiers.items():
        remark = ""
        if classifier.accuracy < MIN_ACCURACY:
            remark = f"  below {MIN_ACCURACY:.0%}: evaluation will refuse it; try more --epochs or --width"
        elif classifier.accuracy < GOOD_ACCURACY:
            remark = f"  below {GOOD_ACCURACY:.0%}: coherence is at most about that"
        print(f"{modality:<12}{classifier.accuracy:>18.1%}{remark}")
    print(f"{len(classifiers)} classifiers in {time.perf_counter() - started:.1f} s")
    return 0
