"""CUBICC: photographs of birds with captions written by people; subspecies are grouped into species.

Source: Palumbo, Manduchi, Laguna, Chopard, Vogt, "Deep Generative Clustering with Multimodal Diffusion
Variational Autoencoders", ICLR 2024, from CUB-200-2011 (Wah et al., 2011) and the captions of Reed et al.,
CVPR 2016. A sample is a photograph with one of its ten captions; all ten are in the same split.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cmvae.data.index import SplitName
from cmvae.datasets.archive import add_download_arguments, download_and_unpack
from cmvae.datasets.base import random_stream
from cmvae.datasets.boxes import square_around
from cmvae.datasets.columns import (
    ArrayColumn,
    ArrayImageColumn,
    BoxedFile,
    Column,
    ColumnSource,
    ImageColumn,
    ImageFile,
    TextColumn,
    fit_image,
    fit_text,
)
from cmvae.datasets.embedding import add_embed_arguments
from cmvae.datasets.splits import Splits, draw_splits, fractions, fractions_text
from cmvae.datasets.user_data import add_config_argument
from cmvae.modalities import ImageModality, TextModality
from cmvae.modalities.text import EOS, PAD, SPECIAL_TOKENS, UNKNOWN
from cmvae.utils.errors import UserError

DESCRIPTION = "birds with captions: the released CUBICC, CUB-200-2011 with its captions, or cub_mini64"

RELEASE_URL = "https://polybox.ethz.ch/index.php/s/LRkTC2oa6YHHlUj/download"
IMAGE_SIZE = 64
CAPTION_LENGTH, MIN_COUNT = 32, 3
"""As published."""

SPECIES = {
    "Blackbird": ("Rusty_Blackbird", "Brewer_Blackbird", "Red_winged_Blackbird"),
    "Gull": ("Western_Gull", "California_Gull", "Herring_Gull"),
    "Jay": ("Blue_Jay", "Florida_Jay"),
    "Oriole": ("Scott_Oriole", "Hooded_Oriole", "Baltimore_Oriole"),
    "Tanager": ("Scarlet_Tanager", "Summer_Tanager"),
    "Tern": ("Elegant_Tern", "Artic_Tern", "Caspian_Tern"),
    "Warbler": ("Pine_Warbler", "Kentucky_Warbler", "Yellow_Warbler"),
    "Wren": ("House_Wren", "Marsh_Wren", "Carolina_Wren"),
}
"""The subspecies of each species of CUBICC, spelt as in the folders of CUB-200-2011."""
FAMILIES = {
    "Albatross": ("Black_footed_Albatross", "Laysan_Albatross", "Sooty_Albatross"),
    "Auklet": ("Crested_Auklet", "Least_Auklet", "Parakeet_Auklet", "Rhinoceros_Auklet"),
    "Blackbird_and_Grackle": ("Brewer_Blackbird", "Red_winged_Blackbird", "Boat_tailed_Grackle"),
    "Cuckoo_and_Ani": ("Groove_billed_Ani", "Black_billed_Cuckoo", "Yellow_billed_Cuckoo"),
    "Finch": ("Gray_crowned_Rosy_Finch", "Purple_Finch"),
    "Flycatcher": ("Acadian_Flycatcher", "Great_Crested_Flycatcher", "Yellow_bellied_Flycatcher"),
}
"""The same for cub_mini64. Its four single subspecies, bunting, cormorant, crow and flicker, are left out:
each would be a class of one subspecies, a third as large as the others."""

_MINI_FRAMES = ((500, 375), (375, 500), (502, 502))
"""Sizes that an original of cub_mini64 may have, as (width, height); some boxes end a pixel outside."""

_SPLIT_STREAM = 0
_SPLIT_FILES: dict[SplitName, str] = {
    "train": "train_split.npy",
    "validation": "validation_split.npy",
    "test": "test_split.npy",
}
_RELEASED_FILES = ("images.pt", "captions.pt", "labels.pt", "original_labels.pt", "cub.vocab")
_RELEASED_MEMBER = re.compile(
    r"(?:.*/)?((?:images|captions|labels|original_labels)\.pt|(?:train|validation|test)_split\.npy|cub\.vocab)"
)
# Names of the special tokens in the released vocabulary; its other names are words.
_RELEASED_TOKENS = {"<pad>": PAD, "<eos>": EOS, "<exc>": UNKNOWN, "<unk>": UNKNOWN}
_CHUNK = 512
"""Number of samples that are converted at once: one-hot vectors of all captions take gigabytes."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `cmvae pack cubicc`."""
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument(
        "--released", type=Path, metavar="FOLDER", help="the released folder: images.pt, captions.pt, …"
    )
    add_download_arguments(parser, origin, Path("data/cubicc"))
    origin.add_argument(
        "--cub",
        type=Path,
        metavar="FOLDER",
        help="CUB_200_2011, with images/CLASS/*.jpg, and captions in text/, text_c10/ or --captions",
    )
    origin.add_argument(
        "--mini", type=Path, metavar="FOLDER", help="cub_mini64: images.npz and captions.json"
    )
    parser.add_argument(
        "--captions",
        type=Path,
        metavar="FOLDER",
        help="with --cub: folder with CLASS/*.txt, one file per image, one caption per line (default: in the "
        "folder of --cub)",
    )
    parser.add_argument(
        "--crop",
        action="store_true",
        help="with --cub or --mini: the square around the bird instead of the whole photograph",
    )
    parser.add_argument(
        "--fractions",
        type=fractions,
        default=(0.7, 0.15, 0.15),
        metavar="TRAIN,VALIDATION,TEST",
        help="shares of the splits in every subspecies; the release has its own splits "
        "(default: 0.7,0.15,0.15)",
    )
    add_config_argument(parser)
    add_embed_arguments(parser)


