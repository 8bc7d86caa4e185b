"""Jobs of reading: the project's reader, and images in a folder by torch's DataLoader."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
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
    """Batches of the train split, through all epochs that it takes, nothing kept in memory.

    Args:
        shards: folder or URL of packed data.
        batch_size: samples a batch.
        num_workers: reader processes.
        num_batches: in one run.
    """
    names = list(ShardIndex.load(shards).modalities)
    loader = TrainingLoader(shards, modalities=names, batch_size=batch_size, num_workers=num_workers)
    return _reading(_forever(loader), batch_size, num_batches)


def _forever(loader: TrainingLoader) -> Iterator[object]:
    epoch = 0
    while True:
        yield from loader.epoch_batches(epoch)
        epoch += 1


class PairedImages(Dataset[list[Tensor]]):
    """Images in `MODALITY/NAME.png`, paired by name, as the released data lies there and its code reads it.

    Args:
        folder: of the modalities' folders.
    """

    def __init__(self, folder: Path) -> None:
        modalities = sorted(path for path in folder.iterdir() if path.is_dir())
        names = sorted(path.name for path in modalities[0].iterdir())
        self._paths = [[modality / name for modality in modalities] for name in names]

    def __len__(self) -> int:
        """Samples."""
        return len(self._paths)

    def __getitem__(self, index: int) -> list[Tensor]:
        """A sample's images, (C, H, W) each in [0, 1]."""
        images = []
        for path in self._paths[index]:
            with Image.open(path) as image:
                images.append(to_tensor(image))
        return images


def folder_job(folder: str, batch_size: int, num_workers: int, num_batches: int) -> Job:
    """As `shards_job`, of a folder of images, as the released code reads them."""
    loader = DataLoader(
        PairedImages(Path(folder)),
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )

    def forever() -> Iterator[object]:
        while True:
            yield from loader

    return _reading(forever(), batch_size, num_batches)


def _reading(batches: Iterator[object], batch_size: int, num_batches: int) -> Job:
    def run() -> None:
        for _ in islice(batches, num_batches):
            pass

    return Job(run, num_batches * batch_size)


def write_folder(shards: str, folder: Path, num_samples: int) -> float:
    """Write the first images of the train split as the released data lies on a disk.

    Args:
        shards: folder or URL of packed images.
        folder: where to.
        num_samples: how many.

    Returns:
        Seconds that it took.

    Raises:
        UserError: a modality is no image.
    """
    index = ShardIndex.load(shards)
    others = [name for name, modality in index.modalities.items() if modality.kind != "image"]
    if others:
        raise UserError(
            f"{shards}: {', '.join(others)}: no images. Compare reading with a data set of images"
        )
    started = time.perf_counter()
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
    return time.perf_counter() - started
