"""Classifiers: what they learn, and what keeps a bad, damaged or missing one from being used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from quadrants import Quadrants

from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.datasets.writer import write_shards
from cmvae.evaluation.classifiers import (
    NUM_FEATURES,
    ImageClassifier,
    default_epochs,
    load_classifiers,
    num_steps,
    train_classifier,
    train_classifiers,
)
from cmvae.utils.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def shards(quadrants_shards: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(quadrants_shards, tmp_path / "quadrants"))


def change_index(folder: Path, **changes: object) -> None:
    """Change what the index says of the classifier of m1."""
    index = json.loads((folder / "index.json").read_text())
    index["classifiers"]["m1"] |= changes
    (folder / "index.json").write_text(json.dumps(index))


def load_all(folder: Path) -> dict[str, ImageClassifier]:
    index = ShardIndex.load(folder)
    return load_classifiers(folder, index, list(index.modalities), CPU)


def test_trained_classifiers_read_the_test_split_as_the_index_says(quadrants_shards):
    index = ShardIndex.load(quadrants_shards)
    classifiers = load_all(quadrants_shards)
    for batch in EvaluationLoader(
        quadrants_shards, split="test", modalities=list(classifiers), batch_size=90
    ):
        for name, classifier in classifiers.items():
            predicted, features = classifier.classify(batch[name].float() / 255)
            assert features.shape == (90, NUM_FEATURES)
            assert float((predicted == batch["label"]).double().mean()) == index.classifiers[name].accuracy
            # An index that says 1.0 of anything would pass the line above.
            turned, _ = classifier.classify(batch[name].float().flip(-1) / 255)
            assert float((turned == batch["label"]).double().mean()) < 0.2
    assert min(entry.accuracy for entry in index.classifiers.values()) > 0.95


def test_classifying_does_not_depend_on_the_batch_and_clips_as_an_image_file_does(quadrants_shards):
    classifier = load_all(quadrants_shards)["m0"]
    images = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 - 1
    predicted, features = classifier.classify(images)
    alone, features_alone = classifier.classify(images[3:4])
    assert alone[0] == predicted[3]
    torch.testing.assert_close(features_alone[0], features[3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(classifier.classify(images.clamp(0, 1))[1], features)


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 16, 16), (3, 28, 28), (1, 30, 50), (3, 64, 64)])
def test_the_network_fits_any_size(shape):
    logits, features = ImageClassifier(shape, 7, width=2)(torch.rand(2, *shape))
    assert logits.shape == (2, 7)
    assert features.shape == (2, NUM_FEATURES)


def test_training_is_a_function_of_the_seed_and_leaves_the_global_one_alone():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (70, 1, 8, 8), generator=generator, dtype=torch.uint8)
    labels = torch.arange(70) % 3

    def train(seed):
        steps = []
        classifier = train_classifier(
            images, labels, 3, width=2, epochs=2, seed=seed, report=lambda step: steps.append(step)
        )
        assert steps == list(range(1, num_steps(70, 2) + 1))
        return torch.cat([p.flatten() for p in classifier.state_dict().values()])

    state = torch.get_rng_state()
    first, again, other = train(0), train(0), train(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())


def test_small_data_sets_are_seen_more_often():
    assert default_epochs(1_500) == 20
    assert default_epochs(60_000) == 5


def test_a_changed_file_is_noticed(shards):
    path = shards / "classifiers" / "m1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"m1\.safetensors: its SHA-256.*cmvae classifiers"):
        load_all(shards)
    path.unlink()
    with pytest.raises(UserError, match=r"m1\.safetensors: cannot be read.*cmvae classifiers"):
        load_all(shards)


def test_a_file_of_another_network_is_noticed(shards):
    change_index(shards, width=5)
    with pytest.raises(UserError, match=r"m1\.safetensors: does not fit"):
        load_all(shards)


def test_a_bad_classifier_is_refused_and_a_mediocre_one_warned_about(shards, caplog):
    change_index(shards, accuracy=0.95)
    load_all(shards)
    assert not caplog.records
    change_index(shards, accuracy=0.9)
    load_all(shards)
    assert "m1.safetensors: has an accuracy of 90.0 %" in caplog.text
    change_index(shards, accuracy=0.799)
    with pytest.raises(UserError, match=r"m1\.safetensors: has an accuracy of 79\.9%.*--epochs 24 --width 8"):
        load_all(shards)


def test_what_is_not_there_is_named_with_the_command(shards):
    index = ShardIndex.load(shards)
    partly = index.model_copy(update={"classifiers": {"m0": index.classifiers["m0"]}})
    with pytest.raises(UserError, match=r"modality m1, m2\. Train them once: cmvae classifiers "):
        load_classifiers(shards, partly, ["m0", "m1", "m2"], CPU)
    assert list(load_classifiers(shards, partly, ["m0"], CPU)) == ["m0"]
    unlabelled = index.model_copy(update={"class_names": None})
    with pytest.raises(UserError, match="no labels"):
        load_classifiers(shards, unlabelled, ["m0"], CPU)


def test_data_that_cannot_be_learned_from_is_left_as_it_is(shards):
    def rewrite(**changes):
        index = json.loads((shards / "index.json").read_text()) | changes
        (shards / "index.json").write_text(json.dumps(index))
        return (shards / "index.json").read_bytes()

    before = rewrite(class_names=["nw", "ne", "sw", "se", "middle"])
    with pytest.raises(UserError, match="no sample of class middle"):
        train_classifiers(shards, device=CPU)
    assert (shards / "index.json").read_bytes() == before
    rewrite(class_names=None)
    with pytest.raises(UserError, match="has no labels"):
        train_classifiers(shards, device=CPU)


def test_an_index_without_classifiers_loads_and_one_with_strange_files_does_not(shards):
    change_index(shards, file="classifiers/../../m1.safetensors")
    with pytest.raises(UserError, match=r"classifiers\.m1\.file"):
        ShardIndex.load(shards)
    index = json.loads((shards / "index.json").read_text())
    del index["classifiers"]
    (shards / "index.json").write_text(json.dumps(index))
    assert ShardIndex.load(shards).classifiers == {}


def test_packing_again_removes_classifiers_of_the_old_data(shards):
    write_shards(Quadrants(), shards, force=True, limit=20)
    assert ShardIndex.load(shards).classifiers == {}
    assert list((shards / "classifiers").iterdir()) == []


def test_features_tell_classes_apart(quadrants_shards):
    # Fréchet distances and neighbourhoods mean something only if images of a class are near each other.
    classifier = load_all(quadrants_shards)["m2"]
    (batch,) = EvaluationLoader(quadrants_shards, split="test", modalities=["m2"], batch_size=90)
    _, features = classifier.classify(batch["m2"].float() / 255)
    distances = torch.cdist(features, features).fill_diagonal_(torch.inf)
    nearest = batch["label"][distances.argmin(1)]
    assert np.mean((nearest == batch["label"]).numpy()) > 0.95
