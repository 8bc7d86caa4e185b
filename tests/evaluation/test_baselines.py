"""K-means of known classes, of every kind, against the features computed by hand."""

from __future__ import annotations

import json

import numpy as np
import pytest
from commands import run_cmvae
from mixed import Mixed
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score

from cmvae.datasets.writer import write_shards
from cmvae.evaluation.baselines import evaluate_baselines
from cmvae.utils.errors import UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("baselines") / "mixed"
    write_shards(Mixed(missing=0.2), folder)
    return folder


def collect(split: str, modality: str) -> tuple[np.ndarray, np.ndarray]:
    samples = [Mixed(0.2).sample(split, n) for n in range(Mixed.split_sizes[split])]
    having = [sample for sample in samples if modality in sample.values]
    return np.stack([sample.values[modality] for sample in having]), np.array([s.label for s in having])


def test_what_tells_the_class_plainly_is_found_in_every_kind(shards):
    found = {(b.modality, b.features): b for b in evaluate_baselines(shards, "test", seeds=2)}
    assert list(found) == [
        ("photo", "pixels"),
        ("photo", "50 principal components"),
        ("caption", "TF-IDF of words"),
        ("sizes", "standardised"),
        ("marks", "standardised"),
        ("habitat", "one-hot"),
    ]
    for (modality, features), baseline in found.items():
        assert baseline.num_samples == len(collect("test", modality)[1])
        assert all(len(values) == 2 for values in baseline.metrics.values())
        if features != "TF-IDF of words":  # captions differ in more than their colour
            assert baseline.metrics["acc"] == [1.0, 1.0], modality
            assert baseline.metrics["nmi"] == pytest.approx([1.0, 1.0])


def test_two_clusters_of_three_classes_are_those_of_scikit_learn(shards):
    pixels, components = list(evaluate_baselines(shards, "test", seeds=3, num_clusters=2))[:2]
    train, _ = collect("train", "photo")
    tested, labels = collect("test", "photo")
    train, tested = (images.reshape(len(images), -1) / 255 for images in (train, tested))
    assert max(pixels.metrics["acc"]) < 0.8
    pca = PCA(50, random_state=0).fit(train)
    for baseline, fitted, placed in (
        (pixels, train, tested),
        (components, pca.transform(train), pca.transform(tested)),
    ):
        for seed, nmi in enumerate(baseline.metrics["nmi"]):
            clusters = KMeans(2, n_init=10, random_state=seed).fit(fitted).predict(placed)
            assert nmi == pytest.approx(normalized_mutual_info_score(labels, clusters))


def test_data_without_labels_or_samples_enough_is_refused(shards, tmp_path):
    with pytest.raises(UserError, match=r"labelled samples of the test split have photo, .*too few for 70"):
        list(evaluate_baselines(shards, "test", seeds=1, num_clusters=70))
    index = json.loads((shards / "index.json").read_text()) | {"class_names": None}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="no labels to compare clusters with"):
        list(evaluate_baselines(tmp_path, "test", seeds=1))


def test_the_command_prints_a_table(digits_shards, tmp_path):
    done = run_cmvae("baselines", digits_shards, "--seeds", 2, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines()]
    assert len(rows) == 2 + 3 * 2
    assert rows[2][1:3] == ["m0", "pixels"]
    assert all(0 < float(row[4].split(" ± ")[0]) < 1 for row in rows[2:])
    assert run_cmvae("baselines", "nothing", folder=tmp_path).returncode == 2
