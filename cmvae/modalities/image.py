"""Images, stored as PNG, one or three channels."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import field_validator
from typing_extensions import override

from cmvae.modalities import png
from cmvae.modalities.base import Modality, as_array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

PNG_COMPRESS_LEVEL = 1
"""Level of zlib. For 28×28 crops of photographs, level 3 saves 4 % of the bytes and takes 11 % longer;
level 9 saves 15 % and takes 62 % longer."""
_MODES = {1: "L", 3: "RGB"}


class ImageModality(Modality):
    """(channels, height, width) uint8; as data fp32 in [0, 1], channels-last in memory."""

    suffix = "png"
    likelihoods = ("laplace", "normal", "bernoulli")
    network = "resnet"
    metrics = frozenset({"generative"})

    kind: Literal["image"] = "image"
    dtype: Literal["uint8"] = "uint8"

    @field_validator("shape")
    @classmethod
    def _check_shape(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        if len(shape) != 3 or shape[0] not in _MODES or min(shape) < 1:
            raise ValueError(f"{shape} is not (1 or 3 channels, height, width)")
        return shape

    @override
    def encode(self, stored: np.ndarray) -> bytes:
        if stored.nbytes <= png.MAX_BYTES:
            return png.encode(stored)
        buffer = io.BytesIO()
        pixels = stored[0] if len(stored) == 1 else stored.transpose(1, 2, 0)
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=PNG_COMPRESS_LEVEL)
        return buffer.getvalue()

    @override
    def decode(self, content: bytes) -> np.ndarray:
        channels, height, width = self.shape
        try:
            uncompressed = png.decode(content, self.shape)
            if uncompressed is not None:
                return uncompressed
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                if image.size == (width, height) and image.mode == _MODES[channels]:
                    pixels = np.asarray(image)
                    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
                found = f"a {image.mode} image of {image.size[1]}×{image.size[0]}"
        except UnidentifiedImageError as error:  # its own message names an address in memory
            raise ValueError("cannot be decoded as PNG (it is none)") from error
        except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"cannot be decoded as PNG ({error})") from error
        raise ValueError(f"{found}, its index says {_MODES[channels]} of {height}×{width}")

    @override
    def to_data(self, stored: Tensor) -> Tensor:
        """Images travel as bytes, a quarter of their size as floats."""
        import torch

        return stored.to(torch.float32, memory_format=torch.channels_last).div_(255)

    @override
    def to_stored(self, data: Tensor | np.ndarray) -> np.ndarray:
        """Values outside of [0, 1] are clipped."""
        return (as_array(data).clip(0, 1) * 255).round().astype(np.uint8)

    @override
    def draw(self, ax: Axes, stored: np.ndarray) -> None:
        """Draw pixels as squares: most of these images are small."""
        pixels = np.broadcast_to(stored, (3, *stored.shape[1:])).transpose(1, 2, 0)
        ax.imshow(pixels, interpolation="nearest")

    @property
    @override
    def drawn_size(self) -> tuple[float, float]:
        """Fits a laptop's screen; at 120 dpi, 16×16 images still have whole pixels."""
        return 0.4, 0.4

    @override
    def describe(self, stored: np.ndarray) -> str:
        return f"image of {self.shape[1]}×{self.shape[2]}"
