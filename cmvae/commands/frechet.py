"""Fréchet distance between two folders of images.

    cmvae frechet FOLDER OTHER                                        # FID, in the features of Inception-v3
    cmvae frechet FOLDER OTHER --classifier shards/digits --modality m0

With --classifier it is the same distance in the features of a data set's own classifier, which is
not FID.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cmvae.data.index import ShardIndex
from cmvae.utils.arguments import command_parser
from cmvae.utils.errors import UserError

if TYPE_CHECKING:
    import torch


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = command_parser(__doc__)
    for name in ("folder", "other"):
        parser.add_argument(
            name, type=Path, help="a folder of PNG or JPEG files, or a shard folder: its test images"
        )
    parser.add_argument("--modality", metavar="NAME", help="which images of a shard folder, which classifier")
    parser.add_argument(
        "--classifier",
        type=Path,
        metavar="SHARDS",
        help="shard folder whose classifier of --modality gives the features",
    )
    parser.add_argument(
        "--inception-weights",
        type=Path,
        metavar="PATH",
        help="torch-fidelity's weights of Inception-v3 (default: fetched over the network)",
    )
    return parser.parse_args()


def make_extractor(
    arguments: argparse.Namespace, device: torch.device
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The network that the flags ask for, as a function of images (B, C, H, W) in [0, 1]."""
    if arguments.classifier is None:
        from cmvae.evaluation.frechet import load_inception, to_bytes

        inception = load_inception(arguments.inception_weights, device)
        return lambda images: inception(to_bytes(images.to(device)))

    from cmvae.evaluation.classifiers import load_classifiers

    if arguments.modality is None:
        raise UserError("--classifier needs --modality NAME: a classifier is of one modality")
    index = ShardIndex.load(arguments.classifier)
    classifiers = load_classifiers(arguments.classifier, index, [arguments.modality], device)
    shape = index.modalities[arguments.modality].shape

    def extract(images: torch.Tensor) -> torch.Tensor:
        if images.shape[2:] != shape[1:]:
            raise UserError(
                f"pictures are {images.shape[2]}×{images.shape[3]}, but the classifier of "
                f"{arguments.modality} reads {shape[1]}×{shape[2]}. Resize the pictures, or leave "
                "--classifier out"
            )
        return classifiers[arguments.modality].classify(images[:, : shape[0]].to(device))[1]

    return extract


def main() -> int:
    """Print the distance."""
    arguments = parse_arguments()
    import torch

    from cmvae.evaluation.image_folder import folder_distance

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    extract = make_extractor(arguments, device)
    distance = folder_distance(arguments.folder, arguments.other, arguments.modality, extract)
    name = "FID" if arguments.classifier is None else "Fréchet distance in classifier features"
    print(f"{name}: {distance:.4f}")
    return 0
