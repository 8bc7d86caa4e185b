"""Train what coherence and distances are read with: python tools/train_classifiers.py shards/NAME."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from cmvae.data.index import ShardIndex
from cmvae.data.remote import is_remote
from cmvae.utils.arguments import non_negative_integer, positive_integer
from cmvae.utils.errors import UserError


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train one small image classifier a modality on the labelled train split, once per "
        "packed data set, and save them beside the shards. Evaluation reads generated images with them."
    )
    parser.add_argument("folder", help="what tools/make_shards.py wrote, for example shards/digits")
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
    return parser.parse_args(arguments)


def main() -> int:
    """Train, and print what each classifier is worth."""
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
