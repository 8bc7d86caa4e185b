"""PolyMNIST: five photographs with an MNIST digit of the same class in each.

Either built from MNIST and a folder of photographs, or read from the released folder of PNG files.
Source: Sutter, Daunhawer, Vogt, "Generalized Multimodal ELBO", ICLR 2021; the archive is the one of the
CMVAE paper.
"""

from __future__ import annotations

import argparse
import gzip
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from cmvae.data.index import SplitName
from cmvae.datasets.archive import add_download_arguments, download_and_unpack
from cmvae.datasets.base import SPLIT_NUMBERS, Sample, Source, random_stream
from cmvae.datasets.pairing import invert_under, pair_within_classes
from cmvae.modalities import ImageModality, Modality
from cmvae.utils.errors import UserError

DESCRIPTION = "PolyMNIST: MNIST digits over photographs, 60,000 samples of five modalities of 3×28×28"

RELEASE_URL = "https://polybox.ethz.ch/index.php/s/DvIsHiopIoPnKXI/download"
IMAGE_SIZE = 28
INK_THRESHOLD = 128
"""Pixels of MNIST above this are the digit."""
CLASS_NAMES = tuple(str(digit) for digit in range(10))

# First word of each random stream.
_SPLIT_STREAM, _PARTNER_STREAM, _CROP_STREAM = range(3)

_RELEASED_MEMBER = re.compile(r"(?:.*/)?PolyMNIST/(train|test)/(m\d+)/(\d+\.\d\.png)")
_RELEASED_NAME = re.compile(r"(\d+)\.(\d)\.png")
_PHOTOGRAPH_SUFFIXES = {".jpg", ".jpeg", ".png"}
_IDX_NAMES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `make_shards.py polymnist`."""
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument(
        "--backgrounds",
        type=Path,
        metavar="FOLDER",
        help="build the images: photographs whose sorted names give the modalities m0, m1, …",
    )
    origin.add_argument(
        "--released", type=Path, metavar="FOLDER", help="the released folder PolyMNIST/{train,test}/m{0..4}"
    )
    add_download_arguments(parser, origin, Path("data/polymnist"))
    parser.add_argument(
        "--mnist",
        type=Path,
        metavar="PATH",
        help="with --backgrounds: mnist.npz, or the folder of the four idx files, plain or .gz "
        "(default: torchvision's download into --cache)",
    )


def config_for(arguments: argparse.Namespace) -> Path:
    """As `SourceModule.config_for`."""
    return Path("configs/polymnist.yaml")


def from_arguments(arguments: argparse.Namespace) -> Source:
    """The source that the flags describe."""
    if arguments.backgrounds is not None:
        mnist_path = arguments.mnist if arguments.mnist is not None else download_mnist(arguments.cache)
        return PolyMNISTSource(read_mnist(mnist_path), arguments.backgrounds, arguments.seed)
    if arguments.mnist is not None:
        raise UserError(
            "--mnist: only goes with --backgrounds; the released images have their digits in them"
        )
    if arguments.download:
        return ReleasedPolyMNISTSource(download_release(arguments.cache), arguments.seed)
    return ReleasedPolyMNISTSource(arguments.released, arguments.seed)


@dataclass(frozen=True)
class MNIST:
    """MNIST as it is published."""

    x_train: np.ndarray
    """(60000, 28, 28) uint8."""
    y_train: np.ndarray
    """(60000,) class of each image."""
    x_test: np.ndarray
    """(10000, 28, 28) uint8."""
    y_test: np.ndarray
    """(10000,) class of each image."""
    origin: str
    """The file or folder, for people."""

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            images, labels = getattr(self, f"x_{part}"), getattr(self, f"y_{part}")
            if images.dtype != np.uint8 or images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
                raise UserError(
                    f"{self.origin}: x_{part}: {images.dtype} of shape {images.shape}, expected uint8 of "
                    f"shape (N, {IMAGE_SIZE}, {IMAGE_SIZE}). Fetch MNIST again"
                )
            if labels.shape != images.shape[:1] or not np.isin(labels, np.arange(10)).all():
                raise UserError(
                    f"{self.origin}: y_{part}: expected {len(images)} labels 0..9. Fetch MNIST again"
                )


class PolyMNISTSource:
    """MNIST digits on random crops of photographs, one photograph a modality.

    Args:
        mnist: the digits.
        backgrounds: folder of photographs.
        seed: seed of the split of the test images, the partners and the crops.

    Raises:
        UserError: the folder has no photographs, or one that cannot be read or is too small.
    """

    name = "polymnist"
    class_names = CLASS_NAMES

    def __init__(self, mnist: MNIST, backgrounds: Path, seed: int = 0) -> None:
        self.seed = seed
        self.photographs = _read_photographs(backgrounds)
        self.modalities = _image_modalities(len(self.photographs))
        self.settings: dict[str, str | int | float | bool | None] = {
            "source": "built from MNIST and photographs",
            "mnist": mnist.origin,
            "backgrounds": str(backgrounds),
        }
        self.images: dict[SplitName, np.ndarray] = {}
        """Of each split (N, 28, 28) uint8: the underlying digits."""
        self.labels: dict[SplitName, np.ndarray] = {}
        """Of each split (N,): the class of each underlying digit, and of the sample of the same number."""
        self.partners: dict[SplitName, np.ndarray] = {}
        """Of each split (M, N): the underlying digit of every modality and sample."""
        self._add_split("train", mnist.x_train, mnist.y_train)
        for split, chosen in _halve(len(mnist.x_test), seed).items():
            self._add_split(split, mnist.x_test[chosen], mnist.y_test[chosen])
        self.split_sizes = {split: len(labels) for split, labels in self.labels.items()}

    def sample(self, split: SplitName, index: int) -> Sample:
        """One digit a modality, all of one class, on a crop of the modality's photograph."""
        images = {}
        for modality, photograph in enumerate(self.photographs):
            rng = random_stream(self.seed, _CROP_STREAM, SPLIT_NUMBERS[split], modality, index)
            top = rng.integers(photograph.shape[0] - IMAGE_SIZE + 1)
            left = rng.integers(photograph.shape[1] - IMAGE_SIZE + 1)
            crop = photograph[top : top + IMAGE_SIZE, left : left + IMAGE_SIZE]
            digit = self.images[split][self.partners[split][modality, index]]
            images[f"m{modality}"] = invert_under(crop, digit > INK_THRESHOLD)
        return Sample(images, label=int(self.labels[split][index]))

    def _add_split(self, split: SplitName, images: np.ndarray, labels: np.ndarray) -> None:
        rng = random_stream(self.seed, _PARTNER_STREAM, SPLIT_NUMBERS[split])
        self.images[split] = images
        self.labels[split] = labels
        self.partners[split] = pair_within_classes(labels, len(self.photographs), rng)


