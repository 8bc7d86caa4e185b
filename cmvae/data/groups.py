"""Numbers for groups of samples that belong together, such as the ten captions of one photograph."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from cmvae.utils.errors import UserError

NO_GROUP = -1
"""Number for a sample without a group."""


def group_number(name: str | None) -> int:
    """The number of a group: 63 bits of a hash of its name, -1 for None.

    Shards hold names; batches also hold numbers, because ranks exchange tensors. Reader processes and ranks
    agree on the numbers without communication.
    """
    if name is None:
        return NO_GROUP
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def check_group_names(names: Iterable[str]) -> None:
    """Check that `group_number` is unique; packing calls this, so readers can rely on it.

    Among a million groups, two have the same number with a probability of 5e-8.

    Args:
        names: names of the groups of a data set, without duplicates.

    Raises:
        UserError: a name is empty, or two names have the same number.
    """
    name_of: dict[int, str] = {}
    for name in names:
        if not name:
            raise UserError("a group has an empty name. Name the group, or give its samples no group")
        other = name_of.setdefault(group_number(name), name)
        if other != name:
            raise UserError(f"groups {other!r} and {name!r} have the same number. Rename one of them")
