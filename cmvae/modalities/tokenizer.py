"""From sentences to tokens: words, the vocabulary of a train split, places in it.

A word is a run of letters and digits, an apostrophe within it included, in lower case. All other punctuation
parts words and is dropped: "Long-tailed, isn't it?" is the words long, tailed, isn't, it.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from cmvae.modalities.text import EOS, PAD, SPECIAL_TOKENS, UNKNOWN

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def split_words(sentence: str) -> list[str]:
    """The words of a sentence; the same letter written in two ways by Unicode counts as one."""
    return _WORD.findall(unicodedata.normalize("NFKC", sentence).replace("’", "'").lower())


def build_vocabulary(sentences: Iterable[Sequence[str]], min_count: int) -> tuple[str, ...]:
    """The special tokens, then the words by falling count; equal counts by the alphabet.

    Args:
        sentences: the words of each sentence of the train split.
        min_count: rarer words are left out: they become `<unk>`.
    """
    counts = Counter(word for sentence in sentences for word in sentence)
    words = sorted((word for word in counts if counts[word] >= min_count), key=lambda w: (-counts[w], w))
    return (*SPECIAL_TOKENS, *words)


class Tokenizer:
    """Places in a vocabulary, at most so many a sentence.

    Args:
        vocabulary: begins with the special tokens.
        length: tokens of every sentence: its words, `<eos>`, and `<pad>` to the end. What is longer is cut,
            and ends with `<eos>` all the same.
    """

    def __init__(self, vocabulary: Sequence[str], length: int) -> None:
        self.vocabulary = tuple(vocabulary)
        self.length = length
        self._places = {word: place for place, word in enumerate(self.vocabulary)}

    def encode(self, words: Sequence[str]) -> np.ndarray:
        """(length,) int64."""
        unknown = self._places[UNKNOWN]
        tokens = np.full(self.length, self._places[PAD], dtype=np.int64)
        kept = [self._places.get(word, unknown) for word in words[: self.length - 1]]
        tokens[: len(kept) + 1] = [*kept, self._places[EOS]]
        return tokens
