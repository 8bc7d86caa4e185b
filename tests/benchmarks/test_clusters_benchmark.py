"""tools/benchmarks/clusters.py: features, methods and tables against what is computed by hand."""

from __future__ import annotations

import csv
import re
import statistics
import sys
from pathlib import Path
from typing import ClassVar

import clusters
import clusters_methods
import numpy as np
import pytest
from clusters_data import ALL, DATA_SETS, DataSet, FeatureReader, FeatureSet, View, read_rows
from clusters_methods import METHODS, choose_rows
from clusters_ours import find_clusters, run_command
from clusters_results import Cell, Results
from commands import run_tool
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from cmvae.datasets.base import Sample
from cmvae.datasets.writer import write_shards
from cmvae.modalities import TextModality, VectorModality
from cmvae.modalities.text import SPECIAL_TOKENS
from cmvae.utils.errors import UserError

WORDS = (*SPECIAL_TOKENS, "red", "green", "wings", "beak")
CAPTIONS = 4


class Pairs:
    """Things of two classes, two numbers each, with one of four captions, one of which says the class."""

    name = "pairs"
    class_names = ("red", "green")
    settings: ClassVar = {}
    modalities: ClassVar = {
        "sizes": VectorModality(shape=(2,), columns=("a", "b"), mean=(0.0, 0.0), std=(1.0, 1.0)),
        "caption": TextModality(shape=(3,), categories=WORDS),
    }
    split_sizes: ClassVar = {"train": 80, "validation": 8, "test": 40}

    def sample(self, split: str, index: int) -> Sample:
        thing, caption = divmod(index, CAPTIONS)
        label = thing % 2
        sizes = np.random.default_rng([len(split), thing]).normal([9 * label, 0], [1, 100])
        words = np.array([3 + label if caption == 0 else 5, 5 + caption % 2, 1])
        return Sample(
            {"sizes": sizes.astype(np.float32), "caption": words}, label, f"{split}{thing}-{caption}"
        )


