"""Clusters of groups in an evaluation, against averaging by hand."""

import numpy as np
import pytest
import torch
from linear_model import linear_model
from made_up_context import make_context

from cmvae.clustering import clustering_metrics
from cmvae.evaluation.clustering import AGREEMENT, evaluate_clustering

NAMES, NUM_CLUSTERS, NUM_GROUPS = ("a", "b", "c"), 3, 9
CLASSES = ("zero", "one", "two")


@pytest.fixture
def model():
    """Locations are the first two pixels; three clusters in a row."""
    model = linear_model(NAMES, NUM_CLUSTERS)
    with torch.no_grad():
        model.cluster_prior.logits.zero_()
        model.cluster_prior.means.copy_(torch.tensor([[-4.0, 0], [0, 0], [4, 0], [90, 90]]))
        for name in NAMES:
            head = model.encoders[name].shared
            head.bias.zero_()
            head.weight.copy_(torch.eye(3)[:2])
    return model


@pytest.fixture
def data():
    """Nine groups of four noisy members that lack some modalities, and six samples without a group."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(4 * NUM_GROUPS + 6, generator=generator)
    group = torch.cat([torch.arange(NUM_GROUPS).repeat(4) + 2**62, torch.full((6,), -1)])[order]
    label = torch.where(group >= 0, (group - 2**62) % 3, order % 3)
    centres = torch.stack([4.0 * label - 4, torch.zeros(len(label)), torch.zeros(len(label))], dim=1)
    values = {
        name: (centres + 3 * torch.randn(len(label), 3, generator=generator))[:, None, None] for name in NAMES
    }
    mask = torch.rand(len(label), 3, generator=generator) < 0.6
    mask[:, 0] |= ~mask.any(1)
    # A group counts where one of its members has a label.
    known = torch.where((group == 2**62) & (torch.arange(len(label)) % 2 == 0), -1, label)
    return {**values, "mask": mask, "group": group, "label": known}


def evaluate(model, data, tmp_path, class_names=CLASSES):
    context = make_context(model, {"test": data}, class_names, batch_size=7)
    return evaluate_clustering(context, tmp_path)


def by_hand(data, places):
    """Nearest centre of each group's geometric median, with the labels of the groups, one group at a time."""
    z = np.stack([data[name].numpy()[:, 0, 0, :2] for name in NAMES], axis=1)
    present = data["mask"].numpy()
    numbers = [*range(NUM_GROUPS)]
    members = [np.flatnonzero(data["group"].numpy() == number + 2**62) for number in numbers]
    members += [np.array([n]) for n in np.flatnonzero(data["group"].numpy() < 0)]
    clusters, labels = [], []
    for rows in members:
        means = [z[rows[present[rows, m]], m].mean(axis=0) for m in places if present[rows, m].any()]
        known = [int(label) for label in data["label"][rows] if label >= 0]
        if not means or not known:
            continue
        grid = np.stack(np.meshgrid(np.linspace(-9, 9, 361), np.linspace(-9, 9, 361)), axis=-1)
        distances = sum(np.linalg.norm(grid - mean, axis=-1) for mean in means)
        flat = grid[np.unravel_index(distances.argmin(), distances.shape)]
        joint = np.mean(means, axis=0) if len(means) < 3 else flat
        clusters.append(int(np.abs(joint[0] - np.array([-4, 0, 4])).argmin()))
        labels.append(known[0])
    return clustering_metrics(np.array(clusters), np.array(labels))


def test_groups_agree_with_averaging_by_hand(model, data, tmp_path):
    result = evaluate(model, data, tmp_path)
    assert result.metrics["clustering/by_group/num_groups"] == NUM_GROUPS + 6
    assert result.protocol["clustering.num_labelled_groups"] == NUM_GROUPS + 6
    assert "mean of its members' locations" in result.protocol["clustering.by_group"]
    for prefix, places in {"": [0, 1, 2], "from/a/": [0], "from/b/": [1], "from/c/": [2]}.items():
        expected = by_hand(data, places)
        for name in AGREEMENT:
            assert result.metrics[f"clustering/by_group/{prefix}{name}"] == pytest.approx(expected[name])
    # Four members tell more than one.
    assert result.metrics["clustering/by_group/acc"] > result.metrics["clustering/acc"]


def test_a_split_without_groups_has_no_metrics_of_them(model, data, tmp_path):
    del data["group"]
    result = evaluate(model, data, tmp_path)
    assert not [name for name in [*result.metrics, *result.protocol] if "group" in name]


def test_groups_without_labels_are_counted_and_the_rest_is_left_out(model, data, tmp_path):
    result = evaluate(model, {**data, "label": torch.full_like(data["label"], -1)}, tmp_path, None)
    found = [name for name in result.metrics if "by_group" in name]
    assert found == ["clustering/by_group/num_groups"]
    assert "no group of the test split has a label" in result.left_out["clustering/by_group/acc"]
