"""A data set that a tiny classifier reads perfectly, and models that are right, or wrong, by construction."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from cmvae.config import EvaluationConfig, ModalityConfig, ModelConfig
from cmvae.data.schema import ModalitySchema, ShardIndex
from cmvae.data.sources.source import Sample
from cmvae.data.writer import write_shards
from cmvae.evaluation.classifiers import train_classifiers
from cmvae.evaluation.context import EvaluationContext
from cmvae.model import CMVAE, Posterior

NUM_CLASSES = 4
SHAPES = {"m0": (3, 8, 8), "m1": (1, 8, 8), "m2": (3, 8, 8)}
# z of class c is near 10·c in its first dimension.
SPACING = 10.0


def class_images(classes: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Float images (N, C, 8, 8): the quadrant of the class is bright."""
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
    modalities: Mapping[str, ModalitySchema] = {
        name: ModalitySchema(kind="image", shape=shape, dtype="uint8") for name, shape in SHAPES.items()
    }
    split_sizes: Mapping[str, int] = {"train": 192, "validation": 8, "test": 90}

    def sample(self, split: str, index: int) -> Sample:
        rng = np.random.default_rng([len(split), index])
        label = index % NUM_CLASSES
        images = {}
        for name, shape in SHAPES.items():
            clean = class_images(np.array([label]), shape)[0]
            images[name] = (255 * clean + rng.normal(0, 15, shape)).clip(0, 255).astype(np.uint8)
        return Sample(images, label)


class Oracle(CMVAE):
    """Reads the class off an image and draws it again; `say` and `draw` may twist it, by modality."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        modalities = {name: ModalityConfig(width=2) for name in SHAPES}
        config = ModelConfig(shared_dim=2, private_dim=3, num_clusters=NUM_CLASSES, modalities=modalities)
        super().__init__(config, Quadrants.modalities)
        self.eval()
        self.say: dict[str, Callable[[Tensor], Tensor]] = {}
        self.draw: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        with torch.no_grad():
            self.cluster_prior.means[:, 0] = SPACING * torch.arange(NUM_CLASSES)
        self.cluster_prior.scale.fill_(1e-3)

    def encode(self, inputs):
        posteriors = {}
        for name, x in inputs.items():
            quadrants = torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4).flatten(1)
            classes = self.say.get(name, lambda c: c)(quadrants.argmax(1))
            loc = torch.stack([SPACING * classes, torch.zeros(len(x))], dim=1)
            posteriors[name] = Posterior(
                self.family(loc, torch.full_like(loc, 1e-3)), self.family(torch.zeros(3), torch.ones(3))
            )
        return posteriors

    def decode(self, shared, private):
        images = {}
        for name, w in private.items():
            classes = (shared[:, 0] / SPACING).round().long()
            classes = self.draw.get(name, lambda c, w: c)(classes, w)
            images[name] = torch.from_numpy(class_images(classes.numpy(), SHAPES[name]))
        return images


@pytest.fixture(scope="session")
def quadrants_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed, with classifiers."""
    folder = tmp_path_factory.mktemp("shards") / "quadrants"
    write_shards(Quadrants(), folder)
    train_classifiers(folder, device=torch.device("cpu"), width=4, epochs=12)
    return folder


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture
def evaluation_context(quadrants_shards: Path) -> Callable[..., EvaluationContext]:
    """`evaluation_context(model, seed=1)` is an evaluation of `model` on the quadrants, with settings."""

    def make(model: CMVAE, index: ShardIndex | None = None, **settings: object) -> EvaluationContext:
        return EvaluationContext(
            model,
            quadrants_shards,
            index or ShardIndex.load(quadrants_shards),
            EvaluationConfig(**{"num_generated": 200, "batch_size": 32} | settings),
            Accelerator(cpu=True),
        )

    return make
