import argparse

import numpy as np
import pytest

from cmvae.datasets.splits import draw_splits, fractions
from cmvae.utils.errors import UserError

SPLITS = ["train", "validation", "test"]


def draw(groups, shares=(0.8, 0.1, 0.1), seed=0, labels=None):
    return draw_splits(np.asarray(groups), shares, np.random.default_rng(seed), labels)


def test_every_row_is_in_one_split_of_the_promised_size():
    for number in (10, 37, 1000):
        splits = draw(np.arange(number))
        assert list(splits) == SPLITS
        assert sorted(np.concatenate(list(splits.values())).tolist()) == list(range(number))
        assert abs(len(splits["train"]) - 0.8 * number) <= 1
        assert abs(len(splits["test"]) - 0.1 * number) <= 1


def test_every_split_has_its_share_of_every_class():
    labels = np.repeat([0, 1, 2, 3], [500, 100, 41, 7])
    splits = draw(np.arange(len(labels)), (0.7, 0.2, 0.1), labels=labels)
    for split, share in zip(SPLITS, (0.7, 0.2, 0.1), strict=True):
        found = np.bincount(labels[splits[split]], minlength=4)
        assert np.abs(found - share * np.bincount(labels)).max() <= 2


def test_a_group_is_never_cut():
    groups = np.random.default_rng(3).integers(40, size=300)
    splits = draw(groups)
    held = [set(groups[splits[split]].tolist()) for split in SPLITS]
    assert not held[0] & held[1]
    assert not held[0] & held[2]
    assert not held[1] & held[2]
    assert [len(found) for found in held] == [32, 4, 4]


def test_the_draw_is_random_and_of_the_seed():
    first, again, other = (draw(np.arange(200), seed=seed)["test"].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_a_split_without_a_share_stays_empty_and_one_with_a_share_does_not():
    splits = draw(np.arange(10), (0.9, 0.1, 0.0))
    assert [len(splits[split]) for split in SPLITS] == [9, 1, 0]
    with pytest.raises(UserError, match="3 samples or groups are too few"):
        draw([0, 1, 2, 2])


@pytest.mark.parametrize("text", ["0.5,0.5", "a,b,c", "1,0,0", "0.5,0.3,0.3", "1.2,-0.1,-0.1"])
def test_fractions_that_are_none_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        fractions(text)
    assert fractions("0.7,0.2,0.1") == (0.7, 0.2, 0.1)
