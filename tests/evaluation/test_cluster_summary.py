"""One pass over data whose clusters are known, against all of the data at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mixed import COLOURS, MODALITIES, VOCABULARY, Mixed, MixedOracle, encode_words

from cmvae.data.reader import EvaluationLoader
from cmvae.datasets.writer import write_shards
from cmvae.evaluation.cluster_summary import ClusterSummary, LowestScored, Member, RareChoices, SummaryLimits

LIMITS = SummaryLimits(members=4, rare_choices=3, map_samples=20, histogram_samples=6)


class WrongCaptions(Mixed):
    """The captions of samples 5, 23 and 40 of the test split name another colour."""

    def sample(self, split, index):
        sample = super().sample(split, index)
        if split == "test" and index in (5, 23, 40):
            colour = list(COLOURS)[(sample.label + 1) % 3]
            sample.values["caption"] = encode_words(["a", colour, "bird"])
        return sample


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "mixed"
    write_shards(Mixed(missing=0.3), folder)
    return folder


def summarize(folder, batch_size=7, splits=("test",), model=None) -> ClusterSummary:
    model = model or MixedOracle()
    summary = ClusterSummary(model, len(COLOURS), LIMITS, seed=0)
    for split in splits:
        loader = EvaluationLoader(folder, split=split, modalities=model.modality_names, batch_size=batch_size)
        summary.add_batches((split, batch) for batch in loader)
    return summary


def read_all(folder, split="test"):
    (batch,) = EvaluationLoader(folder, split=split, modalities=list(MODALITIES), batch_size=60)
    return {name: np.asarray(value) for name, value in batch.items() if name not in ("key", "skipped")}


def test_the_lowest_scores_of_a_stream_are_kept_and_the_rest_is_never_made():
    scores = np.random.default_rng(0).integers(0, 50, size=500).tolist()
    kept, made = LowestScored[int](10), []

    def make(number):
        made.append(number)
        return number

    for number, score in enumerate(scores):
        kept.offer(score, lambda number=number: make(number))
    expected = sorted(range(500), key=lambda number: (scores[number], number))[:10]
    assert kept.items() == expected
    assert len(made) < 100


def test_counts_moments_words_and_images_are_those_of_all_samples_at_once(shards):
    data, summary = read_all(shards), summarize(shards)
    labels, mask = data["label"], dict(zip(MODALITIES, data["mask"].T, strict=True))
    assert summary.sizes.tolist() == np.bincount(labels).tolist()
    assert summary.class_counts.tolist() == np.diag(np.bincount(labels)).tolist()
    assert summary.num_split_opinions == 0
    assert summary.num_several_modalities == (data["mask"].sum(1) > 1).sum()
    for c in range(3):
        own = {name: data[name][(labels == c) & mask[name]] for name in MODALITIES}
        statistics = summary.modalities
        for name in MODALITIES:
            assert statistics[name].present[c] == len(own[name])
        sizes = (own["sizes"] - MODALITIES["sizes"].mean) / MODALITIES["sizes"].std
        np.testing.assert_allclose(statistics["sizes"].sums[c], sizes.sum(0), rtol=1e-5)
        np.testing.assert_allclose(statistics["sizes"].squares[c], np.square(sizes).sum(0), rtol=1e-5)
        assert statistics["marks"].sums[c].tolist() == own["marks"].sum(0).tolist()
        assert statistics["habitat"].samples[c].tolist() == np.bincount(own["habitat"], minlength=3).tolist()
        np.testing.assert_allclose(statistics["photo"].sums[c], own["photo"].astype(float).sum(0))
        bird = VOCABULARY.index("bird")
        assert statistics["caption"].samples[c, bird] == (own["caption"] == bird).any(1).sum()
        assert statistics["caption"].occurrences[c].sum() == (own["caption"] > 2).sum(), "no special tokens"


def test_the_result_does_not_depend_on_the_batches(shards):
    one, other = summarize(shards, batch_size=7), summarize(shards, batch_size=60)
    assert [m.key for m in one.map.items()] == [m.key for m in other.map.items()]
    assert [m.key for m in one.nearest[1].items()] == [m.key for m in other.nearest[1].items()]


def test_what_is_kept_is_bounded_and_knows_where_it_comes_from(shards):
    summary = summarize(shards, splits=("train", "validation", "test"))
    assert summary.sizes.sum() == 204
    assert len(summary.map.items()) == LIMITS.map_samples
    assert {member.split for member in summary.map.items()} > {"train"}
    for c in range(3):
        assert len(summary.nearest[c].items()) == len(summary.least_sure[c].items()) == LIMITS.members
        assert len(summary.random[c].items()) == LIMITS.histogram_samples
        assert {member.cluster for member in summary.nearest[c].items()} == {c}
        assert all("photo" not in member.values for member in summary.random[c].items())


def test_wrong_pairs_are_found_and_what_a_modality_often_confuses_is_not(tmp_path):
    write_shards(WrongCaptions(), tmp_path / "shards")
    model = MixedOracle()
    # Its photographs cannot tell green from red, which is no sign of a wrong pair.
    model.say["photo"] = lambda classes: classes * (classes != 1)
    summary = summarize(tmp_path / "shards", model=model)
    ranked = summary.rare_choices.ranked()
    (batch,) = EvaluationLoader(
        tmp_path / "shards", split="test", modalities=["caption", "habitat"], batch_size=60
    )
    captions, truth = batch["caption"][:, 1] - VOCABULARY.index("red"), batch["habitat"]
    wrong = np.flatnonzero(captions != truth)
    assert {rare.member.key for rare in ranked} == {batch["key"][place] for place in wrong}
    for rare in ranked:
        assert rare.modality == "caption"
        assert rare.rate == pytest.approx(np.mean(captions[truth == rare.member.label].numpy() == (
            rare.member.label + 1) % 3))  # fmt: skip
        assert rare.member.opinions["caption"] == ((rare.member.label + 1) % 3, pytest.approx(1))


def test_rare_choices_survive_any_number_of_frequent_ones():
    choices = RareChoices(["a", "b"], num_clusters=3, limit=2)
    rng = np.random.default_rng(0)
    for number in range(400):
        # Modality b confuses clusters 0 and 1; sample 100 is the only one that a puts into cluster 2.
        chosen = np.array([[2 if number == 100 else 0, rng.integers(2)]])
        choices.count(np.array([0]), chosen, np.ones((1, 2), dtype=bool))
        for m in np.flatnonzero(chosen[0] != 0):
            opinions = {"ab"[m]: (int(chosen[0, m]), 0.9)}
            member = Member(str(number), "test", -1, 0, 1.0, np.zeros(1), opinions, {})
            choices.offer(int(m), 0, int(chosen[0, m]), 0.9, lambda member=member: member)
    first = choices.ranked()[0]
    assert (first.member.key, first.modality, first.rate) == ("100", "a", 1 / 400)
    assert first.surprise == pytest.approx(0.9 * np.log(400))


def test_a_sample_without_any_modality_is_counted_and_in_no_cluster(shards):
    model = MixedOracle()
    summary = ClusterSummary(model, len(COLOURS), LIMITS, seed=0)
    (batch,) = EvaluationLoader(shards, split="test", modalities=model.modality_names, batch_size=60)
    batch["mask"][:4] = False
    summary.add_batches([("test", batch)])
    assert (summary.num_empty, summary.sizes.sum()) == (4, 56)
