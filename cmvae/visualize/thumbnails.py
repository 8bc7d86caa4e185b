"""Small pictures, as `data:` URIs of a page that needs no other file."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

_QUALITY = 80
# Lossy WebP halves the resolution of colours, which shows in smaller images.
_LOSSLESS_BELOW = 24 * 24


def shrink(image: np.ndarray, size: int) -> np.ndarray:
    """Shrink a stored image (C, H, W) uint8 until neither side is longer than `size`."""
    height, width = image.shape[1:]
    factor = size / max(height, width)
    if factor >= 1:
        return image.copy()
    shape = (max(1, round(width * factor)), max(1, round(height * factor)))
    smaller = np.asarray(_as_picture(image).resize(shape, Image.Resampling.BOX))
    return smaller[None] if smaller.ndim == 2 else smaller.transpose(2, 0, 1)


def image_uri(image: np.ndarray, small_file: bool = False) -> str:
    """A stored image (C, H, W) uint8 as a WebP in a `data:` URI.

    Args:
        image: the image.
        small_file: accept blurred colours in the smallest images, which takes less space.
    """
    buffer = io.BytesIO()
    lossless = not small_file and image.shape[1] * image.shape[2] <= _LOSSLESS_BELOW
    _as_picture(image).save(buffer, "WEBP", lossless=lossless, quality=_QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _as_picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
