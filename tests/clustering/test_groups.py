"""Numbering and labels of groups of samples."""

import numpy as np

from cmvae.clustering import label_by_group, number_groups


def test_samples_without_a_group_are_groups_of_their_own():
    numbered = number_groups(np.array([900, -1, 7, 900, -1, 7]))
    assert numbered.tolist() == [1, 2, 0, 1, 3, 0]
    assert number_groups(np.full(3, -1)).tolist() == [0, 1, 2]


def test_a_group_has_the_most_frequent_label_of_its_members():
    groups = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    labels = np.array([5, 2, 5, 4, 3, -1, -1, 0])
    assert label_by_group(labels, groups).tolist() == [5, 3, -1, 0]
    assert label_by_group(np.array([-1, -1]), np.array([0, 1])).tolist() == [-1, -1]
