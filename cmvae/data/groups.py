"""Groups of samples that belong together, such as the ten captions of one photograph, as numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from cmvae.utils.errors import UserError

NO_GROUP = -1
"""The number of a sample that has no group."""


def group_number(name: str | None) -> int:
    """The number of a group: 63 bits that depend on its name alone, -1 for None.

    Shards hold names; batches hold numbers, since ranks exchange tensors. A number depends on nothing but the
    name, so that reader processes and ranks agree without asking each other.
    """
    if name is None:
        return NO_GROUP
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_group_names(names: Iterable[str]) -> None:
    """Refuse names that `group_number` would not tell apart.

    Among a million groups two have the same number with a probability of 5e-8. Packing checks it, so that
    whatever reads packed data can rely on it.

    Args:
        names: the groups of a data set, each once.

    Raises:
        UserError: a name is empty, or two have the same number.
    """
    name_of: dict[int, str] = {}
    for name in names:
        if not name:
            raise UserError("a group has an empty name. Name it, or leave its samples without a group")
        other = name_of.setdefault(group_number(name), name)
        if other != name:
            raise UserError(f"groups {other!r} and {name!r} have the same number. Rename one of them")
