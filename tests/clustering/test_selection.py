from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as entropy_of
from sklearn.metrics import mutual_info_score
from torch.distributions import Laplace, Normal

from cmvae.clustering import (
    MEANS_SPREAD,
    clustering_metrics,
    confidence,
    confusion,
    find_cluster_means,
    merge_pieces,
    responsibilities,
    select_clusters,
    vote,
)
from cmvae.clustering.refit import piece_agreement

FAMILIES = {"normal": Normal, "laplace": Laplace}


class SimulatedEncodings:
    """Encodings of a trained CMVAE: data in `num_true` clusters, and a prior with more components.

    `num_duplicates` of the superfluous components are close to a used one and share its weight. The others
    lie away from the data and have almost no weight.
    """

    def __init__(
        self,
        seed: int,
        num_true: int,
        family: str,
        *,
        num_clusters: int = 40,
        num_samples: int = 1500,
        num_modalities: int = 3,
        shared_dim: int = 16,
        spread: float = 2.0,
        num_duplicates: int = 3,
    ) -> None:
        rng = np.random.default_rng(seed)
        self.family, self.shared_dim = FAMILIES[family], shared_dim
        true_means = rng.normal(size=(num_true, shared_dim)) * spread
        duplicated = rng.choice(num_true, size=num_duplicates, replace=False)
        duplicates = true_means[duplicated] + rng.normal(size=(num_duplicates, shared_dim)) * 0.05
        num_empty = num_clusters - num_true - num_duplicates
        empty = rng.normal(size=(num_empty, shared_dim)) * spread
        weights = np.concatenate(
            [
                np.full(num_true, 1 / num_true),
                np.full(num_duplicates, 0.4 / num_true),
                np.full(num_empty, 1e-4),
            ]
        )
        weights[duplicated] *= 0.6
        # The components of a trained prior have no order.
        order = rng.permutation(num_clusters)
        self.means = torch.from_numpy(np.concatenate([true_means, duplicates, empty])[order])
        self.log_weights = np.log(weights / weights.sum())[order]
        self.labels = rng.permutation(np.arange(num_samples) % num_true)
        draw = rng.normal if family == "normal" else rng.laplace
        noise = draw(size=(num_samples, num_modalities, shared_dim)) * 0.7
        self.z = torch.from_numpy(true_means[self.labels][:, None] + noise)

    def log_density(self, clusters: np.ndarray | None = None) -> np.ndarray:
        """log p(z | c) of the given clusters, or of all, (N, M, C')."""
        means = self.means if clusters is None else self.means[clusters]
        prior = self.family(means, torch.ones_like(means))
        return prior.log_prob(self.z[:, :, None, :]).sum(-1).numpy()


def brute_force_responsibilities(
    log_density: np.ndarray, log_weights: np.ndarray, active: np.ndarray
) -> np.ndarray:
    result = np.zeros(log_density.shape)
    for n, m in np.ndindex(log_density.shape[:2]):
        joint = {c: math.exp(log_weights[c] + log_density[n, m, c]) for c in np.flatnonzero(active)}
        for c, value in joint.items():
            result[n, m, c] = value / sum(joint.values())
    return result


def stepwise_selection(
    encodings: SimulatedEncodings, beta: float, normaliser: str
) -> tuple[list[float], list[int]]:
    """The selection as in the paper, with p(z|c) of the remaining clusters computed again at each step."""
    remaining = list(range(len(encodings.log_weights)))
    num_modalities = encodings.z.shape[1]
    criterion, dropped = [], []
    while True:
        logits = torch.from_numpy(encodings.log_weights[remaining])
        prior = torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(logits=logits),
            torch.distributions.Independent(
                encodings.family(
                    encodings.means[remaining], torch.ones(len(remaining), encodings.shared_dim)
                ),
                1,
            ),
        )
        entropies, likelihoods, mass = [], [], dict.fromkeys(remaining, 0.0)
        for m in range(num_modalities):
            z = encodings.z[:, m]
            joint = prior.component_distribution.log_prob(z[:, None]) + torch.log_softmax(logits, 0)
            posterior = torch.distributions.Categorical(logits=joint)
            entropies.append(posterior.entropy().mean().item())
            likelihoods.append(prior.log_prob(z).mean().item())
            for probabilities in posterior.probs:
                mass[remaining[int(probabilities.argmax())]] += probabilities.max().item()
        active = max(2, sum(value > 0 for value in mass.values()))
        count = active if normaliser == "active" else len(encodings.log_weights)
        criterion.append(
            beta * np.mean(entropies) / math.log(count) - np.mean(likelihoods) / encodings.shared_dim
        )
        if len(remaining) == 2:
            return criterion, dropped
        worst = min(remaining, key=lambda c: (mass[c], encodings.log_weights[c]))
        dropped.append(worst)
        remaining.remove(worst)