class ReleasedPolyMNISTSource:
    """The released PNG files, `{train,test}/m{0..4}/{index}.{digit}.png`, paired by file name.

    Args:
        folder: the released folder `PolyMNIST`, or the one that holds it.
        seed: seed of the split of the test images into validation and test.

    Raises:
        UserError: the folder is no released PolyMNIST, or modalities lack images of each other.
    """

    name = "polymnist"
    class_names = CLASS_NAMES

    def __init__(self, folder: Path, seed: int = 0) -> None:
        root = next(
            (root for root in (folder, folder / "PolyMNIST") if (root / "train" / "m0").is_dir()), None
        )
        if root is None:
            raise UserError(
                f"{folder}: no released PolyMNIST: train/m0 is in neither it nor its folder PolyMNIST. "
                f"Fetch {RELEASE_URL}, unpack it, and give --released the folder PolyMNIST"
            )
        names = [path.name for path in root.joinpath("train").iterdir() if re.fullmatch(r"m\d+", path.name)]
        self.root = root
        self.modalities = _image_modalities(len(names))
        self.settings: dict[str, str | int | float | bool | None] = {
            "source": "released PNG files",
            "folder": str(folder),
        }
        train = self._list_names("train")
        test = self._list_names("test")
        self.files: dict[SplitName, list[str]] = {"train": train}
        """Of each split the file names, the same in every modality."""
        for split, chosen in _halve(len(test), seed).items():
            self.files[split] = [test[number] for number in chosen]
        self.split_sizes = {split: len(files) for split, files in self.files.items()}

    def sample(self, split: SplitName, index: int) -> Sample:
        """The images of one file name.

        Raises:
            UserError: a file is no 28×28 colour PNG.
        """
        name = self.files[split][index]
        folder = self.root / ("train" if split == "train" else "test")
        images = {modality: _read_released_image(folder / modality / name) for modality in self.modalities}
        return Sample(images, label=int(name.split(".")[1]))

    def _list_names(self, part: str) -> list[str]:
        """File names of one part, by number, after a check that all modalities have the same."""
        found: set[str] | None = None
        for modality in self.modalities:
            folder = self.root / part / modality
            if not folder.is_dir():
                raise UserError(f"{folder}: missing, though train has {len(self.modalities)} modalities")
            names = {path.name for path in folder.iterdir() if _RELEASED_NAME.fullmatch(path.name)}
            if found is not None and names != found:
                example = min(names ^ found)
                raise UserError(
                    f"{folder}: has other images than {self.root / part / 'm0'}, for example {example} is "
                    "in only one of them. Unpack the archive again"
                )
            found = names
        if not found:
            raise UserError(f"{self.root / part}: no images named INDEX.DIGIT.png. Unpack the archive again")
        return sorted(found, key=lambda name: int(name.split(".")[0]))


