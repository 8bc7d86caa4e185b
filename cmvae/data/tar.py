"""Read the members of a tar.

Plain headers, as `cmvae pack` and GNU tar write them, are parsed here. tarfile, which WebDataset uses, makes
an object per member, and training then reads small images at half the speed; docs/performance.md has the
comparison.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from webdataset.tariterators import tar_file_iterator

_BLOCK = 512
_END = bytes(_BLOCK)
# Fields of a header (POSIX.1-1988), and the magic numbers of that format and of GNU tar.
_NAME, _SIZE, _CHECKSUM, _TYPE, _FORMAT = (
    slice(100),
    slice(124, 136),
    slice(148, 156),
    slice(156, 157),
    slice(257, 265),
)
_PREFIX = 345
_FORMATS = (b"ustar\x0000", b"ustar  \x00")
_REGULAR_FILE = b"0"
_PADDING = b" \x00"


def read_members(stream: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the regular files of a tar, in its order.

    From the first header that is not plain or is incomplete, WebDataset reads the rest: it supports long
    names, sparse files and compressed tars, and its errors say how a tar is damaged.

    Args:
        stream: seekable, at the beginning of the tar.

    Raises:
        tarfile.TarError, OSError, EOFError, ValueError: the tar is damaged.
    """
    begun = False
    while True:
        start = stream.tell()
        header = stream.read(_BLOCK)
        if begun and header in (b"", _END):
            return
        plain = _parse(header)
        if plain is None:
            break
        name, size = plain
        content = stream.read(size + -size % _BLOCK)
        if len(content) < size:
            break
        yield name, content[:size]
        begun = True
    stream.seek(start)
    for member in tar_file_iterator(stream, skip_meta=None):
        yield member["fname"], member["data"]


def _parse(header: bytes) -> tuple[str, int] | None:
    """Name and size of a regular file; None for any other header."""
    if len(header) < _BLOCK or header[_FORMAT] not in _FORMATS or header[_TYPE] != _REGULAR_FILE:
        return None
    if header[_PREFIX]:
        return None  # the first part of a long name
    try:
        name = header[_NAME].partition(b"\x00")[0].decode()
        size, checksum = (int(header[field].strip(_PADDING), 8) for field in (_SIZE, _CHECKSUM))
    except ValueError:
        return None
    if size < 0:
        return None
    # The sum of all bytes, with spaces in place of the checksum itself.
    if sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" ") != checksum:
        return None
    # WebDataset reserves these names, and checks for them.
    return None if name.startswith("__") else (name, size)
