"""A data set with all kinds of modalities, each of which shows the class, and with missing values."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from cmvae.config import ModalityConfig, ModelConfig
from cmvae.datasets.base import Sample
from cmvae.modalities import (
    BinaryModality,
    CategoricalModality,
    ImageModality,
    Modality,
    TextModality,
    VectorModality,
)
from cmvae.modalities.text import EOS, SPECIAL_TOKENS
from cmvae.models.cmvae import CMVAE, Posterior

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220)}
VOCABULARY = (*SPECIAL_TOKENS, "a", "the", "bird", "fish", "with", "wings", *COLOURS)
LENGTH = 8
MODALITIES: Mapping[str, Modality] = {
    "photo": ImageModality(shape=(3, 8, 8), optional=True),
    "caption": TextModality(shape=(LENGTH,), categories=VOCABULARY, optional=True),
    "sizes": VectorModality(
        shape=(2,),
        columns=("wing", "beak"),
        mean=(50.0, 3.0),
        std=(20.0, 1.5),
        optional=True,
    ),
    "marks": BinaryModality(shape=(3,), columns=("crest", "stripe", "spot"), optional=True),
    "habitat": CategoricalModality(categories=("shore", "forest", "field"), optional=True),
}


def encode_words(words: list[str]) -> np.ndarray:
    """Stored form of words: token numbers, `<eos>`, `<pad>`."""
    places = [VOCABULARY.index(word) for word in [*words, EOS]]
    return np.array(places + [0] * (LENGTH - len(places)), dtype=np.int64)


class Mixed:
    """A source for `write_shards`: photographs, captions, sizes, marks and habitats of three classes.

    Args:
        missing: share of missing values; every sample keeps at least one modality.
    """

    name = "mixed"
    class_names = tuple(COLOURS)
    settings: Mapping[str, str] = {}
    modalities = MODALITIES
    split_sizes: Mapping[str, int] = {"train": 120, "validation": 24, "test": 60}

    def __init__(self, missing: float = 0.0) -> None:
        self.missing = missing

    def sample(self, split: str, index: int) -> Sample:
        rng = np.random.default_rng([len(split), index])
        label = int(index % len(COLOURS))
        colour = self.class_names[label]
        photo = np.array(COLOURS[colour])[:, None, None] + rng.normal(0, 12, (3, 8, 8))
        words = [rng.choice(["a", "the"]), colour, rng.choice(["bird", "fish"])]
        if rng.random() < 0.5:
            words += ["with", "wings"]
        values = {
            "photo": photo.clip(0, 255).astype(np.uint8),
            "caption": encode_words(words),
            "sizes": np.array([30.0, 1.5]) + label * np.array([20.0, 1.5]) + rng.normal(0, [2.0, 0.1]),
            "marks": (np.arange(3) == label).astype(np.uint8),
            "habitat": np.array(label),
        }
        there = rng.random(len(values)) >= self.missing
        there[rng.integers(len(values))] = True
        kept = [name for name, yes in zip(values, there, strict=True) if yes]
        return Sample({name: values[name].astype(MODALITIES[name].dtype) for name in kept}, label)


def mixed_model(num_clusters: int = 5, **modalities: ModalityConfig) -> CMVAE:
    """An untrained model with all kinds of modalities."""
    torch.manual_seed(0)
    tiny = {name: ModalityConfig(width=2) for name in MODALITIES}
    config = ModelConfig(
        shared_dim=4, private_dim=3, num_clusters=num_clusters, modalities={**tiny, **modalities}
    )
    return CMVAE(config, MODALITIES).eval()


class MixedOracle(CMVAE):
    """Recognises the class from every modality and decodes it; `say` may change the class, per modality.

    Its texts are always "a COLOUR bird".
    """

    def __init__(self) -> None:
        model = mixed_model(num_clusters=len(COLOURS))
        super().__init__(model.config, MODALITIES)
        self.eval()
        self.say: dict[str, Callable[[Tensor], Tensor]] = {}
        with torch.no_grad():
            self.cluster_prior.means.zero_()
            self.cluster_prior.means[:, 0] = 10 * torch.arange(len(COLOURS))
        self.cluster_prior.scale.fill_(1e-3)

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Posterior]:
        posteriors = {}
        for name, x in inputs.items():
            classes = {
                "photo": lambda x: x.mean((2, 3)).argmax(1),
                "caption": lambda x: (x[:, 1] - VOCABULARY.index("red")).clamp(0, 2),
                "sizes": lambda x: (x[:, 0] + 1).round().clamp(0, 2),
                "marks": lambda x: x.argmax(1),
                "habitat": lambda x: x,
            }[name](x)
            loc = torch.zeros(len(x), self.config.shared_dim)
            loc[:, 0] = 10 * self.say.get(name, lambda c: c)(classes)
            w = torch.zeros(len(x), self.config.private_dim)
            scale = torch.full_like(loc, 1e-3)
            posteriors[name] = Posterior(self.family(loc, scale), self.family(w, torch.ones_like(w)))
        return posteriors

    def decode(self, shared: Tensor, private: Mapping[str, Tensor]) -> dict[str, Tensor]:
        classes = (shared[:, 0] / 10).round().long()
        photos = torch.tensor(list(COLOURS.values()))[classes] / 255
        texts = torch.stack([torch.from_numpy(encode_words(["a", colour, "bird"])) for colour in COLOURS])
        values = {
            "photo": photos[:, :, None, None].expand(-1, -1, 8, 8),
            "caption": texts[classes],
            "sizes": torch.stack([classes - 1.0, classes - 1.0], dim=1),
            "marks": torch.nn.functional.one_hot(classes, 3).float(),
            "habitat": classes,
        }
        return {name: values[name] for name in private}


def mixed_batch(source: Mixed, split: str) -> dict[str, Tensor]:
    """A whole split as one batch of model inputs, with `label` and `mask`."""
    samples = [source.sample(split, index) for index in range(source.split_sizes[split])]
    batch = {}
    for name, modality in MODALITIES.items():
        missing = np.zeros(modality.shape, modality.dtype)
        stored = torch.from_numpy(np.stack([sample.values.get(name, missing) for sample in samples]))
        batch[name] = modality.to_data(stored)
    batch["label"] = torch.tensor([sample.label for sample in samples])
    batch["mask"] = torch.tensor([[name in sample.values for name in MODALITIES] for sample in samples])
    return batch
