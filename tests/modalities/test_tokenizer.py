import re
import unicodedata

import numpy as np
import pytest

from cmvae.modalities.tokenizer import Tokenizer, build_vocabulary, split_words


def test_words_are_lower_case_without_punctuation():
    assert split_words("Long-tailed, isn't it?  A 7cm_BEAK.") == [
        "long", "tailed", "isn't", "it", "a", "7cm", "beak"
    ]  # fmt: skip
    assert split_words("'quoted' birds’ wings; it’s") == ["quoted", "birds", "wings", "it's"]
    assert split_words("!?") == []


def test_two_spellings_of_a_letter_are_one_word():
    # An é as one character, and as e with an accent that combines.
    assert split_words("Caf\u00e9") == split_words("cafe\u0301") == ["caf\u00e9"]


def test_the_vocabulary_holds_what_is_frequent_enough_by_falling_count():
    sentences = [["red", "bird"], ["blue", "bird"], ["red", "bird", "once"], ["blue"]]
    assert build_vocabulary(sentences, min_count=2) == ("<pad>", "<eos>", "<unk>", "bird", "blue", "red")
    assert build_vocabulary(sentences, min_count=1)[-1] == "once"


def test_tokens_end_and_are_filled_up_or_cut():
    tokenizer = Tokenizer(("<pad>", "<eos>", "<unk>", "bird", "red"), length=4)
    for words, tokens in [
        ([], [1, 0, 0, 0]),
        (["red", "bird"], [4, 3, 1, 0]),
        (["red", "cat", "bird"], [4, 2, 3, 1]),
        (["red", "red", "red", "red", "red"], [4, 4, 4, 1]),
    ]:
        encoded = tokenizer.encode(words)
        assert encoded.tolist() == tokens
        assert encoded.dtype == np.int64


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\u4e00\u53ea\u7ea2\u9e1f, 3", ["\u4e00", "\u53ea", "\u7ea2", "\u9e1f", "3"]),  # Chinese
        (
            "\u6771\u4eac\u306e\u30c6\u30ec\u30d3",
            ["\u6771", "\u4eac", "\u306e", "\u30c6\u30ec\u30d3"],
        ),  # Japanese
        ("\ud55c\uad6d\uc5b4 \ubb38\uc7a5", ["\ud55c\uad6d\uc5b4", "\ubb38\uc7a5"]),  # Korean
        (
            "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
            ["\u0e2a", "\u0e27\u0e31", "\u0e2a", "\u0e14\u0e35"],
        ),  # Thai: vowels stay
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u092d\u093e\u0937\u093e",
            ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u092d\u093e\u0937\u093e"],
        ),  # Hindi
        ("good\U0001f44d\U0001f3fd\u2764\ufe0f", ["good", "\U0001f44d\U0001f3fd", "\u2764\ufe0f"]),  # emoji
        ("\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7", ["\U0001f1e9\U0001f1ea", "\U0001f1eb\U0001f1f7"]),
        ("\u00a9 2024", ["2024"]),
    ],
)
def test_scripts_without_spaces_and_emoji_have_tokens(text, words):
    assert split_words(text) == words


def test_vocabularies_of_english_are_what_they_were():
    """Letters with and without accents, of European scripts, in all neighbourhoods."""
    before = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
    letters = [
        *map(chr, range(0x20, 0x250)),
        *"\u2018\u2019\u201c\u2013\u2014\u2026\u20ac\u2122",
        *map(chr, range(0x370, 0x530)),
    ]
    rng = np.random.default_rng(0)
    for _ in range(2000):
        text = "".join(rng.choice(letters, 30)) + "".join(rng.choice(list("ab '_-.,3"), 30))
        plain = unicodedata.normalize("NFKC", text).replace("\u2019", "'").lower()
        if not any(unicodedata.category(c).startswith("M") for c in plain):
            assert split_words(text) == before.findall(plain)
