import numpy as np

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
