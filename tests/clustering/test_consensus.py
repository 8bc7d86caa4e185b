"""Agreement, choice and consensus of several runs, against brute force."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score

from cmvae.clustering.consensus import (
    choose_run,
    describe_disagreement,
    find_consensus,
    match_clusters,
    mean_agreement,
    pairwise_agreement,
)


def count_pairs(first, second):
    """Adjusted Rand index, by counting all pairs of samples."""
    pairs = list(itertools.combinations(range(len(first)), 2))
    together = [sum(labels[a] == labels[b] for a, b in pairs) for labels in (first, second)]
    both = sum(first[a] == first[b] and second[a] == second[b] for a, b in pairs)
    expected = together[0] * together[1] / len(pairs)
    return (both - expected) / (sum(together) / 2 - expected)


def noisy_runs(rng, num_runs=4, num_samples=60, num_clusters=4):
    """Runs with the same clusters under different ids, where a fifth of the samples is random."""
    truth = rng.integers(num_clusters, size=num_samples)
    runs = []
    for _ in range(num_runs):
        names = rng.permutation(np.arange(10))[:num_clusters]
        moved = np.where(rng.random(num_samples) < 0.2, rng.integers(num_clusters, size=num_samples), truth)
        runs.append(names[moved])
    return np.stack(runs)


def test_agreement_counts_pairs_of_samples_in_both_runs():
    rng = np.random.default_rng(0)
    runs = noisy_runs(rng)
    runs[1, :7] = -1
    runs[2, 3:15] = -1
    agreement = pairwise_agreement(runs)
    for a, b in itertools.combinations(range(4), 2):
        both = (runs[a] >= 0) & (runs[b] >= 0)
        assert agreement[a, b] == agreement[b, a] == pytest.approx(count_pairs(runs[a][both], runs[b][both]))
    assert agreement[0, 3] == pytest.approx(adjusted_rand_score(runs[0], runs[3]))
    np.testing.assert_array_equal(agreement.diagonal(), 1)
    expected = [np.mean([agreement[a, b] for b in range(4) if b != a]) for a in range(4)]
    np.testing.assert_allclose(mean_agreement(agreement), expected)


def test_runs_with_a_single_cluster_agree_with_no_other():
    found = np.array([0, 0, 1, 1, 2, 2])
    agreement = pairwise_agreement(np.stack([np.zeros(6, int), np.ones(6, int), found, found]))
    np.testing.assert_allclose(mean_agreement(agreement), [0, 0, 1 / 3, 1 / 3])
    assert choose_run(agreement, np.array([0.0, 0.0, -9.0, -8.0])) == 3


def test_runs_without_common_samples_cannot_be_compared():
    with pytest.raises(ValueError, match="runs 0 and 1"):
        pairwise_agreement(np.array([[0, 1, -1, -1], [-1, 0, 1, 1]]))


def test_the_run_that_agrees_most_is_chosen_and_the_bound_breaks_ties():
    agreement = np.array([[1, 0.9, 0.8], [0.9, 1, 0.2], [0.8, 0.2, 1]])
    assert choose_run(agreement, np.array([-9.0, -1.0, -1.0])) == 0
    pair = np.array([[1, 0.5], [0.5, 1]])
    assert choose_run(pair, np.array([-3.0, -2.0])) == 1
    assert choose_run(pair, np.array([-2.0, -3.0])) == 0


def test_renamed_clusters_are_matched_back():
    rng = np.random.default_rng(1)
    reference = rng.integers(5, size=40)
    names = np.array([7, 3, 0, 9, 2])
    np.testing.assert_array_equal(match_clusters(names[reference], reference), reference)


def test_no_other_matching_shares_more_samples():
    rng = np.random.default_rng(2)
    for _ in range(20):
        labels, reference = rng.integers(3, size=12), rng.integers(4, size=12)
        shared = (match_clusters(labels, reference) == reference).sum()
        most = max(
            sum(names[own] == other for own, other in zip(labels, reference, strict=True))
            for names in itertools.permutations(range(4), 3)
        )
        assert shared == most


def test_a_split_cluster_leaves_one_part_unmatched():
    reference = np.array([4, 4, 4, 4, 6, 6, -1])
    in_pieces = np.array([0, 0, 0, 1, 2, 2, 1])
    np.testing.assert_array_equal(match_clusters(in_pieces, reference), [4, 4, 4, -2, 6, 6, -2])
    merged = np.array([5, 5, 5, 5, 5, 5, -1])
    np.testing.assert_array_equal(match_clusters(merged, reference), [4, 4, 4, 4, 4, 4, -1])
    apart = np.array([-1, -1, -1, -1, -1, -1, 3])
    np.testing.assert_array_equal(match_clusters(apart, reference), [-1, -1, -1, -1, -1, -1, -2])


def test_consensus_is_the_most_frequent_cluster_of_each_sample():
    rng = np.random.default_rng(3)
    runs = noisy_runs(rng, num_runs=5)
    runs[4] = rng.integers(7, size=runs.shape[1])  # more clusters than the others: some stay unmatched
    runs[1, :5] = -1
    runs[:, 5] = -1
    consensus = find_consensus(runs, chosen=2)
    renamed = [match_clusters(run, runs[2]) for run in runs]
    for sample in range(runs.shape[1]):
        ballots = Counter(int(run[sample]) for run in renamed if run[sample] >= 0)
        voters = sum(int(run[sample]) != -1 for run in renamed)
        if voters == 0:
            assert (consensus.clusters[sample], consensus.confidence[sample]) == (-1, 0)
            continue
        winners = [cluster for cluster, count in ballots.items() if count == max(ballots.values())]
        assert consensus.clusters[sample] in winners
        if runs[2, sample] in winners:
            assert consensus.clusters[sample] == runs[2, sample]
        assert consensus.confidence[sample] == pytest.approx(max(ballots.values()) / voters)
    assert (consensus.clusters == -1).sum() == 1


def test_consensus_is_better_than_every_single_run():
    rng = np.random.default_rng(4)
    truth = rng.integers(4, size=500)
    runs = np.stack([np.where(rng.random(500) < 0.3, rng.integers(4, size=500), truth) for _ in range(9)])
    single = max(adjusted_rand_score(truth, run) for run in runs)
    consensus = find_consensus(runs, chosen=0)
    assert adjusted_rand_score(truth, consensus.clusters) > single + 0.2
    right = consensus.clusters == truth
    assert consensus.confidence[right].mean() > consensus.confidence[~right].mean() + 0.1


def test_only_disagreeing_runs_give_a_warning():
    assert describe_disagreement(0.9) is None
    warning = describe_disagreement(0.314)
    assert "0.31" in warning
    assert "Trust none of them" in warning
