"""Encoding a split and evaluating its clusters, from models whose clusters are known."""

from itertools import chain, combinations

import numpy as np
import pytest
import torch
from linear_model import linear_model
from made_up_context import make_context

from cmvae.config import ClustersConfig, ModalityConfig, ModelConfig
from cmvae.evaluation.clustering import (
    AGREEMENT,
    evaluate_clustering,
    evaluate_clusters,
    modality_subsets,
)
from cmvae.modalities import ImageModality
from cmvae.models.cmvae import CMVAE
from cmvae.models.encoding import (
    EncodedSplit,
    all_log_weights,
    encode_split,
    find_clusters,
    select_model_clusters,
)
from cmvae.utils.errors import UserError

MODALITY = ImageModality(shape=(1, 8, 8))


@pytest.fixture
def model():
    torch.manual_seed(0)
    modalities = {name: ModalityConfig(width=2) for name in ("a", "b")}
    config = ModelConfig(shared_dim=3, private_dim=2, num_clusters=4, modalities=modalities)
    return CMVAE(config, dict.fromkeys(modalities, MODALITY)).eval()


def raw_batch(seed, valid):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (len(valid), 1, 8, 8), generator=generator, dtype=torch.uint8)
    return {
        "a": images,
        "b": images.flip(-1),
        "label": torch.arange(len(valid)),
        "key": [f"{seed}-{i}" for i in range(len(valid))],
        "mask": torch.ones(len(valid), 2, dtype=torch.bool),
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
    return EncodedSplit(
        density, np.zeros((len(clusters), 2, 3)), np.ones((len(clusters), 2), dtype=bool), np.array(labels)
    )


def test_metrics_count_selected_clusters(model):
    # Cluster 3 splits class 1; without it its sample falls to the next best, here cluster 1.
    split = split_of([0, 0, 1, 1, 3], [0, 0, 1, 1, 1])
    split.log_density[4, :, 1] = -5
    model.cluster_prior.active[2:] = False
    metrics, assignments = evaluate_clusters(model, split)
    assert metrics["clustering/num_clusters"] == 2
    assert metrics["clustering/acc"] == 1
    assert assignments.tolist() == [0, 0, 1, 1, 1]


def test_unlabelled_data_has_clusters_but_no_scores(model):
    metrics, assignments = evaluate_clusters(model, split_of([0, 2], [-1, -1]))
    assert metrics == {"clustering/num_clusters": 4}
    assert assignments.tolist() == [0, 2]


CLASSES = ("zero", "one", "two")
FIGURES = {"cluster_samples", "cluster_numbers", "cluster_tree", "confusion_matrix"}


@pytest.fixture
def blind_model():
    """Modality `a` shows the cluster of a sample; `b` and `c` show it too, but mix up the last two."""
    model = linear_model(("a", "b", "c"), 3)
    with torch.no_grad():
        model.cluster_prior.logits.zero_()
        model.cluster_prior.means.copy_(torch.tensor([[-4.0, 0], [4, 0], [4, 8], [90, 90]]))
        for name in model.modality_names:
            head = model.encoders[name].shared
            head.bias.zero_()
            head.weight.copy_(torch.eye(3)[:2])
            if name != "a":
                head.weight[1, 1] = 0
    return model


@pytest.fixture
def no_export(tmp_path):
    """Where no training wrote anything."""
    return tmp_path


def samples_of(labels):
    """What three modalities see of samples at the centres of their classes' clusters."""
    centres = torch.tensor([[-4.0, 0, 0], [4, 0, 0], [4, 8, 0]])
    x = centres[torch.as_tensor(labels)][:, None, None, :]
    # Off the middle between two clusters, so that what cannot be told apart goes to the first of them.
    return {name: x.clone() for name in ("a", "b", "c")}


def test_every_subset_of_modalities_has_its_own_scores(blind_model, no_export):
    labels = torch.arange(12) % 3
    data = {"test": {**samples_of(labels), "label": labels}, "validation": samples_of(labels)}
    result = evaluate_clustering(make_context(blind_model, data, CLASSES, batch_size=5), no_export)
    subsets = ["a", "b", "c", "a-b", "a-c", "b-c"]
    assert set(result.metrics) == {"clustering/num_clusters"} | {
        f"{group}/{name}"
        for group in ("clustering", *(f"clustering/from/{subset}" for subset in subsets))
        for name in AGREEMENT
    }
    assert result.metrics["clustering/num_clusters"] == 3
    # Only `a` tells the last two apart, and two blind modalities outvote it.
    expected = {"a": 1.0, "b": 2 / 3, "c": 2 / 3, "b-c": 2 / 3}
    for subset, acc in expected.items():
        assert result.metrics[f"clustering/from/{subset}/acc"] == pytest.approx(acc)
    assert result.metrics["clustering/acc"] == pytest.approx(2 / 3)
    assert result.metrics["clustering/from/a-b/acc"] == result.metrics["clustering/from/a-c/acc"]
    assert set(result.figures) == FIGURES - {"cluster_numbers", "cluster_tree"}
    assert "no record of a selection" in result.left_out["clustering/selected"]
    assert result.protocol["clustering.num_samples"] == 12


def test_the_group_agrees_with_one_pass_over_the_split(model, no_export):
    """Batches, padding and gathering change nothing."""
    batch = raw_batch(3, [True] * 10)
    images = {name: batch[name] / 255 for name in ("a", "b")}
    label = torch.arange(10) % 3
    data = {"test": {**images, "label": label}, "validation": images}
    metrics = evaluate_clustering(make_context(model, data, CLASSES, batch_size=4), no_export).metrics
    encoded = encode_split(model, [{**batch, "label": label}])
    expected, _ = evaluate_clusters(model, encoded)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    alone = EncodedSplit(
        encoded.log_density[:, 1:], encoded.shared_loc[:, 1:], encoded.present[:, 1:], encoded.label
    )
    expected, _ = evaluate_clusters(model, alone)
    for name in AGREEMENT:
        assert metrics[f"clustering/from/b/{name}"] == pytest.approx(expected[f"clustering/{name}"])


def test_samples_without_a_label_do_not_count(blind_model, no_export):
    labels = torch.tensor([0, 1, 2] * 4)
    # The first half is right, the second has no labels; as a class −1 it would spoil every score.
    known = torch.where(torch.arange(12) < 6, labels, -1)
    data = {"test": {**samples_of(labels), "label": known}}
    result = evaluate_clustering(make_context(blind_model, data, CLASSES), no_export)
    for name in AGREEMENT:
        assert result.metrics[f"clustering/from/a/{name}"] == 1.0
    assert result.protocol["clustering.num_labelled_samples"] == 6


def test_subsets_of_modalities_take_the_samples_that_have_some(blind_model, no_export):
    """`a` is right and `b` and `c` are blind for class two: who lacks `a` decides what is right."""
    labels = torch.tensor([2] * 6 + [0] * 2)
    mask = torch.tensor(
        [[1, 0, 0], [1, 0, 0], [0, 1, 1], [0, 1, 0], [0, 0, 1], [1, 1, 1], [1, 1, 1], [1, 1, 1]]
    )
    data = {"test": {**samples_of(labels), "label": labels, "mask": mask.bool()}}
    metrics = evaluate_clustering(make_context(blind_model, data, CLASSES), no_export).metrics
    # Two of class 2 by `a` alone and two of class 0 are told apart; the others join the cluster of class 1.
    assert metrics["clustering/acc"] == pytest.approx(6 / 8)
    assert metrics["clustering/from/a/acc"] == 1.0
    assert metrics["clustering/from/b/acc"] == 1.0
    # Of those that have one of `a` and `b`, all but the fifth: 2 right by `a`, 2 of class 0, and two by `b`.
    assert metrics["clustering/from/a-b/acc"] == pytest.approx(max(3 + 2, 4) / 7)


def test_the_selection_sees_only_what_is_there(model):
    """As if every encoding that there is were a sample of its own, of data with one modality."""
    split = encode_split(model, [raw_batch(5, [True] * 12)])
    rng = np.random.default_rng(0)
    present = rng.random((12, 2)) < 0.5
    partial = EncodedSplit(split.log_density, split.shared_loc, present, split.label)
    rows = [split.log_density[n, m] for n in range(12) for m in range(2) if present[n, m]]
    alone = EncodedSplit(
        np.stack(rows)[:, None],
        np.zeros((len(rows), 1, 3)),
        np.ones((len(rows), 1), bool),
        np.zeros(len(rows)),
    )
    found, expected, complete = (select_model_clusters(model, s, 1.0) for s in (partial, alone, split))
    np.testing.assert_allclose(found.criterion, expected.criterion)
    np.testing.assert_array_equal(found.active, expected.active)
    assert not np.allclose(found.criterion, complete.criterion)


def test_without_labels_there_are_clusters_and_reasons(blind_model, no_export):
    data = {split: samples_of([0, 1, 2, 0, 1, 2]) for split in ("test", "validation")}
    result = evaluate_clustering(make_context(blind_model, data), no_export)
    assert result.metrics == {"clustering/num_clusters": 3}
    assert {"clustering/from", "clustering/acc"} < set(result.left_out)
    assert all(
        "no sample of the test split has a label" in result.left_out[f"clustering/{name}"]
        for name in AGREEMENT
    )
    assert set(result.figures) == FIGURES - {"confusion_matrix", "cluster_numbers", "cluster_tree"}
    for figure in result.figures.values():
        figure.canvas.draw()


def test_a_single_sample_is_enough(blind_model, no_export):
    data = {"test": {**samples_of([1]), "label": torch.tensor([1])}, "validation": samples_of([1])}
    result = evaluate_clustering(make_context(blind_model, data, CLASSES), no_export)
    assert result.metrics["clustering/acc"] == 1.0
    assert all(np.isfinite(value) for value in result.metrics.values())
    assert set(result.figures) == FIGURES - {"cluster_numbers", "cluster_tree"}


def three_groups(num_samples, seed):
    """Encoded samples of three classes that two modalities see alike, far from the means of the mixture."""
    rng = np.random.default_rng(seed)
    label = np.arange(num_samples) % 3
    centres = 5 * np.eye(3, dtype=np.float32)
    shared_loc = centres[label][:, None] + 0.3 * rng.normal(size=(num_samples, 2, 3)).astype(np.float32)
    return EncodedSplit(
        np.zeros((num_samples, 2, 4)),
        shared_loc,
        np.ones((num_samples, 2), bool),
        label,
        np.full((num_samples, 2), 0.04),
    )


@pytest.mark.parametrize("criterion", ["silhouette", "stability", "agreement"])
def test_final_clusters_are_those_that_z_shows(model, criterion, tmp_path):
    splits = three_groups(200, 0), three_groups(50, 1)
    hierarchy, record = find_clusters(model, *splits, beta=1.0, settings=ClustersConfig(criterion=criterion))
    assert (record.num_clusters, record.criterion) == (3, criterion)
    assert set(record.curves) == {"entropy", "silhouette", "stability", "agreement"}
    model.cluster_prior.take(hierarchy, record.num_clusters)
    metrics, _ = evaluate_clusters(model, encode_anew(model, splits[1]))
    assert metrics["clustering/num_clusters"] == 3
    assert metrics["clustering/acc"] == 1
    # The variance of z ~ q(z|x_m) around the cluster's mean: 0.3² of each modality, and its posterior's.
    variance = model.family.variance_of(model.cluster_prior.scale)
    np.testing.assert_allclose(variance.numpy(), 0.3**2 + 0.04, rtol=0.1)
    model.save_pretrained(tmp_path / "export", (hierarchy, record))
    four = CMVAE.from_pretrained(tmp_path / "export", num_clusters=4)
    assert four.cluster_prior.active.sum() == 4
    three = CMVAE.from_pretrained(tmp_path / "export")
    assert torch.equal(three.cluster_prior.means, model.cluster_prior.means)
    with pytest.raises(UserError, match=r"export: 9 clusters: this model has sets of 2 to 4. Choose another"):
        CMVAE.from_pretrained(tmp_path / "export", num_clusters=9)


def encode_anew(model, split):
    """The densities of a split by the clusters that a model has now."""
    density = model.log_density(split.shared_loc)
    return EncodedSplit(density, split.shared_loc, split.present, split.label, split.variance)


def test_the_number_that_is_told_counts_whatever_is_selected(model):
    splits = three_groups(200, 0), three_groups(50, 1)
    told = ClustersConfig(criterion="stability", num_clusters=2)
    _, record = find_clusters(model, *splits, beta=1.0, settings=told)
    assert (record.selected, record.told, record.num_clusters) == (3, 2, 2)


def test_the_papers_criterion_leaves_the_mixture_as_it_is(model):
    before = {name: x.clone() for name, x in model.state_dict().items()}
    split = encode_split(model, [raw_batch(5, [True] * 12)])
    hierarchy, record = find_clusters(model, split, split, beta=1.0, settings=ClustersConfig())
    selection = select_model_clusters(model, split, 1.0)
    assert record.curves["entropy"].values == tuple(selection.criterion.tolist())
    model.cluster_prior.take(hierarchy, record.num_clusters)
    after = model.state_dict()
    assert after.pop("cluster_prior.active").tolist() == selection.active.tolist()
    assert all(torch.equal(x, before[name]) for name, x in after.items())


@pytest.mark.parametrize("assign_by", ["vote", "joint"])
def test_a_sample_without_any_of_the_models_modalities_spoils_nothing(model, assign_by):
    split = three_groups(30, 0)
    clusters = find_clusters(model, split, split, 1.0, ClustersConfig(criterion="silhouette"))
    model.cluster_prior.take(clusters[0], 3)
    model.config = model.config.model_copy(update={"assign_by": assign_by})
    split.present[4] = False
    split.label[4] = -1
    metrics, assignments = evaluate_clusters(model, encode_anew(model, split))
    assert metrics["clustering/acc"] == 1
    assert len(assignments) == 30


def test_an_evaluation_compares_the_numbers_of_clusters(blind_model, tmp_path):
    labels = torch.arange(12) % 3
    data = {"test": {**samples_of(labels), "label": labels}}
    context = make_context(blind_model, data, CLASSES)
    split = three_groups(60, 0)
    split = EncodedSplit(
        np.zeros((60, 2, 4)), split.shared_loc[..., :2], split.present, split.label, split.variance
    )
    clusters = find_clusters(blind_model, split, split, 1.0, ClustersConfig(criterion="silhouette"))
    blind_model.save_pretrained(tmp_path / "export", clusters)
    result = evaluate_clustering(context, tmp_path / "export")
    assert set(result.figures) == FIGURES
    assert result.metrics["clustering/selected/silhouette"] == 3
    assert {f"clustering_all/{name}" for name in AGREEMENT} < set(result.metrics)
    assert result.left_out == {}


def test_up_to_five_modalities_every_subset_is_tried():
    assert modality_subsets(["a"]) == ([], "all")
    names = ["a", "b", "c", "d", "e"]
    subsets, rule = modality_subsets(names)
    assert rule == "all"
    assert subsets == list(chain.from_iterable(combinations(names, size) for size in range(1, 5)))


def test_of_many_modalities_some_subsets_are_tried():
    subsets, rule = modality_subsets([f"m{m}" for m in range(8)])
    assert rule == "of one, of two, and of all but one"
    assert [sum(len(subset) == size for subset in subsets) for size in range(1, 9)] == [
        8,
        28,
        0,
        0,
        0,
        0,
        8,
        0,
    ]