@pytest.fixture
def scores() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    log_weights = np.log(rng.dirichlet(np.ones(6)))
    active = np.array([True, False, True, True, False, True])
    return rng.normal(size=(7, 3, 6)) * 3, log_weights, active


def test_responsibilities_equal_bayes_rule(scores: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    posterior = responsibilities(*scores)
    np.testing.assert_allclose(posterior, brute_force_responsibilities(*scores), rtol=1e-12)
    assert (posterior[..., ~scores[2]] == 0).all()


def test_responsibilities_survive_densities_that_underflow(
    scores: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    log_density, log_weights, active = scores
    np.testing.assert_allclose(
        responsibilities(log_density - 5000, log_weights, active),
        responsibilities(log_density, log_weights, active),
        rtol=1e-9,
    )


def test_responsibilities_reject_invalid_arguments(
    scores: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    log_density, log_weights, active = scores
    with pytest.raises(ValueError, match="at least one"):
        responsibilities(log_density, log_weights, np.zeros(6, dtype=bool))
    with pytest.raises(ValueError, match=r"\(N, M, C\)"):
        responsibilities(log_density, log_weights[:5], active)
    broken = log_density.copy()
    broken[0, 0, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        responsibilities(broken, log_weights, active)


@pytest.mark.parametrize(
    ("modalities", "expected"),
    [
        pytest.param([[0.2, 0.8]], 1, id="one modality decides"),
        pytest.param([[0.6, 0.4], [0.1, 0.9]], 1, id="the more confident of two that disagree decides"),
        pytest.param([[0.6, 0.4], [0.9, 0.1]], 0, id="two that agree"),
        pytest.param([[0.6, 0.4], [0.6, 0.4], [0.0, 1.0]], 0, id="the mode beats one confident modality"),
        pytest.param([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6], [0.2, 0.7, 0.1]], 1, id="three different choices"),
        pytest.param(
            [[0.6, 0.4, 0.0], [0.6, 0.4, 0.0], [0.1, 0.9, 0.0], [0.4, 0.5, 0.1], [0.0, 0.0, 1.0]],
            1,
            id="a tie goes to the most confident of the tied, not of all",
        ),
    ],
)
def test_vote(modalities: list[list[float]], expected: int) -> None:
    # The second sample is certain of the last cluster: samples must not mix.
    other = np.zeros_like(modalities)
    other[:, -1] = 1.0
    votes = vote(np.array([modalities, other]))
    assert votes.tolist() == [expected, len(modalities[0]) - 1]


def test_confidence_is_the_mean_responsibility_of_the_vote() -> None:
    posterior = np.array([[[0.6, 0.4], [0.8, 0.2], [0.1, 0.9]]])
    np.testing.assert_allclose(confidence(posterior, vote(posterior)), [(0.6 + 0.8 + 0.1) / 3])


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("num_true", "num_modalities", "shared_dim", "beta"),
    [(3, 3, 16, 2.5), (10, 5, 32, 2.5), (25, 3, 32, 1.0)],
)
def test_selection_finds_the_true_number(
    num_true: int, num_modalities: int, shared_dim: int, beta: float, family: str, seed: int
) -> None:
    encodings = SimulatedEncodings(
        seed, num_true, family, num_modalities=num_modalities, shared_dim=shared_dim
    )
    log_density = encodings.log_density()
    selection = select_clusters(log_density, encodings.log_weights, beta, shared_dim)
    assert selection.active.sum() == num_true
    assignments = vote(responsibilities(log_density, encodings.log_weights, selection.active))
    metrics = clustering_metrics(assignments, encodings.labels)
    assert metrics["num_clusters"] == num_true
    assert metrics["acc"] > 0.99


@pytest.mark.parametrize("normaliser", ["active", "initial"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_encoding_pass_equals_encoding_at_every_step(family: str, normaliser: str) -> None:
    # Clusters are close, so that entropies and masses are not trivial.
    encodings = SimulatedEncodings(
        5, 6, family, num_clusters=12, num_samples=200, shared_dim=4, spread=1.0, num_duplicates=3
    )
    selection = select_clusters(encodings.log_density(), encodings.log_weights, 2.5, 4, normaliser)
    criterion, dropped = stepwise_selection(encodings, 2.5, normaliser)
    np.testing.assert_allclose(selection.criterion, criterion, rtol=1e-6)
    assert selection.dropped.tolist() == dropped
    kept = set(range(12)) - set(dropped[: int(np.argmin(criterion))])
    assert set(np.flatnonzero(selection.active)) == kept


def test_selection_describes_its_curve() -> None:
    encodings = SimulatedEncodings(0, 5, "normal", num_clusters=9, num_samples=300)
    log_density = encodings.log_density()
    before = log_density.copy()
    selection = select_clusters(log_density, encodings.log_weights, 2.5, 16)
    np.testing.assert_array_equal(log_density, before)
    assert selection.num_clusters.tolist() == [9, 8, 7, 6, 5, 4, 3, 2]
    assert len(set(selection.dropped)) == len(selection.dropped) == 7
    np.testing.assert_allclose(selection.criterion, selection.entropy_term + selection.likelihood_term)
    assert selection.entropy_term.min() >= 0
    assert selection.entropy_term.max() <= 2.5


def test_the_active_normaliser_merges_fewer_overlapping_clusters() -> None:
    # This is why "active" is the default: it merges few clusters, "initial" nearly all.
    encodings = SimulatedEncodings(0, 25, "normal", spread=0.7)
    log_density = encodings.log_density()

    def used(normaliser: str) -> tuple[int, float]:
        selection = select_clusters(log_density, encodings.log_weights, 2.5, 16, normaliser)
        assignments = vote(responsibilities(log_density, encodings.log_weights, selection.active))
        return int(selection.active.sum()), clustering_metrics(assignments, encodings.labels)["acc"]

    num_active, acc_active = used("active")
    num_initial, acc_initial = used("initial")
    assert num_active > num_initial
    assert acc_active > 0.8
    assert acc_initial < 0.5


def test_selection_rejects_a_single_cluster() -> None:
    with pytest.raises(ValueError, match="two clusters"):
        select_clusters(np.zeros((4, 2, 1)), np.zeros(1), 1.0, 2)


@pytest.mark.parametrize(("num_clusters", "num_classes"), [(4, 4), (6, 4), (3, 5)])
def test_accuracy_is_the_best_over_all_matchings(num_clusters: int, num_classes: int) -> None:
    rng = np.random.default_rng(num_clusters)
    labels = rng.integers(num_classes, size=300)
    assignments = np.where(rng.random(300) < 0.5, labels % num_clusters, rng.integers(num_clusters, size=300))
    # After the selection, cluster ids have gaps.
    gapped = assignments * 7 + 3
    size = max(num_clusters, num_classes)
    best = max(
        np.mean(np.array(match)[assignments] == labels) for match in itertools.permutations(range(size))
    )
    metrics = clustering_metrics(gapped, labels)
    assert metrics["acc"] == pytest.approx(best)
    assert metrics["num_clusters"] == num_clusters


def test_a_perfect_clustering_with_other_ids_has_perfect_scores() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2, 2])
    metrics = clustering_metrics(np.array([9, 9, 4, 4, 0, 0, 0]), labels)
    assert metrics == pytest.approx({"num_clusters": 3, "acc": 1, "nmi": 1, "ari": 1, "purity": 1})


def test_split_classes_lower_accuracy_but_not_purity() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    metrics = clustering_metrics(np.array([0, 0, 0, 1, 2, 2, 2, 2]), labels)
    assert metrics["purity"] == 1
    assert metrics["acc"] == pytest.approx(7 / 8)


def test_confusion_orders_clusters_by_the_class_they_match() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    assignments = np.array([7, 7, 7, 2, 2, 7, 5, 5, 5, 4])
    counts, cluster_ids = confusion(assignments, labels, num_classes=3)
    assert cluster_ids.tolist() == [7, 2, 5, 4]
    assert counts.tolist() == [[3, 0, 0, 0], [1, 2, 0, 0], [0, 0, 3, 1]]


def test_confusion_with_fewer_clusters_than_classes() -> None:
    counts, cluster_ids = confusion(np.array([1, 1, 1, 8, 8]), np.array([2, 2, 0, 1, 1]), num_classes=4)
    assert cluster_ids.tolist() == [8, 1]
    assert counts.tolist() == [[0, 1], [2, 0], [0, 2], [0, 0]]


def test_confusion_rejects_samples_without_a_label() -> None:
    with pytest.raises(ValueError, match="without a label"):
        confusion(np.array([0, 1]), np.array([0, -1]), num_classes=2)


def slow_vote(rows):
    """Cluster and confidence of one sample, from the responsibilities (C,) of its modalities."""
    choices = [max(range(len(row)), key=lambda c, row=row: row[c]) for row in rows]
    most = max(choices.count(choice) for choice in choices)
    leading = [
        (row[choice], choice)
        for row, choice in zip(rows, choices, strict=True)
        if choices.count(choice) == most
    ]
    cluster = max(leading)[1]
    return cluster, sum(row[cluster] for row in rows) / len(rows)


@pytest.mark.parametrize("num_modalities", [1, 2, 3, 5])
def test_missing_modalities_neither_vote_nor_count(num_modalities):
    rng = np.random.default_rng(num_modalities)
    probabilities = rng.dirichlet(np.full(4, 0.4), size=(300, num_modalities))
    present = rng.random((300, num_modalities)) < 0.6
    present[np.arange(300), rng.integers(num_modalities, size=300)] = True
    expected = [
        slow_vote([row.tolist() for row in probabilities[n, present[n]]]) for n in range(len(present))
    ]
    clusters = vote(probabilities, present)
    assert clusters.tolist() == [cluster for cluster, _ in expected]
    np.testing.assert_allclose(confidence(probabilities, clusters, present), [c for _, c in expected])
    if num_modalities > 1:
        assert (clusters != vote(probabilities)).any(), "otherwise the mask makes no difference"
    everything = np.ones_like(present)
    np.testing.assert_array_equal(vote(probabilities, everything), vote(probabilities))


def test_cluster_means_lie_on_the_data_and_share_the_largest_centres():
    rng = np.random.default_rng(0)
    places = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    sizes = [50, 400, 150]
    points = np.repeat(places, sizes, axis=0) + 0.01 * rng.standard_normal((600, 2))
    # Some samples lack the second modality; its locations are then arbitrary.
    shared_loc = np.stack([points, points], axis=1)[rng.permutation(600)]
    present = np.ones((600, 2), dtype=bool)
    present[:100, 1] = False
    shared_loc[:100, 1] = -50
    means = find_cluster_means(shared_loc, present, num_clusters=5)
    assert means.shape == (5, 2)
    assert means.dtype == np.float32
    distances = np.abs(means[:, None] - places).max(axis=2)
    assert (distances.min(axis=1) < MEANS_SPREAD + 0.01).all()
    assert np.bincount(distances.argmin(axis=1)).tolist() == [1, 2, 2], (
        "five means on three centres, two of them shared"
    )
    assert len(np.unique(means, axis=0)) == 5, (
        "means at the same centre must differ, so that training can separate them"
    )
    assert (find_cluster_means(shared_loc, present, 5) == means).all()


def test_pieces_of_one_class_are_merged_and_classes_stay_apart():
    """Six pieces: two of class 0, three of class 1, drawn independently per modality, and one of class 2."""
    rng = np.random.default_rng(0)
    label = rng.choice(3, size=3000, p=[0.6, 0.37, 0.03])
    of_class = [[0, 3], [1, 4, 5], [2]]
    pieces = np.array([[rng.choice(of_class[c]) for _ in range(3)] for c in label])
    # Each modality takes one sample in twenty for another class.
    wrong = rng.random(pieces.shape) < 0.05
    pieces[wrong] = rng.integers(6, size=wrong.sum())
    pieces[rng.random(pieces.shape) < 0.2] = -1
    assert merge_pieces(pieces, 6).tolist() == [0, 1, 2, 0, 1, 1]
    # Another piece, of samples with one modality only.
    lone = np.tile([-1, 6, -1], (100, 1))
    assert merge_pieces(np.concatenate([pieces, lone]), 7).tolist() == [0, 1, 2, 0, 1, 1, 3]
    alone = np.where(np.arange(3) == 1, pieces, -1)
    assert merge_pieces(alone, 6).tolist() == list(range(6)), "agreement needs two modalities"


def test_piece_agreement_is_the_information_lost_by_merging():
    """Against scikit-learn's mutual information before and after merging."""
    rng = np.random.default_rng(1)
    one = rng.integers(4, size=500)
    other = np.where(rng.random(500) < 0.6, one, rng.integers(4, size=500))
    left, right = np.concatenate([one, other]), np.concatenate([other, one])
    joint = np.zeros((4, 4))
    np.add.at(joint, (left, right), 1 / 1000)
    found = piece_agreement(joint)
    assert np.isinf(found.diagonal()).all()
    np.testing.assert_allclose(found, found.T)
    for first, second in itertools.combinations(range(4), 2):
        merged = [np.where(pieces == second, first, pieces) for pieces in (left, right)]
        loss = mutual_info_score(left, right) - mutual_info_score(*merged)
        either = np.isin(left, (first, second))
        entropy_of_which = either.mean() * entropy_of(np.bincount(left[either]))
        assert found[first, second] == pytest.approx(loss / entropy_of_which)
