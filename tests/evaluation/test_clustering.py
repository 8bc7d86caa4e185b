"""Encoding a split and evaluating its clusters, from models whose clusters are known."""

import numpy as np
import pytest
import torch

from cmvae.config import ModalityConfig, ModelConfig
from cmvae.data.schema import ModalitySchema
from cmvae.evaluation.clustering import EncodedSplit, all_log_weights, encode_split, evaluate_clusters
from cmvae.model import CMVAE

SCHEMA = ModalitySchema(kind="image", shape=(1, 8, 8), dtype="uint8")


@pytest.fixture
def model():
    torch.manual_seed(0)
    modalities = {name: ModalityConfig(width=2) for name in ("a", "b")}
    config = ModelConfig(shared_dim=3, private_dim=2, num_clusters=4, modalities=modalities)
    return CMVAE(config, dict.fromkeys(modalities, SCHEMA)).eval()


def raw_batch(seed, valid):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (len(valid), 1, 8, 8), generator=generator, dtype=torch.uint8)
    return {
        "a": images,
        "b": images.flip(-1),
        "label": torch.arange(len(valid)),
        "key": [f"{seed}-{i}" for i in range(len(valid))],
        "valid": torch.tensor(valid),
    }


def test_a_split_is_encoded_once_without_its_padding(model):
    batches = [raw_batch(0, [True] * 4), raw_batch(1, [True, True, False, False])]
    split = encode_split(model, batches)
    assert split.label.tolist() == [0, 1, 2, 3, 0, 1]
    assert split.log_density.shape == (6, 2, 4)
    images = torch.cat([batches[0]["b"], batches[1]["b"][:2]]) / 255
    loc = model.encode({"b": images})["b"].shared.loc
    np.testing.assert_allclose(split.shared_loc[:, 1], loc.detach().numpy(), rtol=1e-4, atol=1e-5)
    expected = -np.abs(split.shared_loc[:, :, None] - model.cluster_prior.means.detach().numpy()).sum(-1)
    np.testing.assert_allclose(split.log_density, expected - 3 * np.log(2), rtol=1e-4, atol=1e-4)


def test_all_log_weights_ignore_the_selection(model):
    model.cluster_prior.active[1] = False
    np.testing.assert_allclose(all_log_weights(model), np.log(0.25), rtol=1e-6)


def split_of(clusters, labels):
    density = np.full((len(clusters), 2, 4), -30.0)
    for i, cluster in enumerate(clusters):
        density[i, :, cluster] = 0
    return EncodedSplit(density, np.zeros((len(clusters), 2, 3)), np.array(labels))


def test_metrics_count_selected_clusters_and_compare_with_all():
    # Cluster 3 splits class 1; without it its sample falls to the next best, here cluster 1.
    split = split_of([0, 0, 1, 1, 3], [0, 0, 1, 1, 1])
    split.log_density[4, :, 1] = -5
    active = np.array([True, True, False, False])
    metrics, assignments = evaluate_clusters(split, np.log(np.full(4, 0.25)), active)
    assert metrics["clustering/num_clusters"] == 2
    assert metrics["clustering/acc"] == 1
    assert metrics["clustering_all/acc"] == pytest.approx(4 / 5)
    assert assignments.tolist() == [0, 0, 1, 1, 1]


def test_unlabelled_data_has_clusters_but_no_scores():
    metrics, assignments = evaluate_clusters(
        split_of([0, 2], [-1, -1]), np.log(np.full(4, 0.25)), np.ones(4, dtype=bool)
    )
    assert metrics == {"clustering/num_clusters": 4}
    assert assignments.tolist() == [0, 2]
