"""Members of a tar, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from webdataset.tariterators import tar_file_iterator

_BLOCK = 512
_END = bytes(_BLOCK)
# Fields of a header (POSIX.1-1988), and the marks of that format and of GNU's.
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

    Python's tarfile makes an object of every header, which takes longer than decoding a small image. Plain
    headers, as `write_shards` and GNU tar write them, are therefore read here. From the first one that is not
    plain, or not whole, WebDataset goes on: it knows long names, sparse files and compressed tars, and says
    what is wrong with a damaged one.

    Args:
        stream: at the beginning of the tar; it must be seekable.

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
    """Name and size of a regular file; None if a header says anything else."""
    if len(header) < _BLOCK or header[_FORMAT] not in _FORMATS or header[_TYPE] != _REGULAR_FILE:
        return None
    if header[_PREFIX]:
        return None  # what stands before a long name
    try:
        name = header[_NAME].partition(b"\x00")[0].decode()
        size, checksum = (int(header[field].strip(_PADDING), 8) for field in (_SIZE, _CHECKSUM))
    except ValueError:
        return None
    if size < 0:
        return None
    # Of all bytes, those of the checksum itself taken for spaces.
    if sum(header) - sum(header[_CHECKSUM]) + 8 * ord(" ") != checksum:
        return None
    # What WebDataset keeps for itself, it also recognises.
    return None if name.startswith("__") else (name, size)
