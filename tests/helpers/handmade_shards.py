"""Write a shard folder with tarfile, Pillow and json only, to test the reader without the writer."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

SHAPES = {"m0": (3, 4, 5), "m1": (1, 3, 2)}


def picture(number: int, shape: Sequence[int]) -> np.ndarray:
    """Pixels of sample `number`, different for every number below 65,536."""
    pixels = np.random.default_rng(number).integers(256, size=shape, dtype=np.uint8)
    pixels.flat[0], pixels.flat[1] = divmod(number, 256)
    return pixels


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def members_of(number: int) -> dict[str, bytes]:
    members = {f"{name}.png": png(picture(number, shape)) for name, shape in SHAPES.items()}
    return {"cls": str(number % 10).encode(), **members}


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_index(folder: Path, split: str, sizes: Sequence[int]) -> None:
    shards = []
    for number, size in enumerate(sizes):
        path = folder / f"{split}-{number}.tar"
        content = path.read_bytes()
        shards.append(
            {
                "name": path.name,
                "num_samples": size,
                "num_bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )
    index = {
        "name": "by hand",
        "source": {},
        "modalities": {
            name: {"kind": "image", "shape": shape, "dtype": "uint8"} for name, shape in SHAPES.items()
        },
        "class_names": [str(digit) for digit in range(10)],
        "splits": {split: {"num_samples": sum(sizes), "shards": shards}},
    }
    (folder / "index.json").write_text(json.dumps(index))
