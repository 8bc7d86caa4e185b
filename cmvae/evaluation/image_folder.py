"""Images in folders, for distances between sets of images from any source."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cmvae.data.index import INDEX_NAME
from cmvae.data.reader import EvaluationLoader
from cmvae.evaluation.frechet import FrechetDistance, refusal, warn_if_few
from cmvae.utils.errors import UserError

_SUFFIXES = {".png", ".jpg", ".jpeg"}
MAX_PIXELS = 1 << 22
"""Largest image: a file of a few kilobytes may decode to gigabytes."""
_BATCH_SIZE = 64


def folder_distance(
    first: Path, second: Path, modality: str | None, extract: Callable[[Tensor], Tensor]
) -> float:
    """Fréchet distance between two sets of images, in the features of `extract`.

    Args:
        first: a folder of PNG or JPEG files of one size, or a shard folder, whose test split is used.
        second: the same.
        modality: modality of a shard folder; None if both are folders of images.
        extract: images (B, 3 or 1, H, W) in [0, 1] → features (B, F).

    Raises:
        UserError: a folder has too few images, or one that cannot be read or differs in size.
    """
    features = [_extract_all(folder, modality, extract) for folder in (first, second)]
    for folder, values in zip((first, second), features, strict=True):
        reason = refusal(*values.shape)
        if reason is not None:
            raise UserError(f"{folder}: {reason}. Give a folder with more images")
        warn_if_few(str(folder), *values.shape)
    return FrechetDistance(features[0]).to(features[1])


def read_images(folder: Path) -> Iterator[np.ndarray]:
    """Read the PNG and JPEG files of a folder in the order of their names, (H, W, 3) uint8, all of one size.

    Raises:
        UserError: the folder is missing or has no images; an image is damaged, too large, or differs in size
            from the first.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give a folder of PNG or JPEG files, or a shard folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise UserError(f"{folder}: holds no {', '.join(sorted(_SUFFIXES))} files. Give another folder")
    size = None
    for path in paths:
        image = _read_image(path)
        size = size or image.shape
        if image.shape != size:
            raise UserError(
                f"{path}: is {image.shape[0]}×{image.shape[1]}, but the first image of its folder is "
                f"{size[0]}×{size[1]}. Resize all images to one size"
            )
        yield image


def _read_image(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=["PNG", "JPEG"]) as image:
            # Only the header has been read so far.
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{path}: has more than {MAX_PIXELS:,} pixels ({image.width}×{image.height}). Resize it"
                )
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise UserError(
            f"{path}: cannot be decoded as PNG or JPEG ({error}). Remove or replace it"
        ) from error


def _extract_all(folder: Path, modality: str | None, extract: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Features (N, F) of all images of a folder, or of the test split of a shard folder."""
    is_shards = (folder / INDEX_NAME).is_file()
    batches = _shard_batches(folder, modality) if is_shards else _folder_batches(folder)
    with torch.no_grad():
        features = [extract(images.float() / 255).cpu().numpy() for images in batches]
    return np.concatenate(features)


def _shard_batches(folder: Path, modality: str | None) -> Iterator[Tensor]:
    if modality is None:
        raise UserError(f"{folder}: is a shard folder. Choose a modality of images: --modality NAME")
    loader = EvaluationLoader(folder, split="test", modalities=[modality], batch_size=_BATCH_SIZE)
    for batch in loader:
        yield batch[modality][batch["valid"]]


def _folder_batches(folder: Path) -> Iterator[Tensor]:
    images = read_images(folder)
    while batch := list(islice(images, _BATCH_SIZE)):
        yield torch.from_numpy(np.stack(batch).transpose(0, 3, 1, 2))