def config_for(arguments: argparse.Namespace) -> Path | None:
    """The experiment configs/cubicc.yaml, or configs/cubicc_cpu.yaml for cub_mini64.

    None with --config or --embed, for a starter config.
    """
    if arguments.config is not None or arguments.embed:
        return None
    return Path("configs/cubicc.yaml" if arguments.mini is None else "configs/cubicc_cpu.yaml")


def from_arguments(arguments: argparse.Namespace) -> ColumnSource:
    """Open the source that the flags describe.

    Raises:
        UserError: files are missing or damaged, or cannot be downloaded.
    """
    if arguments.captions is not None and arguments.cub is None:
        raise UserError(
            "--captions: can only be used with --cub; the other sources contain captions. Remove it"
        )
    if arguments.mini is not None:
        return open_mini(arguments.mini, arguments.fractions, arguments.seed, crop=arguments.crop)
    if arguments.cub is not None:
        return open_cub(
            arguments.cub, arguments.captions, arguments.fractions, arguments.seed, crop=arguments.crop
        )
    if arguments.crop:
        raise UserError("--crop: the release has no bounding boxes. Remove it, or pack CUB-200-2011 by --cub")
    folder = download_release(arguments.cache) if arguments.download else arguments.released
    return open_release(folder, arguments.fractions, arguments.seed)


