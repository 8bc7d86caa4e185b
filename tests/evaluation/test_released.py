"""The released code's way of counting, on models whose clusters and latents are known."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from linear_model import linear_model
from made_up_context import make_context

from cmvae.clustering import clustering_metrics
from cmvae.config import ClustersConfig
from cmvae.evaluation.released import (
    evaluate_released_clustering,
    evaluate_released_probes,
    mode_of_modalities,
)
from cmvae.models.encoding import EncodedSplit, find_clusters

CENTRES = torch.tensor([[-20.0, 0.0], [20.0, 0.0], [20.0, 40.0]])


def test_the_lowest_of_the_most_frequent_clusters_wins():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(3), size=(300, 4))
    present = rng.random((300, 4)) < 0.7
    present[:, 0] = True
    for row, cluster in enumerate(mode_of_modalities(probabilities, present)):
        votes = Counter(probabilities[row, m].argmax() for m in range(4) if present[row, m])
        assert cluster == min(votes, key=lambda c: (-votes[c], c))


@pytest.fixture
def model():
    """z of both modalities is the first two pixels, w the third; three far clusters and one unused."""
    model = linear_model(("a", "b"), 3, raw_scale=-3.0)
    with torch.no_grad():
        model.cluster_prior.logits.zero_()
        model.cluster_prior.means.copy_(torch.cat([CENTRES, torch.tensor([[900.0, 900.0]])]))
        model.cluster_prior.active.fill_(True)
        for encoder in model.encoders.values():
            for head, weight in ((encoder.shared, torch.eye(3)[:2]), (encoder.private, torch.eye(3)[[2, 2]])):
                head.weight.copy_(weight)
                head.bias.zero_()
    return model


def split_of(num_samples, seed):
    label = torch.arange(num_samples) % 3
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([CENTRES[label], torch.zeros(num_samples, 1)], dim=1)
    x = x + 0.3 * torch.randn(num_samples, 3, generator=generator)
    return {"a": x[:, None, None, :], "b": x[:, None, None, :].clone(), "label": label}


@pytest.fixture
def data():
    return {"train": split_of(300, 0), "validation": split_of(90, 1), "test": split_of(60, 2)}


def save_export(model, split, folder, criterion):
    locations = np.stack([split[name][:, 0, 0, :2].numpy() for name in "ab"], axis=1)
    encoded = EncodedSplit(
        model.log_density(locations),
        locations,
        np.ones(locations.shape[:2], dtype=bool),
        split["label"].numpy(),
        np.full(locations.shape[:2], 0.04),
    )
    clusters = find_clusters(model, encoded, encoded, 1.0, ClustersConfig(criterion=criterion))
    model.cluster_prior.take(clusters[0], clusters[1].num_clusters)
    model.save_pretrained(folder, clusters)


@pytest.mark.parametrize("criterion", ["entropy", "silhouette"])
def test_pruning_starts_from_all_clusters_and_every_step_is_counted(model, data, tmp_path, criterion):
    save_export(model, data["validation"], tmp_path, criterion)
    context = make_context(model, data, ("0", "1", "2"))
    result = evaluate_released_clustering(context, tmp_path, beta=1.0)
    assert result.left_out == {}
    assert result.metrics == {
        "released/clustering/num_clusters": 3,
        "released/clustering/acc": 1,
        "released/clustering/nmi": pytest.approx(1),
        "released/clustering/ari": pytest.approx(1),
    }
    assert result.protocol["released.clustering.num_clusters_at_start"] == 4
    (accuracy, *_), selected = result.figures["released_pruning"].axes[0].lines, 3
    scores = dict(zip(*accuracy.get_data(), strict=True))
    assert set(scores) == {4, 3, 2}
    assert scores[selected] == 1
    # Two clusters of three equal classes are right on two thirds.
    assert scores[2] == pytest.approx(2 / 3)
    # The evaluation did not change the model.
    assert model.cluster_prior.active.sum() == 3


def test_clusters_are_read_from_samples_of_the_posteriors(model, data, tmp_path):
    save_export(model, data["validation"], tmp_path, "entropy")
    # Posteriors as wide as the distances between clusters: locations are right, samples are not.
    for encoder in model.encoders.values():
        encoder.raw_scale = 20.0
    locations = data["test"]["a"][:, 0, 0, :2].numpy()[:, None]
    at_locations = clustering_metrics(
        mode_of_modalities(model.cluster_probabilities(locations), np.ones((60, 1), bool)),
        data["test"]["label"].numpy(),
    )
    assert at_locations["acc"] == 1
    result = evaluate_released_clustering(make_context(model, data, ("0", "1", "2")), tmp_path, beta=1.0)
    assert result.metrics["released/clustering/acc"] < 0.95


def test_probes_are_linear_and_not_on_each_latent_and_on_all_z(model, data):
    metrics = evaluate_released_probes(make_context(model, data, ("0", "1", "2"))).metrics
    single = {f"{latent}/{name}" for latent in ("z", "w", "both") for name in "ab"}
    assert set(metrics) == {f"probe/{probe}" for probe in single} | {
        f"released/probe/{kind}/{probe}" for kind in ("linear", "mlp") for probe in {*single, "z/all"}
    }
    assert all(metrics[f"released/probe/linear/{probe}"] == metrics[f"probe/{probe}"] for probe in single)
    for kind in ("linear", "mlp"):
        for probe in ("z/a", "z/b", "both/a", "z/all"):
            assert metrics[f"released/probe/{kind}/{probe}"] == 1
        assert metrics[f"released/probe/{kind}/w/a"] == pytest.approx(1 / 3, abs=0.2)


def test_only_a_nonlinear_probe_reads_what_is_not_linear(model):
    """The class is the sign of the product of the two dimensions of z."""

    def split(num_samples, seed):
        x = torch.randn(num_samples, 3, generator=torch.Generator().manual_seed(seed))
        label = (x[:, 0] * x[:, 1] > 0).long()
        return {"a": x[:, None, None, :], "b": x[:, None, None, :].clone(), "label": label}

    context = make_context(model, {"train": split(2000, 0), "test": split(500, 1)}, ("0", "1"))
    metrics = evaluate_released_probes(context).metrics
    assert metrics["released/probe/linear/z/a"] < 0.65
    assert metrics["released/probe/mlp/z/a"] > 0.9


def test_what_there_is_not_is_said(model, data, tmp_path):
    unlabelled = {split: {name: values[name] for name in "ab"} for split, values in data.items()}
    context = make_context(model, unlabelled)
    reason = "the data has no labels"
    assert evaluate_released_probes(context).left_out == {"probe": reason, "released/probe": reason}
    save_export(model, data["validation"], tmp_path, "entropy")
    result = evaluate_released_clustering(context, tmp_path, beta=1.0)
    assert set(result.metrics) == {"released/clustering/num_clusters"}
    assert result.left_out == {"released/clustering/acc": "there are no labels"}
