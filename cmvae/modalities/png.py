"""PNG files (ISO/IEC 15948) whose rows are neither filtered nor compressed, for small images.

Any PNG reader opens them. They are written and read here, without Pillow, because training then reads small
images more than twice as fast; docs/performance.md has the comparison.
"""

from __future__ import annotations

import functools
import struct
import zlib

import numpy as np

MAX_BYTES = 64 * 64 * 3
"""Size of the largest images for which this form is used. Decoding a larger image is limited by the disk.
Files of photographs become half as large again."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BIT_DEPTH, _COLOUR_TYPES = 8, {1: 0, 3: 2}
_DATA_START = len(_SIGNATURE) + 25 + 8  # after the header chunk, and length and name of the data chunk
_HEADER_BYTES = _DATA_START + 7  # the zlib header, and the header of an uncompressed block
_END_BYTES = 12  # of the chunk that ends the file


def encode(pixels: np.ndarray) -> bytes:
    """Encode (1 or 3, height, width) uint8."""
    channels, height, width = pixels.shape
    # The first byte of each row is the number of its filter; 0 is none.
    rows = np.zeros((height, 1 + width * channels), np.uint8)
    rows[:, 1:] = pixels.transpose(1, 2, 0).reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, _BIT_DEPTH, _COLOUR_TYPES[channels], 0, 0, 0)
    data = zlib.compress(rows.tobytes(), level=0)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", data) + _chunk(b"IEND", b"")


def decode(content: bytes, shape: tuple[int, ...]) -> np.ndarray | None:
    """Decode what `encode` returned for an image of this shape.

    Returns:
        The shape (channels, height, width) uint8; None if the file has another form or shape.

    Raises:
        ValueError: the file has this form, but was changed.
    """
    example = _example(shape)
    if len(content) != len(example) or content[:_HEADER_BYTES] != example[:_HEADER_BYTES]:
        return None
    named_data, end = content[_DATA_START - 4 : -_END_BYTES - 4], content[-_END_BYTES - 4 :]
    # Pillow would return the changed pixels.
    if end != struct.pack(">I", zlib.crc32(named_data)) + example[-_END_BYTES:]:
        raise ValueError("its checksum is wrong")
    try:
        rows = np.frombuffer(zlib.decompress(named_data[4:]), np.uint8).reshape(shape[1], -1)
    except (zlib.error, ValueError) as error:
        raise ValueError(str(error)) from error
    if rows[:, 0].any():
        return None  # written by another program: filtered, not compressed
    return rows[:, 1:].reshape(*shape[1:], shape[0]).transpose(2, 0, 1)


@functools.cache
def _example(shape: tuple[int, ...]) -> bytes:
    """A file of this form and shape; others differ from it only in pixels and checksums."""
    return encode(np.zeros(shape, np.uint8))


def _chunk(name: bytes, content: bytes) -> bytes:
    named = name + content
    return struct.pack(">I", len(content)) + named + struct.pack(">I", zlib.crc32(named))