DATA = DataSet(
    "pairs",
    "pairs",
    lambda shared, tables: [],
    views=(View("pair"), View("thing", alone=("caption",), grouped=True)),
    group_of=lambda key: key.partition("-")[0],
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clusters") / "pairs"
    write_shards(Pairs(), folder)
    return folder


def stored(shards: Path, split: str):
    rows = read_rows(shards, (split,), ["sizes", "caption"])
    texts = [" ".join(WORDS[word] for word in row[:2]) for row in rows.values["caption"]]
    return rows.values["sizes"].astype(np.float64), texts, rows


def test_each_modality_is_standardised_and_weighted_by_its_size(shards):
    train, test = (stored(shards, split) for split in ("train", "test"))
    vectorizer = TfidfVectorizer(tokenizer=str.split, token_pattern=None).fit(train[1])
    scale = np.sqrt(vectorizer.transform(train[1]).toarray().var(0).sum())
    expected = [
        np.hstack(
            [
                (sizes - train[0].mean(0)) / train[0].std(0) / np.sqrt(2),
                vectorizer.transform(texts).toarray() / scale,
            ]
        )
        for sizes, texts, _ in (train, test)
    ]
    features = FeatureReader(shards, DATA, DATA.views[0]).features(ALL)
    np.testing.assert_allclose(features.fitted, expected[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(features.placed, expected[1], rtol=1e-4, atol=1e-5)
    # Two numbers weigh as much as all words.
    assert features.fitted[:, :2].var(0).sum() == pytest.approx(1, rel=1e-4)
    assert features.fitted[:, 2:].var(0).sum() == pytest.approx(1, rel=1e-4)


def test_a_grouped_row_is_the_mean_of_its_samples(shards):
    view = DATA.view("thing")
    reader = FeatureReader(shards, DATA, view)
    found = reader.features(FeatureSet("caption", "TF-IDF"))
    train, test = (stored(shards, split) for split in ("train", "test"))
    vectorizer = TfidfVectorizer(tokenizer=str.split, token_pattern=None).fit(train[1])
    things = np.array([key.partition("-")[0] for key in test[2].keys])
    for row, thing in enumerate(np.unique(things)):
        texts = [text for text, of in zip(test[1], things, strict=True) if of == thing]
        assert len(texts) == CAPTIONS
        mean = vectorizer.transform(texts).toarray().mean(0)
        np.testing.assert_allclose(found.placed.toarray()[row], mean, rtol=1e-5)
        assert reader.labels[row] == test[2].labels[things == thing][0]
    assert found.fitted.shape[0] == 80 / CAPTIONS


def run(out: Path, shards: Path, *flags: str) -> Results:
    flags = ("--shards", str(shards.parent), "--out", str(out), *flags)
    arguments = clusters.parse_arguments(flags)
    arguments.data = ["pairs"]
    out.mkdir(exist_ok=True)
    results = Results(out / "results.jsonl")
    clusters.run_suite(arguments, results)
    return results


def test_cells_are_those_of_scikit_learn_and_run_once(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(clusters.DATA_SETS, "pairs", DATA)
    out = tmp_path / "out"
    results = run(out, shards, "--methods", "kmeans,gmm,spectral", "--seeds", "2")
    lines = (out / "results.jsonl").read_text().splitlines()
    # Pairs: sizes, captions, all; things: captions, all.
    assert len(lines) == 3 * 2 * (3 + 2)
    train, test = (stored(shards, split) for split in ("train", "test"))
    mean, std = train[0].mean(0), train[0].std(0)
    assert not any("not_run" in line for line in results.lines.values())
    for seed in range(2):
        line = results.lines[Cell("pairs", "pair", "kmeans", "sizes: standardised", True, seed)]
        kmeans = KMeans(2, n_init=10, random_state=seed).fit((train[0] - mean) / std)
        expected = kmeans.predict((test[0] - mean) / std)
        labels = test[2].labels
        assert line["nmi"] == pytest.approx(normalized_mutual_info_score(labels, expected))
        assert line["ari"] == pytest.approx(adjusted_rand_score(labels, expected))
        assert line["num_clusters"] == 2
        assert line["note"] == "fitted on 80, compared on 40"

    called = []
    for name, method in METHODS.items():
        counted = clusters_methods.Method(
            method.title, lambda *rest, m=method: called.append(rest[3]) or m.assign(*rest), method.takes
        )
        monkeypatch.setitem(METHODS, name, counted)
    run(out, shards, "--methods", "kmeans,gmm,spectral", "--seeds", "2")
    assert called == []
    # As a kill in the middle of a write leaves it: that cell alone is run again.
    unfinished = "\n".join(lines)[:-30]
    (out / "results.jsonl").write_text(unfinished)
    run(out, shards, "--methods", "kmeans,gmm,spectral", "--seeds", "2")
    assert len(called) == 1
    assert len((out / "results.jsonl").read_text().splitlines()) == len(lines)
    run(out, shards, "--methods", "kmeans", "--seeds", "3")
    assert called[1:] == [2] * 5


def test_a_method_that_cannot_run_says_why_and_is_tried_again(shards, tmp_path, monkeypatch):
    monkeypatch.setitem(clusters.DATA_SETS, "pairs", DATA)
    monkeypatch.setitem(sys.modules, "mvlearn", None)
    for _ in range(2):
        results = run(tmp_path, shards, "--methods", "mv-spectral", "--seeds", "1")
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 2  # one a view, not written twice
    assert "not run: mvlearn cannot be imported" in results.format_table(
        {"mv-spectral": "mvlearn"}, ["pairs"]
    )
    assert not any(cell in results for cell in results.lines)


def test_a_table_has_means_over_seeds(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    nmi = [0.5, 0.7, 0.9]
    for seed, value in enumerate(nmi):
        line = {"num_clusters": 3 + seed, "acc": 0.25, "nmi": value, "ari": -0.1, "seconds": 2.0, "note": "n"}
        results.add(Cell("wine", "sample", "ours", "all", False, seed), line)
    titles = {"kmeans": "k-means", "ours": "ours"}
    table = re.sub(" +", " ", Results(tmp_path / "results.jsonl").format_table(titles, list(DATA_SETS)))
    spread = statistics.stdev(nmi)
    row = "| sample | ours | all | found | 3 | 3, 4, 5 | 0.250 ± 0.000 |"
    assert f"{row} 0.700 ± {spread:.3f} | -0.100 ± 0.000 | 2.0 | n |" in table


def test_the_figure_has_the_best_features_of_each_method(tmp_path):
    results = Results(tmp_path / "results.jsonl")
    for features, seed, acc in (("raw", 0, 0.4), ("raw", 1, 0.6), ("pca", 0, 0.9), ("pca", 1, 0.7)):
        results.add(Cell("wine", "sample", "kmeans", features, True, seed), {"acc": acc})
    results.add(Cell("wine", "sample", "spectral", "raw", True, 0), {"not_run": "too large"})
    (ax,) = results.draw({"kmeans": "k-means", "spectral": "Spectral"}, list(DATA_SETS)).axes
    assert [text.get_text() for text in ax.texts] == ["0.80"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["k-means, told", "Spectral, told"]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["wine, by sample"]


def test_a_line_that_is_no_cell_is_named(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"data": 1}\n{"da')
    with pytest.raises(UserError, match=r"results.jsonl: line 1 is no cell"):
        Results(tmp_path / "results.jsonl")


def test_one_training_serves_all_cells_of_ours(shards, tmp_path):
    commands = []

    def pretend(arguments, log):
        commands.append(arguments)
        if arguments[0] == "train":
            (tmp_path / "runs/pairs-ours-1/export").mkdir(parents=True)
            return
        told, grouped = "--num-clusters" in arguments, "--by-group" in arguments
        rows = read_rows(shards, ("test",), [])
        with open(arguments[arguments.index("--out") + 1], "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["key", "split", "cluster", "caption_cluster"])
            for key, label in zip(rows.keys, rows.labels.tolist(), strict=True):
                # Found: one caption of four is elsewhere when it is alone. Told: all are in one cluster.
                apart = key.endswith("-3") and not grouped
                table.writerow([key, "test", 0 if told else 7 if apart else 4 + label, label])

    def find(view, told=False):
        return find_clusters(tmp_path, DATA, view, shards, "ours", 1, told, pretend)

    alone = View("caption", alone=("caption",), together=False, grouped=True, read_from=("caption",))
    for _ in range(2):
        pairs, _ = find(DATA.view("pair"))
        things, labels = find(DATA.view("thing"))
        told, _ = find(DATA.view("thing"), told=True)
        captions, _ = find(alone)
    assert [command[0] for command in commands] == ["train", *["cluster"] * 4]
    assert "seed=1" in commands[0]
    assert "--by-group" not in commands[1]
    assert commands[3][-3:] == ["--by-group", "--num-clusters", "2"]
    assert commands[4][-3:] == ["--by-group", "--modalities", "caption"]
    assert (len(pairs), len(things), len(captions)) == (40, 10, 10)
    assert set(pairs) == {4, 5, 7}
    assert things.tolist() == (4 + labels).tolist()
    assert set(told) == {0}


def test_what_fails_is_told_in_its_last_words(tmp_path):
    with pytest.raises(UserError, match=r"cmvae train failed: error: .*none.yaml.*Full output: .*log"):
        run_command(["train", str(tmp_path / "none.yaml")], tmp_path / "log")
    done = run_tool("benchmarks/clusters.py", "--data", "wine,cheese", folder=tmp_path)
    assert done.returncode == 2
    assert "'cheese' is none of wine" in done.stderr


def test_rows_are_drawn_by_the_seed():
    assert choose_rows(5, 5, 0).tolist() == [0, 1, 2, 3, 4]
    first, again, other = choose_rows(100, 9, 1), choose_rows(100, 9, 1), choose_rows(100, 9, 2)
    assert first.tolist() == again.tolist() == sorted(set(first.tolist()))
    assert first.tolist() != other.tolist()
