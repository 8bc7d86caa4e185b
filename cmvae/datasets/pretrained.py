"""Pretrained networks of timm, torchvision and Sentence Transformers, which compute features."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from cmvae.datasets.boxes import square_around
from cmvae.datasets.columns import BoxedFile, open_image, to_pixels
from cmvae.utils.errors import UserError

if TYPE_CHECKING:
    from torch import nn


class Network:
    """A frozen network.

    Args:
        where: LIBRARY:NETWORK[@PATH].
        module: the network.
        prepare: makes an image or a sentence ready for the network.
        forward: features (B, D) of B such inputs.
        example: an image or a sentence.
    """

    def __init__(
        self,
        where: str,
        module: nn.Module,
        prepare: Callable[[Any], Any],
        forward: Callable[[list[Any]], np.ndarray],
        example: Any,
    ) -> None:
        self.where, self._prepare, self._forward = where, prepare, forward
        self.version = version(where.partition(":")[0])
        self.sha256 = _hash_weights(module)
        self.dim = forward([prepare(example)]).shape[1]

    def embed(self, originals: Sequence[Any]) -> tuple[np.ndarray, dict[int, str]]:
        """Features of a batch.

        Args:
            originals: B images, as `ImageFile`s or arrays, or B sentences.

        Returns:
            (B, D) float64, NaN where an image is damaged, and by their places what is wrong with these.
        """

        def prepare(original: Any) -> Any:
            try:
                return self._prepare(original)
            except ValueError as error:
                return error

        with ThreadPoolExecutor() as pool:
            prepared = list(pool.map(prepare, originals))
        damaged = {place: str(one) for place, one in enumerate(prepared) if isinstance(one, ValueError)}
        intact = [place for place in range(len(prepared)) if place not in damaged]
        features = np.full((len(prepared), self.dim), np.nan)
        if intact:
            features[intact] = self._forward([prepared[place] for place in intact])
        return features, damaged


@functools.lru_cache(maxsize=4)
def load_network(name: str, weights: str | None) -> Network:
    """Load a network, on a GPU if there is one; no pickle is read.

    Args:
        name: LIBRARY:NETWORK.
        weights: local path of the weights, safetensors or what `torch.load(weights_only=True)` reads; for
            Sentence Transformers the folder of a model. None takes them from the cache of the library, which
            downloads them.

    Raises:
        UserError: the library is not installed or has no such network, or the weights are missing, damaged
            or those of another network.
    """
    library, _, network = name.partition(":")
    where = name if weights is None else f"{name}@{weights}"
    if weights is not None and not Path(weights).exists():
        raise UserError(f"{where}: no such file. Copy the weights there")
    try:
        return _LOADERS[library](where, network, weights)
    except ImportError as error:
        raise UserError(f"{where}: {error}. Run pip install 'cmvae[embed]'") from error
    except Exception as error:  # these libraries raise what downloads and unpicklers raise
        message = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise UserError(
            f"{where}: cannot be loaded ({message}). Check the name, or give a path of its weights as "
            f"{name}@PATH"
        ) from error


def _load_timm(where: str, network: str, weights: str | None) -> Network:
    import cmvae.utils.torchvision_shim  # noqa: F401, I001
    import timm

    overlay = None if weights is None else {"file": weights}
    # With num_classes=0 timm would accept weights that lack others than those of the classifier, too.
    module: Any = timm.create_model(network, pretrained=True, pretrained_cfg_overlay=overlay)
    module.reset_classifier(0)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(module))
    return _image_network(where, module, transform)


def _load_torchvision(where: str, network: str, weights: str | None) -> Network:
    import cmvae.utils.torchvision_shim  # noqa: F401, I001
    import safetensors.torch
    import torch
    from torchvision import models

    of_library = models.get_model_weights(network).DEFAULT  # type: ignore[attr-defined]
    if weights is None:
        state = of_library.get_state_dict(check_hash=True, weights_only=True)
    elif weights.endswith(".safetensors"):
        state = safetensors.torch.load_file(weights)
    else:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    module = models.get_model(network)
    module.load_state_dict(state)
    # The last linear layer computes the scores of classes.
    classifier = [path for path, part in module.named_modules() if isinstance(part, torch.nn.Linear)][-1]
    module.set_submodule(classifier, torch.nn.Identity())
    return _image_network(where, module, of_library.transforms())


def _load_sentence_transformers(where: str, network: str, weights: str | None) -> Network:
    from sentence_transformers import SentenceTransformer

    # Classes that a model names are imported from the library alone.
    module = SentenceTransformer(
        weights or network, trust_remote_code=False, model_kwargs={"use_safetensors": True}
    )

    def forward(sentences: list[str]) -> np.ndarray:
        return module.encode(sentences, batch_size=len(sentences), show_progress_bar=False)

    return Network(where, module, str, forward, "a sentence")


_LOADERS: dict[str, Callable[[str, str, str | None], Network]] = {
    "timm": _load_timm,
    "torchvision": _load_torchvision,
    "sentence-transformers": _load_sentence_transformers,
}


def _image_network(where: str, module: nn.Module, transform: Callable[[Image.Image], Any]) -> Network:
    import torch

    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    module.to(device).eval()

    def prepare(original: Any) -> torch.Tensor:
        if isinstance(original, np.ndarray):
            pixels = to_pixels(original)
            image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
            return transform(image.convert("RGB"))
        image = open_image(original, "RGB")
        if isinstance(original, BoxedFile):
            left, top, right, bottom = map(round, square_around(original.box, image.size))
            image = image.crop((left, top, right, bottom))
        return transform(image)

    @torch.inference_mode()
    def forward(images: list[torch.Tensor]) -> np.ndarray:
        return module(torch.stack(images).to(device)).float().cpu().numpy()

    return Network(where, module, prepare, forward, np.zeros((1, 8, 8), dtype=np.uint8))


def _hash_weights(module: nn.Module) -> str:
    """SHA-256 of the names, types, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.cpu().numpy()
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()
