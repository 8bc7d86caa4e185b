"""Small networks with random weights, as files, in place of pretrained ones."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

import cmvae.utils.torchvision_shim  # noqa: F401 isort:skip

TORCHVISION_NAME = "resnet18"
WORDS = ("a", "red", "green", "blue", "thing")


def save_torchvision(path: Path, seed: int = 0) -> str:
    """Write the weights of a network of torchvision; returns `LIBRARY:NETWORK@PATH`."""
    from torchvision import models

    torch.manual_seed(seed)
    save_file(models.get_model(TORCHVISION_NAME).state_dict(), path)
    return f"torchvision:{TORCHVISION_NAME}@{path}"


def save_sentence_transformer(folder: Path) -> tuple[str, torch.Tensor]:
    """Write a model that averages vectors of words; returns `LIBRARY:NETWORK@PATH` and the vectors (W, D)."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    places = {word: place for place, word in enumerate((*WORDS, "?"))}
    tokenizer = Tokenizer(WordLevel(places, "?"))
    tokenizer.pre_tokenizer = Whitespace()
    vectors = torch.randn(len(WORDS) + 1, 6, generator=torch.Generator().manual_seed(0))
    module = StaticEmbedding(tokenizer, embedding_weights=vectors.numpy())
    SentenceTransformer(modules=[module], device="cpu").save_pretrained(str(folder))
    return f"sentence-transformers:words@{folder}", vectors