def open_mini(
    folder: Path, shares: tuple[float, float, float], seed: int, *, crop: bool = False
) -> ColumnSource:
    """Open cub_mini64, grouped into families, without its four single subspecies.

    Args:
        folder: folder of images.npz and captions.json.
        shares: shares of the splits in the images of every subspecies.
        seed: seed of the splits.
        crop: crop the photographs to the birds.

    Raises:
        UserError: a file is missing or damaged.
    """
    path = folder / "captions.json"
    texts = _read_json(path)
    try:
        with np.load(folder / "images.npz", allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
            boxes = arrays["bbox"] if crop else None
        classes, files, captions = texts["classes"], texts["files"], texts["captions"]
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{folder}: cannot be read as cub_mini64 ({error}). Give a folder with images.npz (images, "
            "labels, bbox) and captions.json (classes, files, captions)"
        ) from error
    if not len(images) == len(labels) == len(files) == len(captions):
        raise UserError(f"{folder}: the numbers of images, labels, files and captions differ. Copy it again")
    subspecies = [_strip_number(classes[label]) for label in labels.tolist()]
    kept = [number for number, name in enumerate(subspecies) if _group_of(name, FAMILIES) is not None]
    rows = _CaptionRows([captions[number] for number in kept])
    images = images[kept] if boxes is None else _crop_frames(images[kept], boxes[kept])
    pixels = list(images.transpose(0, 3, 1, 2))
    of_row = [pixels[image] for image in rows.image_of_row.tolist()]
    return rows.source(
        ArrayImageColumn(of_row, rows.texts, ImageModality(shape=pixels[0].shape)),
        [subspecies[number] for number in kept],
        [Path(files[number]).stem for number in kept],
        FAMILIES,
        shares,
        seed,
        {"source": "cub_mini64", "folder": str(folder), "crop": crop, "left_out": len(files) - len(kept)},
    )


def open_cub(
    folder: Path,
    captions: Path | None,
    shares: tuple[float, float, float],
    seed: int,
    *,
    crop: bool = False,
) -> ColumnSource:
    """Open the subspecies of CUBICC in CUB-200-2011.

    Args:
        folder: `CUB_200_2011` or its parent, with `images/NUMBER.CLASS/NAME.jpg`.
        captions: folder with `NUMBER.CLASS/NAME.txt`; None searches for it in `folder`.
        shares: shares of the splits in the images of every subspecies.
        seed: seed of the splits.
        crop: crop the photographs to the birds, by images.txt and bounding_boxes.txt.

    Raises:
        UserError: folders, captions or boxes are missing.
    """
    root = folder / "CUB_200_2011" if (folder / "CUB_200_2011").is_dir() else folder
    if captions is None:
        places = [base / name for base in (root, folder) for name in ("text", "text_c10")]
        captions = next((place for place in places if place.is_dir()), None)
        if captions is None:
            raise UserError(
                f"{root}: has neither text/ nor text_c10/ with captions. Download them (Reed et al., 2016, "
                "cvpr2016_cub), and give their folder as --captions"
            )
    classes = sorted(
        path
        for path in (root / "images").glob("*")
        if path.is_dir() and _group_of(_strip_number(path.name), SPECIES) is not None
    )
    found = {_strip_number(path.name) for path in classes}
    lacking = [name for members in SPECIES.values() for name in members if name not in found]
    if lacking:
        raise UserError(
            f"{root / 'images'}: no folder NUMBER.{lacking[0]}, and {len(lacking) - 1} more of the 22 of "
            "CUBICC are missing. Give the folder of CUB-200-2011 that contains images/"
        )
    paths = [path for folder in classes for path in sorted(folder.glob("*.jpg"))]
    rows = _CaptionRows([_read_captions(captions / path.parent.name / f"{path.stem}.txt") for path in paths])
    files: Sequence[ImageFile] = paths
    if crop:
        files = [BoxedFile(path, box) for path, box in zip(paths, _read_boxes(root, paths), strict=True)]
    of_row = [files[image] for image in rows.image_of_row.tolist()]
    return rows.source(
        ImageColumn(of_row, [str(file) for file in of_row], fit_image(of_row, IMAGE_SIZE)),
        [_strip_number(path.parent.name) for path in paths],
        [path.stem for path in paths],
        SPECIES,
        shares,
        seed,
        {"source": "CUB-200-2011", "folder": str(root), "captions": str(captions), "crop": crop},
    )


def open_release(folder: Path, shares: tuple[float, float, float], seed: int) -> ColumnSource:
    """Open the released folder, with the released splits unless a photograph is in two of them.

    Args:
        folder: folder of images.pt, captions.pt, labels.pt, original_labels.pt, *_split.npy and cub.vocab.
        shares: shares of the splits in the images of every subspecies, if the splits are drawn.
        seed: seed of the splits, if they are drawn.

    Raises:
        UserError: a file is missing or damaged, or has other contents than expected.
    """
    for name in (*_RELEASED_FILES, *_SPLIT_FILES.values()):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing. Give the released folder, or use --download")
    images = _read_released_images(folder / "images.pt")
    labels, subspecies = (
        np.asarray(_load_tensor(folder / name)).reshape(-1).astype(np.int64)
        for name in ("labels.pt", "original_labels.pt")
    )
    tokens, vocabulary = _read_released_captions(folder)
    if not len(images) == len(labels) == len(subspecies) == len(tokens):
        raise UserError(f"{folder}: the numbers of images, captions and labels differ. Download it again")
    # The ten pairs of a photograph have the same pixels.
    first_row, image_of_row = np.unique(
        images.reshape(len(images), -1), axis=0, return_index=True, return_inverse=True
    )[1:]
    image_of_row = image_of_row.reshape(-1)
    splits = _read_released_splits(folder, len(labels))
    if _is_shared(image_of_row, splits):
        print(
            "note: photographs are in two of the released splits; the data is split again by photograph",
            file=sys.stderr,
        )
        splits = draw_splits(image_of_row, shares, random_stream(seed, _SPLIT_STREAM), labels=subspecies)
    classes = np.unique(labels)
    return ColumnSource(
        name="cubicc",
        columns={
            "image": ArrayColumn(images, None, ImageModality(shape=images.shape[1:])),
            "caption": ArrayColumn(tokens, None, TextModality(shape=tokens.shape[1:], categories=vocabulary)),
        },
        splits=splits,
        labels=np.searchsorted(classes, labels),
        # The folder does not say which species has which number.
        class_names=tuple(f"species {label}" for label in classes.tolist()),
        keys=[f"pair-{row:05d}" for row in range(len(labels))],
        settings={"source": "released CUBICC", "folder": str(folder)},
        # The folder has no names of photographs: each is named after its first pair.
        groups=[f"photo-{row:05d}" for row in first_row[image_of_row].tolist()],
    )


def download_release(cache: Path) -> Path:
    """Download and unpack the released archive, unless `cache` has it.

    Returns:
        The folder `CUBICC` in `cache`.

    Raises:
        UserError: the archive cannot be downloaded or is damaged.
    """
    return download_and_unpack(RELEASE_URL, cache / "CUBICC", _RELEASED_MEMBER)


class _CaptionRows:
    """One row per caption.

    Args:
        captions: captions of each image.
    """

    def __init__(self, captions: Sequence[Sequence[str]]) -> None:
        self.texts = [caption for of_image in captions for caption in of_image]
        counts = [len(of_image) for of_image in captions]
        self.image_of_row = np.repeat(np.arange(len(captions)), counts)
        self._number_of_row = np.concatenate([np.arange(count) for count in counts])

    def source(
        self,
        images: Column,
        subspecies: Sequence[str],
        stems: Sequence[str],
        groups: Mapping[str, Sequence[str]],
        shares: tuple[float, float, float],
        seed: int,
        settings: Mapping[str, str | int | float | bool | None],
    ) -> ColumnSource:
        """Make the source: split by image, stratified by subspecies, and labelled by group."""
        class_names = tuple(groups)
        labels = np.array([class_names.index(str(_group_of(name, groups))) for name in subspecies])
        numbers = np.unique(np.array(subspecies), return_inverse=True)[1]
        rng = random_stream(seed, _SPLIT_STREAM)
        splits = draw_splits(self.image_of_row, shares, rng, labels=numbers[self.image_of_row])
        captions = TextColumn(self.texts, fit_text(self.texts, splits["train"], MIN_COUNT, CAPTION_LENGTH))
        return ColumnSource(
            name="cubicc",
            columns={"image": images, "caption": captions},
            splits=splits,
            labels=labels[self.image_of_row],
            class_names=class_names,
            keys=[
                f"{stems[image]}-{number}"
                for image, number in zip(
                    self.image_of_row.tolist(), self._number_of_row.tolist(), strict=True
                )
            ],
            settings={**settings, "fractions": fractions_text(shares)},
            groups=[stems[image] for image in self.image_of_row.tolist()],
        )


def _strip_number(folder_name: str) -> str:
    """`009.Brewer_Blackbird` without its number."""
    return folder_name.partition(".")[2] or folder_name


def _group_of(subspecies: str, groups: Mapping[str, Sequence[str]]) -> str | None:
    return next((name for name, members in groups.items() if subspecies in members), None)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Give the folder that contains it") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}). Copy it again") from error


