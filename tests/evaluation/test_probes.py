"""Probes of latents whose content is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_model import NUM_PIXELS, linear_model
from made_up_context import make_context

from cmvae.evaluation import probes
from cmvae.evaluation.probes import evaluate_probes, probe_accuracy

CLASSES = ("0", "1", "2", "3")


def separable(num_samples, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(4, size=num_samples)
    centres = np.array([[0, 0, 0], [9, 0, 0], [0, 9, 0], [0, 0, 9]])
    # Dimensions of quite different sizes: a probe that does not standardise them misses the small ones.
    return (centres[labels] + rng.normal(size=(num_samples, 3))) * [1, 1e-4, 1e4], labels


def test_separable_features_are_read_without_a_mistake():
    assert probe_accuracy(*separable(200, 0), *separable(100, 1)) == 1.0


def test_shuffled_labels_are_read_at_chance():
    rng = np.random.default_rng(2)
    (train, train_labels), (test, test_labels) = separable(400, 0), separable(400, 1)
    accuracy = probe_accuracy(train, rng.permutation(train_labels), test, rng.permutation(test_labels))
    assert accuracy == pytest.approx(1 / 4, abs=0.1)


@pytest.fixture
def model():
    """z of `a` sees the first two pixels, w of `a` the third; `b` has them the other way round."""
    model = linear_model(("a", "b"), 2)
    first, last = torch.eye(3)[:2], torch.eye(3)[2:].repeat(2, 1)
    with torch.no_grad():
        for name, shared, private in (("a", first, last), ("b", last, first)):
            for head, weight in (
                (model.encoders[name].shared, shared),
                (model.encoders[name].private, private),
            ):
                head.weight.copy_(weight)
                head.bias.zero_()
    return model


def split_of(num_samples, seed):
    """Pixels of which the first two say the class, and the third is noise."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(4, (num_samples,), generator=generator)
    noise = torch.randn(num_samples, NUM_PIXELS, generator=generator)
    signal = torch.stack([label // 2 * 9.0, label % 2 * 9.0, torch.zeros(num_samples)], dim=1)
    x = (signal + noise)[:, None, None, :]
    return {"a": x, "b": x.clone(), "label": label}


def test_probes_find_the_class_where_it_is(model):
    data = {"train": split_of(300, 0), "test": split_of(200, 1)}
    result = evaluate_probes(make_context(model, data, CLASSES, batch_size=64))
    metrics = result.metrics
    assert set(metrics) == {f"probe/{latent}/{name}" for latent in ("z", "w", "both") for name in "ab"}
    for name in ("probe/z/a", "probe/both/a", "probe/w/b", "probe/both/b"):
        assert metrics[name] == 1.0
    for name in ("probe/w/a", "probe/z/b"):
        assert metrics[name] == pytest.approx(1 / 4, abs=0.12)
    for name in "ab":
        assert result.protocol[f"probe.train_samples.{name}"] == 300
        assert result.protocol[f"probe.test_samples.{name}"] == 200


def test_samples_without_a_label_are_not_used(model):
    data = {"train": split_of(300, 0), "test": split_of(200, 1)}
    for values in data.values():
        values["label"][::2] = -1
    result = evaluate_probes(make_context(model, data, CLASSES))
    assert result.metrics["probe/z/a"] == 1.0
    assert (result.protocol["probe.train_samples.a"], result.protocol["probe.test_samples.a"]) == (150, 100)


def test_samples_that_lack_a_modality_are_not_used_for_it(model):
    data = {"train": split_of(300, 0), "test": split_of(200, 1)}
    for values in data.values():
        # Where it is missing, what stands in its place would be the class of another sample.
        mask = torch.arange(len(values["label"]))[:, None] % torch.tensor([3, 2]) > 0
        values["a"] = values["a"].where(mask[:, 0, None, None, None], values["a"].roll(1, 0))
        values["mask"] = mask
    result = evaluate_probes(make_context(model, data, CLASSES))
    assert result.metrics["probe/z/a"] == 1.0
    assert result.metrics["probe/w/b"] == 1.0
    sizes = {
        name: (result.protocol[f"probe.train_samples.{name}"], result.protocol[f"probe.test_samples.{name}"])
        for name in "ab"
    }
    assert sizes == {"a": (200, 133), "b": (150, 100)}
    data["test"]["mask"] = torch.zeros(200, 2, dtype=torch.bool)
    data["test"]["mask"][:, 1] = True
    result = evaluate_probes(make_context(model, data, CLASSES))
    assert set(result.metrics) == {"probe/z/b", "probe/w/b", "probe/both/b"}
    assert "have this modality" in result.left_out["probe/z/a"]


def test_a_huge_train_split_is_sampled_by_the_seed(model, monkeypatch):
    monkeypatch.setattr(probes, "MAX_TRAINING_SAMPLES", 40)
    data = {"train": split_of(300, 0), "test": split_of(400, 1)}
    results = [evaluate_probes(make_context(model, data, CLASSES, seed=seed)) for seed in (0, 0, 1)]
    assert results[0].protocol["probe.train_samples.a"] == 40
    assert results[0].metrics == results[1].metrics
    assert results[0].metrics != results[2].metrics


def unlabelled(data):
    return {
        split: {**values, "label": torch.full_like(values["label"], -1)} for split, values in data.items()
    }


def single_class(data):
    return {split: {**values, "label": torch.zeros_like(values["label"])} for split, values in data.items()}


@pytest.mark.parametrize(
    ("change", "class_names", "settings", "reason"),
    [
        (dict, None, {}, "no labels"),
        (unlabelled, CLASSES, {}, "no sample of the test split has a label"),
        (single_class, CLASSES, {}, "fewer than two classes"),
        (dict, CLASSES, {"split": "train"}, "no train split apart from"),
        (lambda data: {"test": data["test"]}, CLASSES, {}, "no train split apart from"),
    ],
)
def test_probes_that_make_no_sense_are_left_out_with_the_reason(model, change, class_names, settings, reason):
    data = change({"train": split_of(20, 0), "test": split_of(10, 1)})
    result = evaluate_probes(make_context(model, data, class_names, **settings))
    assert result.metrics == {}
    assert reason in result.left_out["probe"]
