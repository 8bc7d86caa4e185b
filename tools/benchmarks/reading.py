"""Jobs of reading: the project's reader, and torch's DataLoader over images in a folder."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import chain, count, islice, repeat
from pathlib import Path

import cmvae.utils.torchvision_shim  # noqa: F401 isort:skip
from job import Job
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_tensor

from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader, TrainingLoader
from cmvae.utils.errors import UserError


def shards_job(shards: str, batch_size: int, num_workers: int, num_batches: int) -> Job:
    """Read batches of the train split, epoch after epoch, without a cache of decoded samples.

    Args:
        shards: folder or URL of packed data.
        batch_size: samples per batch.
        num_workers: number of reader processes.
        num_batches: batches per run.
    """
    names = list(ShardIndex.load(shards).modalities)
    loader = TrainingLoader(shards, modalities=names, batch_size=batch_size, num_workers=num_workers)
    return _reading(chain.from_iterable(map(loader.epoch_batches, count())), batch_size, num_batches)


class PairedImages(Dataset[list[Tensor]]):
    """Images in `MODALITY/NAME.png`, paired by name, as the released data is stored and read.

    Args:
        folder: folder with one subfolder per modality.
    """

    def __init__(self, folder: Path) -> None:
        modalities = sorted(path for path in folder.iterdir() if path.is_dir())
        names = sorted(path.name for path in modalities[0].iterdir())
        self._paths = [[modality / name for modality in modalities] for name in names]

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._paths)

    def __getitem__(self, index: int) -> list[Tensor]:
        """The images of a sample, (C, H, W) each, in [0, 1]."""
        images = []
        for path in self._paths[index]:
            with Image.open(path) as image:
                images.append(to_tensor(image))
        return images


def folder_job(folder: str, batch_size: int, num_workers: int, num_batches: int) -> Job:
    """The same as `shards_job` for a folder of images, read as the released code does."""
    loader = DataLoader(
        PairedImages(Path(folder)),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    return _reading(chain.from_iterable(repeat(loader)), batch_size, num_batches)


def _reading(batches: Iterator[object], batch_size: int, num_batches: int) -> Job:
    def run() -> None:
        for _ in islice(batches, num_batches):
            pass

    return Job(run, num_batches * batch_size)


def write_folder(shards: str, folder: Path, num_samples: int) -> None:
    """Write the first images of the train split in the layout of the released data.

    Args:
        shards: folder or URL of packed images.
        folder: output folder.
        num_samples: number of samples.

    Raises:
        UserError: a modality is not an image.
    """
    index = ShardIndex.load(shards)
    others = [name for name, modality in index.modalities.items() if modality.kind != "image"]
    if others:
        raise UserError(
            f"{shards}: {', '.join(others)}: not an image modality. Give a data set of images only"
        )
    names = list(index.modalities)
    loader = EvaluationLoader(
        shards, split="train", modalities=names, batch_size=100, num_samples=num_samples
    )
    seen: dict[str, int] = defaultdict(int)
    for batch in loader:
        for name in names:
            (folder / name).mkdir(parents=True, exist_ok=True)
            for image in batch[name][batch["valid"]]:
                pixels = image.movedim(0, -1).squeeze(-1).numpy()
                Image.fromarray(pixels).save(folder / name / f"{seen[name]}.png")
                seen[name] += 1
