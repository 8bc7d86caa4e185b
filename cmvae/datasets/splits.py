"""Draw train, validation and test splits: stratified by class, groups kept together."""

from __future__ import annotations

import argparse

import numpy as np

from cmvae.data.index import SplitName
from cmvae.utils.errors import UserError

Splits = dict[SplitName, np.ndarray]
"""Row numbers of each split, in increasing order."""

DEFAULT_FRACTIONS = (0.8, 0.1, 0.1)


def fractions(text: str) -> tuple[float, float, float]:
    """Type of a command-line flag: shares of train, validation and test, such as `0.8,0.1,0.1`."""
    try:
        train, validation, test = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give three numbers, such as 0.8,0.1,0.1") from None
    if min(train, validation, test) <= 0 or abs(train + validation + test - 1) > 1e-6:
        raise argparse.ArgumentTypeError(f"{text}: must be above 0 and add up to 1")
    return train, validation, test


def fractions_text(shares: tuple[float, float, float]) -> str:
    """The inverse of `fractions`."""
    return ",".join(f"{share:g}" for share in shares)


def draw_splits(
    groups: np.ndarray,
    shares: tuple[float, float, float],
    rng: np.random.Generator,
    labels: np.ndarray | None = None,
) -> Splits:
    """Assign groups of rows to the splits at random.

    Args:
        groups: (N,) group of each row; a group is never divided.
        shares: shares of train, validation and test in the number of groups; one of the last two may be 0.
        rng: random number generator.
        labels: (N,) class of each row; every split gets its share of every class, up to one group.

    Raises:
        UserError: there are too few groups for a split with a share above 0.
    """
    _, first, group_of_row = np.unique(groups, return_index=True, return_inverse=True)
    order = rng.permutation(len(first))
    if labels is not None:
        # Sorted by class, shuffled within: every n-th group is then a stratified choice.
        order = order[np.argsort(labels[first][order], kind="stable")]
    held_out = shares[1] + shares[2]
    is_held_out = _every(len(order), held_out)
    is_test = _every(int(is_held_out.sum()), shares[2] / held_out)
    chosen: dict[SplitName, np.ndarray] = {
        "train": order[~is_held_out],
        "validation": order[is_held_out][~is_test],
        "test": order[is_held_out][is_test],
    }
    for (split, members), share in zip(chosen.items(), shares, strict=True):
        if share > 0 and len(members) == 0:
            raise UserError(
                f"{len(order)} samples or groups are too few to draw a {split} split of {share:g}. "
                "Give more data, or other --fractions"
            )
    return {split: np.flatnonzero(np.isin(group_of_row, members)) for split, members in chosen.items()}


def _every(number: int, share: float) -> np.ndarray:
    """(number,) bool: a `share` of True values, evenly spaced."""
    return np.diff(np.floor(np.arange(number + 1) * share + 0.5)) > 0
