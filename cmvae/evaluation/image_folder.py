"""Pictures in a folder, for distances between sets that no model here made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
# A picture of a few kilobytes may unfold to gigabytes; nothing that a model here makes is near so large.
_MAX_PIXELS = 1 << 22
_BATCH_SIZE = 64


def folder_distance(
    first: Path, second: Path, modality: str | None, extract: Callable[[Tensor], Tensor]
) -> float:
    """Fréchet distance between two sets of pictures, in the features of `extract`.

    Args:
        first: a folder of PNG or JPEG files of one size, or a shard folder, whose test split is meant.
        second: the same.
        modality: which modality of a shard folder; None where both are folders of pictures.
        extract: images (B, 3 or 1, H, W) in [0, 1] to features (B, F).

    Raises:
        UserError: a folder has no or too few pictures, or one that cannot be read or has another size.
    """
    features = [_extract_all(folder, modality, extract) for folder in (first, second)]
    for folder, values in zip((first, second), features, strict=True):
        reason = refusal(*values.shape)
        if reason is not None:
            raise UserError(f"{folder}: {reason}. Give a folder with more pictures")
        warn_if_few(str(folder), *values.shape)
    return FrechetDistance(features[0]).to(features[1])


def read_pictures(folder: Path) -> Iterator[np.ndarray]:
    """The PNG and JPEG files of a folder in the order of their names, (H, W, 3) uint8, all of one size.

    Raises:
        UserError: there is no such folder or no picture in it; one is damaged, too large, or of another size
            than the first.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder. Give a folder of PNG or JPEG files, or a shard folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise UserError(f"{folder}: holds no {', '.join(sorted(_SUFFIXES))} files. Give another folder")
    size = None
    for path in paths:
        picture = _read_picture(path)
        size = size or picture.shape
        if picture.shape != size:
            raise UserError(
                f"{path}: is {picture.shape[0]}×{picture.shape[1]}, but the first picture of its folder is "
                f"{size[0]}×{size[1]}. Resize the pictures to one size, all in the same way"
            )
        yield picture


def _read_picture(path: Path) -> np.ndarray:
    try:
        with Image.open(path, formats=["PNG", "JPEG"]) as image:
            # The header alone has been read so far.
            if image.width * image.height > _MAX_PIXELS:
                raise UserError(
                    f"{path}: {image.width}×{image.height} are more than {_MAX_PIXELS:,} pixels. Resize it"
                )
            return np.asarray(image.convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError) as error:
        raise UserError(
            f"{path}: cannot be decoded as PNG or JPEG ({error}). Remove or replace it"
        ) from error


def _extract_all(folder: Path, modality: str | None, extract: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Features (N, F) of all pictures of a folder or of a shard folder's test split."""
    if (folder / INDEX_NAME).is_file():
        batches = _shard_batches(folder, modality)
    else:
        batches = _picture_batches(folder)
    with torch.no_grad():
        features = [extract(images.float() / 255).cpu().numpy() for images in batches]
    return np.concatenate(features)


def _shard_batches(folder: Path, modality: str | None) -> Iterator[Tensor]:
    if modality is None:
        raise UserError(f"{folder}: is a shard folder. Say which images of it are meant: --modality NAME")
    loader = EvaluationLoader(folder, split="test", modalities=[modality], batch_size=_BATCH_SIZE)
    for batch in loader:
        yield batch[modality][batch["valid"]]


def _picture_batches(folder: Path) -> Iterator[Tensor]:
    pictures: list[np.ndarray] = []
    for picture in read_pictures(folder):
        pictures.append(picture)
        if len(pictures) == _BATCH_SIZE:
            yield _stack(pictures)
            pictures = []
    if pictures:
        yield _stack(pictures)


def _stack(pictures: list[np.ndarray]) -> Tensor:
    """(B, 3, H, W) uint8."""
    return torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2))
