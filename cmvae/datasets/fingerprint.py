"""A hash of all that a source reads, so that parts of one data set are told apart from those of another."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any


def fingerprint(source: object) -> str:
    """SHA-256 of the values that a source holds, and of the name, size and time of each file that it names.

    Equal in all processes and on all machines that open the same files with the same options. Contents of
    files that are read later, such as images, are not part of it.

    Args:
        source: an object that can be pickled and does not contain itself.
    """
    hasher = _Hasher()
    hasher.dump(source)
    return hasher.digest.hexdigest()


class _Hasher(pickle.Pickler):
    """Pickles into a hash; nothing is unpickled."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        super().__init__(self, protocol=5, buffer_callback=self._add_buffer)
        # Without memory of what it has seen: equal strings may be one object or several.
        self.fast = True

    def write(self, content: bytes) -> None:
        self.digest.update(content)

    def _add_buffer(self, buffer: pickle.PickleBuffer) -> None:
        self.digest.update(buffer.raw())

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, Path):
            status = obj.stat() if obj.is_file() else None
            # Copies keep whole seconds at least, if they keep the time.
            return str(obj), *(() if status is None else (status.st_size, int(status.st_mtime)))
        # The order of a set depends on the process.
        return sorted(obj) if isinstance(obj, (set, frozenset)) else None
