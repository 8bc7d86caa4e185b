"""Metrics of text by hand, and of a model whose texts are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from made_up_context import make_context
from mixed import COLOURS, MODALITIES, VOCABULARY, Mixed, MixedOracle, encode_words, mixed_batch
from sklearn.metrics import f1_score

from cmvae.evaluation.text import (
    bleu,
    colour_agreement,
    evaluate_text,
    to_texts,
    token_accuracy,
    train_text_classifier,
)
from cmvae.utils.errors import UserError

CAPTION = MODALITIES["caption"]


@pytest.fixture
def data():
    return {split: mixed_batch(Mixed(), split) for split in ("train", "test")}


def test_tokens_count_up_to_the_end_of_the_real_text():
    real = np.stack([encode_words(["a", "red", "bird"]), encode_words(["the", "fish"])])
    assert token_accuracy(real, real) == 1
    generated = real.copy()
    # What fills up does not count, what comes too early does, and an end that is missing.
    generated[:, 4:] = VOCABULARY.index("wings")
    assert token_accuracy(generated, real) == 1
    generated[0, 3] = VOCABULARY.index("with")
    assert token_accuracy(generated, real) == pytest.approx(6 / 7)
    generated[1, 0] = VOCABULARY.index("a")
    assert token_accuracy(generated, real) == pytest.approx(5 / 7)
    full = np.full((1, 6), VOCABULARY.index("a"))
    assert token_accuracy(full, full) == 1


def test_bleu_of_a_set_by_hand():
    assert bleu(["a b c d e"], ["a b c d f"]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** (1 / 4))
    # Counts of a whole set, and the penalty of being short.
    assert bleu(["a b c d", "a"], ["a b c d", "a b c"]) == pytest.approx(np.exp(1 - 7 / 5))
    # One word has no pairs of words.
    assert bleu(["seven", "two"], ["seven", "three"]) == pytest.approx(1 / 2)
    assert bleu(["", ""], ["", ""]) == 0


def test_colours_agree_as_sets():
    assert colour_agreement(["a red bird", "black"], ["red wings", "white"]) == pytest.approx(1 / 2)
    # What names no colour in reality does not count; two spellings are one colour.
    assert colour_agreement(["red", "grey"], ["a bird", "gray"]) == 1
    assert colour_agreement(["red"], ["a bird"]) is None
    colours = sorted(COLOURS)
    truth, said = np.array([[1, 0, 1], [0, 1, 0]]), np.array([[1, 1, 0], [1, 1, 1]])
    texts = [[" ".join(np.array(colours)[row == 1]) for row in rows] for rows in (said, truth)]
    assert colour_agreement(*texts) == pytest.approx(f1_score(truth, said, average="samples"))


def test_a_model_whose_texts_are_known(data):
    model = MixedOracle()
    model.say["sizes"] = lambda classes: (classes + 1) % 3
    result = evaluate_text(make_context(model, data, tuple(COLOURS), batch_size=16))
    real = data["test"]["caption"].numpy()
    label = data["test"]["label"].numpy()
    for source, shift in (("caption", 0), ("photo", 0), ("marks", 0), ("sizes", 1)):
        said = np.stack([encode_words(["a", list(COLOURS)[(c + shift) % 3], "bird"]) for c in label])
        right = [
            said[n, t] == real[n, t] for n in range(len(real)) for t in range(1 + real[n].tolist().index(1))
        ]
        name = f"{source}/caption"
        assert result.metrics[f"text/token_accuracy/{name}"] == pytest.approx(np.mean(right))
        expected = bleu(to_texts(said, CAPTION), to_texts(real, CAPTION))
        assert result.metrics[f"text/bleu/{name}"] == pytest.approx(expected)
        assert result.metrics[f"text/colours/{name}"] == (1 if shift == 0 else 0)
        assert result.metrics[f"text/colours_by_chance/{name}"] == pytest.approx(1 / 3, abs=0.15)
        assert result.protocol[f"text.num_samples.{source}.caption"] == len(real)
    assert result.metrics["text/colours/self"] == 1
    assert result.metrics["text/colours/cross"] == pytest.approx(3 / 4)
    assert result.left_out == {}
    json.dumps(result.protocol)


def test_only_samples_with_both_are_compared(data):
    mask = torch.ones(60, 5, dtype=torch.bool)
    mask[:20, 0] = False  # no photo
    mask[10:30, 1] = False  # no caption
    mask[:, 3] = False  # no marks at all
    # What stands where something is missing would spoil every score.
    data["test"]["caption"][10:30] = VOCABULARY.index("fish")
    data["test"]["mask"] = mask
    result = evaluate_text(make_context(MixedOracle(), data, tuple(COLOURS)))
    sizes = {name: value for name, value in result.protocol.items() if name.startswith("text.num_samples")}
    assert sizes == {
        "text.num_samples.photo.caption": 30,
        "text.num_samples.caption.caption": 40,
        "text.num_samples.sizes.caption": 40,
        "text.num_samples.habitat.caption": 40,
    }
    assert {value for name, value in result.metrics.items() if name.startswith("text/colours/")} == {1.0}


def test_the_classifier_reads_words_and_says_how_well(data):
    context = make_context(MixedOracle(), data, tuple(COLOURS))
    classifier = train_text_classifier(context, "caption")
    assert classifier.accuracy == 1
    texts = [["the", colour, "fish"] for colour in ("blue", "red", "green")]
    # Words in the wrong order are read all the same.
    texts.append(["with", "wings", "blue"])
    tokens = torch.from_numpy(np.stack([encode_words(words) for words in texts]))
    assert classifier.classify(tokens).tolist() == [2, 0, 1, 2]


def test_texts_that_do_not_tell_their_class_are_no_measure(data):
    for values in data.values():
        values["label"] = values["label"][torch.randperm(len(values["label"]))]
    context = make_context(MixedOracle(), data, tuple(COLOURS))
    with pytest.raises(UserError, match=r"on real texts, below 80%"):
        train_text_classifier(context, "caption")
    with pytest.raises(UserError, match="no labels"):
        train_text_classifier(make_context(MixedOracle(), data), "caption")
    with pytest.raises(UserError, match="no train split apart from the train split"):
        train_text_classifier(make_context(MixedOracle(), data, tuple(COLOURS), split="train"), "caption")
