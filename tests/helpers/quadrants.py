"""A data set that a tiny classifier solves perfectly: the class is the bright quadrant."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cmvae.datasets.base import Sample
from cmvae.modalities import ImageModality, Modality

NUM_CLASSES = 4
SHAPES = {"m0": (3, 8, 8), "m1": (1, 8, 8), "m2": (3, 8, 8)}


def class_images(classes: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Float images (N, C, 8, 8) in which the quadrant of the class is bright."""
    images = np.full((len(classes), *shape), 0.15, dtype=np.float32)
    for image, label in zip(images, classes, strict=True):
        top, left = 4 * (label // 2), 4 * (label % 2)
        image[:, top : top + 4, left : left + 4] = 0.8
    return images


class Quadrants:
    """A source for `write_shards`: noisy class images in three modalities."""

    name = "quadrants"
    class_names = ("nw", "ne", "sw", "se")
    settings: Mapping[str, str] = {}
    modalities: Mapping[str, Modality] = {name: ImageModality(shape=shape) for name, shape in SHAPES.items()}
    split_sizes: Mapping[str, int] = {"train": 192, "validation": 8, "test": 90}

    def sample(self, split: str, index: int) -> Sample:
        rng = np.random.default_rng([len(split), index])
        label = index % NUM_CLASSES
        images = {}
        for name, shape in SHAPES.items():
            clean = class_images(np.array([label]), shape)[0]
            images[name] = (255 * clean + rng.normal(0, 15, shape)).clip(0, 255).astype(np.uint8)
        # All samples of a group have the same class. With two ranks, each reads some of them.
        return Sample(images, label, group=f"group {index % 28}" if split == "test" else None)