def _read_boxes(root: Path, photographs: Sequence[Path]) -> list[tuple[float, ...]]:
    """Left, top, width and height of the bird in each photograph, in pixels."""
    names, boxes = (
        dict(line.split(maxsplit=1) for line in _read_lines(root / file))
        for file in ("images.txt", "bounding_boxes.txt")
    )
    try:
        box_of = {name: tuple(map(float, boxes[number].split())) for number, name in names.items()}
        found = [box_of[f"{path.parent.name}/{path.name}"] for path in photographs]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{root}: images.txt and bounding_boxes.txt do not give a box for each photograph ({error}). "
            "Unpack CUB-200-2011 again, or omit --crop"
        ) from error
    if any(len(box) != 4 or min(box[2:]) <= 0 for box in found):
        raise UserError(
            f"{root / 'bounding_boxes.txt'}: a line is not NUMBER LEFT TOP WIDTH HEIGHT. Unpack CUB-200-2011 "
            "again, or omit --crop"
        )
    return found


def _read_lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({error}). Unpack CUB-200-2011 again, or omit --crop"
        ) from error


def _crop_frames(images: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """Crop whole frames, squeezed to 64 × 64 pixels, to the birds.

    Boxes are in pixels of the originals, whose sizes cub_mini64 does not have. Most photographs of
    CUB-200-2011 are 500 × 375 pixels; one that its box does not fit is taken as upright, or as a square.

    Args:
        images: (N, 64, 64, 3) uint8.
        boxes: (N, 4) left, top, width and height.
    """
    cropped = np.empty_like(images)
    for row, (image, box) in enumerate(zip(images, boxes.tolist(), strict=True)):
        frame = next(
            frame for frame in _MINI_FRAMES if box[0] + box[2] <= frame[0] and box[1] + box[3] <= frame[1]
        )
        scale = image.shape[1] / frame[0], image.shape[0] / frame[1]
        left, top, right, bottom = square_around(box, frame)
        square = left * scale[0], top * scale[1], right * scale[0], bottom * scale[1]
        pixels = Image.fromarray(image).resize(image.shape[1::-1], Image.Resampling.BICUBIC, square)
        cropped[row] = np.asarray(pixels)
    return cropped


def _read_captions(path: Path) -> list[str]:
    """The captions of one image, one per line."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read: {error}. Give the folder of the captions as --captions"
        ) from error
    captions = [line for line in lines if line]
    if not captions:
        raise UserError(f"{path}: has no caption. Give the folder of the captions as --captions")
    return captions


def _load_tensor(path: Path) -> Any:
    """Load a tensor, memory-mapped if possible; pickled code in the file is not run."""
    import torch

    try:
        try:
            tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # a file from before torch 1.6 cannot be mapped
            tensor = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what its unpickler raises
        message = str(error).partition("\n")[0]
        raise UserError(f"{path}: cannot be read as a tensor ({message}). Download it again") from error
    if not isinstance(tensor, torch.Tensor):
        raise UserError(f"{path}: contains {type(tensor).__name__}, expected a tensor. Download it again")
    return tensor


def _read_released_images(path: Path) -> np.ndarray:
    """(N, 3, 64, 64) uint8."""
    tensor = _load_tensor(path)
    if tensor.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise UserError(
            f"{path}: has shape {tuple(tensor.shape)}, expected (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE}). Download "
            "it again"
        )
    if not tensor.is_floating_point():
        return tensor.numpy().astype(np.uint8)
    images = np.empty(tensor.shape, dtype=np.uint8)
    for start in range(0, len(images), _CHUNK):
        part = tensor[start : start + _CHUNK].float().numpy()
        if not (part.min() >= 0 and part.max() <= 1):
            raise UserError(
                f"{path}: values from {part.min():g} to {part.max():g}, expected 0 to 1. Download it again"
            )
        images[start : start + _CHUNK] = (part * 255).round()
    return images


def _read_released_captions(folder: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Tokens (N, 32) int64, and the vocabulary, which begins with the special tokens."""
    path = folder / "cub.vocab"
    try:
        words = _read_json(path)["i2w"]
        names = [_RELEASED_TOKENS.get(words[str(place)], words[str(place)]) for place in range(len(words))]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: has no i2w from 0, 1, … to words. Download it again") from error
    one_hot = _load_tensor(folder / "captions.pt")
    if one_hot.ndim != 3 or one_hot.shape[2] != len(names):
        raise UserError(
            f"{folder / 'captions.pt'}: has shape {tuple(one_hot.shape)}, expected (N, length, {len(names)}) "
            "for the words of cub.vocab. Download it again"
        )
    vocabulary = (*SPECIAL_TOKENS, *(name for name in names if name not in SPECIAL_TOKENS))
    places = {name: place for place, name in enumerate(vocabulary)}
    place_of = np.array([places[name] for name in names], dtype=np.int64)
    tokens = np.empty(tuple(one_hot.shape[:2]), dtype=np.int64)
    for start in range(0, len(tokens), _CHUNK):
        tokens[start : start + _CHUNK] = place_of[one_hot[start : start + _CHUNK].argmax(-1).numpy()]
    return tokens, vocabulary


def _read_released_splits(folder: Path, number: int) -> Splits:
    splits: Splits = {}
    for split, name in _SPLIT_FILES.items():
        path = folder / name
        try:
            rows = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{path}: cannot be read as a NumPy array ({error}). Download it again"
            ) from error
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer) or len(rows) == 0:
            raise UserError(
                f"{path}: {rows.dtype} of shape {rows.shape}, expected indices of pairs. Download it again"
            )
        if rows.min() < 0 or rows.max() >= number:
            raise UserError(
                f"{path}: indices {rows.min()} to {rows.max()}, but there are {number} pairs. Download "
                "it again"
            )
        splits[split] = np.sort(rows.astype(np.int64))
    return splits


def _is_shared(groups: np.ndarray, splits: Splits) -> bool:
    """Whether a group is in more than one split."""
    found = [set(groups[rows].tolist()) for rows in splits.values()]
    return len(set.union(*found)) < sum(map(len, found))
