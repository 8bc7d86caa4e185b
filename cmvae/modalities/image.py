"""Images, stored as PNG, one or three channels."""

from __future__ import annotations

import functools
import io
import struct
import zlib
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError
from pydantic import field_validator
from typing_extensions import override

from cmvae.modalities.base import Modality, as_array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import Tensor

PNG_COMPRESS_LEVEL = 1
"""Level of zlib. On 28×28 crops of photographs 3 saves 4 % of the bytes for 11 % more time, 9 saves 15 % for
62 %."""
MAX_STORED_BYTES = 64 * 64 * 3
"""Images of up to so many bytes are PNG that is not compressed, which is read six times as fast: of a small
image a decoder takes longer than a disk. Crops of photographs take half as much room again."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Of the header chunk: bits a channel, and the colour type by channels.
_DEPTH, _COLOUR_TYPES = 8, {1: 0, 3: 2}
# Of a stream of zlib (RFC 1951): bytes that a block holds at most as they are, and bits that say it does not.
_BLOCK_BYTES, _COMPRESSED = 65535, 0b110
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
        if stored.nbytes <= MAX_STORED_BYTES:
            return _encode_uncompressed(stored)
        buffer = io.BytesIO()
        pixels = stored[0] if len(stored) == 1 else stored.transpose(1, 2, 0)
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=PNG_COMPRESS_LEVEL)
        return buffer.getvalue()

    @override
    def decode(self, content: bytes) -> np.ndarray:
        plain = _decode_uncompressed(content, self.shape)
        if plain is not None:
            return plain
        channels, height, width = self.shape
        try:
            with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
                if image.size == (width, height) and image.mode == _MODES[channels]:
                    pixels = np.asarray(image)
                    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
                found = f"a {image.mode} image of {image.size[1]}×{image.size[0]}"
        except UnidentifiedImageError as error:  # its own message names an address in memory
            raise ValueError("cannot be decoded as PNG (it is none)") from error
        except (Image.DecompressionBombError, OSError, SyntaxError) as error:
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


def _encode_uncompressed(stored: np.ndarray) -> bytes:
    """PNG (ISO/IEC 15948) of one data chunk, its rows neither filtered nor compressed."""
    channels, height, width = stored.shape
    # Every row begins with the number of its filter: 0 is none.
    rows = np.zeros((height, 1 + width * channels), np.uint8)
    rows[:, 1:] = stored.transpose(1, 2, 0).reshape(height, -1)
    data = _chunk(b"IDAT", zlib.compress(rows.tobytes(), 0))
    return _beginning(channels, height, width) + data + _END


def _decode_uncompressed(content: bytes, shape: tuple[int, ...]) -> np.ndarray | None:
    """What `_encode_uncompressed` was given; None for any other PNG.

    Raises:
        ValueError: it was written so, and changed since: Pillow would hand out what it finds.
    """
    channels, height, width = shape
    beginning = _beginning(channels, height, width)
    size = height * (1 + width * channels)
    num_blocks = -(-size // _BLOCK_BYTES)
    first = len(beginning) + 8
    # A chunk around a stream of zlib, around blocks of which the first says that it is not compressed.
    length = 2 + 5 * num_blocks + size + 4
    if len(content) != first + length + 4 + len(_END) or not content.startswith(beginning):
        return None
    compressed = content[first : first + length]
    if compressed[2] & _COMPRESSED:
        return None
    if _chunk(b"IDAT", compressed) + _END != content[len(beginning) :]:
        raise ValueError("cannot be decoded as PNG (its checksum is wrong)")
    try:
        rows = np.frombuffer(zlib.decompress(compressed), np.uint8).reshape(height, -1)
    except (zlib.error, ValueError) as error:
        raise ValueError(f"cannot be decoded as PNG ({error})") from error
    if rows[:, 0].any():
        return None  # others filter and do not compress
    return rows[:, 1:].reshape(height, width, channels).transpose(2, 0, 1)


def _chunk(name: bytes, content: bytes) -> bytes:
    named = name + content
    return struct.pack(">I", len(content)) + named + struct.pack(">I", zlib.crc32(named))


_END = _chunk(b"IEND", b"")


@functools.cache
def _beginning(channels: int, height: int, width: int) -> bytes:
    """The signature and the header chunk: no palette, no interlacing."""
    header = struct.pack(">IIBBBBB", width, height, _DEPTH, _COLOUR_TYPES[channels], 0, 0, 0)
    return _SIGNATURE + _chunk(b"IHDR", header)