def read_mnist(path: Path) -> MNIST:
    """Read `mnist.npz` or a folder of the four idx files, plain or gzipped.

    Raises:
        UserError: a file is missing or damaged.
    """
    if path.is_dir():
        return MNIST(**{key: _read_idx(path, name) for key, name in _IDX_NAMES.items()}, origin=str(path))
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return MNIST(**{key: arrays[key] for key in _IDX_NAMES}, origin=str(path))
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: no such file. Give --mnist an mnist.npz or the folder of the four idx files"
        ) from error
    except (OSError, KeyError, ValueError, TypeError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path}: cannot be read as mnist.npz ({error}). It must hold {', '.join(_IDX_NAMES)}"
        ) from error


def download_mnist(cache: Path) -> Path:
    """Fetch MNIST with torchvision, unless it is in `cache` already.

    Returns:
        The folder of the idx files.

    Raises:
        UserError: there is no network; the message says what to put where.
    """
    # Slow to import, and needed for no other way to MNIST.
    import cmvae.utils.torchvision_shim  # noqa: F401, I001
    from torchvision import datasets

    try:
        datasets.MNIST(str(cache), download=True)
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"MNIST cannot be downloaded into {cache}: {str(error).strip()}. Fetch mnist.npz or the four idx "
            "files on a machine with a network and give their place as --mnist PATH"
        ) from error
    return cache / "MNIST" / "raw"


def download_release(cache: Path) -> Path:
    """Download and unpack the released archive, unless `cache` has it.

    Returns:
        The folder `PolyMNIST` in `cache`.

    Raises:
        UserError: the archive cannot be downloaded or is damaged.
    """
    return download_and_unpack(RELEASE_URL, cache / "PolyMNIST", _RELEASED_MEMBER)


def _halve(num_test: int, seed: int) -> Mapping[SplitName, np.ndarray]:
    """Numbers of the test images that become validation, and of those that stay test."""
    order = random_stream(seed, _SPLIT_STREAM).permutation(num_test)
    return {"validation": np.sort(order[: num_test // 2]), "test": np.sort(order[num_test // 2 :])}


def _image_modalities(count: int) -> dict[str, Modality]:
    modality = ImageModality(shape=(3, IMAGE_SIZE, IMAGE_SIZE))
    return {f"m{number}": modality for number in range(count)}


def _read_photographs(folder: Path) -> list[np.ndarray]:
    """Photographs in the order of their names, each (height, width, 3) uint8."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give --backgrounds a folder of photographs")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _PHOTOGRAPH_SUFFIXES)
    if not paths:
        raise UserError(f"{folder}: no .jpg, .jpeg or .png in it. Give --backgrounds a folder of photographs")
    photographs = []
    for path in paths:
        try:
            with Image.open(path, formats=["JPEG", "PNG"]) as image:
                photograph = np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError) as error:
            raise UserError(f"{path}: cannot be read as a photograph: {error}. Replace it") from error
        if min(photograph.shape[:2]) < IMAGE_SIZE:
            raise UserError(f"{path}: smaller than {IMAGE_SIZE}×{IMAGE_SIZE} pixels. Use a larger one")
        photographs.append(photograph)
    return photographs


def _read_released_image(path: Path) -> np.ndarray:
    """A released PNG as (3, 28, 28) uint8."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            size, mode = image.size, image.mode
            if mode == "RGB" and size == (IMAGE_SIZE, IMAGE_SIZE):
                return np.asarray(image).transpose(2, 0, 1)
    except (OSError, SyntaxError, UnidentifiedImageError) as error:
        raise UserError(f"{path}: cannot be read as PNG: {error}. Unpack the archive again") from error
    raise UserError(
        f"{path}: a {mode} image of {size[0]}×{size[1]}, expected RGB of {IMAGE_SIZE}×{IMAGE_SIZE}"
    )


def _read_idx(folder: Path, name: str) -> np.ndarray:
    """An idx file of bytes, the format MNIST is published in: two zeros, type, rank, sizes, values."""
    plain, gzipped = folder / name, folder / f"{name}.gz"
    path = plain if plain.is_file() else gzipped
    try:
        content = plain.read_bytes() if plain.is_file() else gzip.decompress(gzipped.read_bytes())
        rank = content[3]
        shape = np.frombuffer(content, dtype=">i4", count=rank, offset=4)
        return np.frombuffer(content, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: neither {name} nor {name}.gz is in it. MNIST is four files: "
            f"{', '.join(_IDX_NAMES.values())}"
        ) from error
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"{path}: no complete idx file ({error}). Fetch MNIST again") from error
