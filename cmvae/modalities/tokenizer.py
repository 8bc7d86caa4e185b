"""Sentences as tokens: split words, build a vocabulary, encode.

A word consists of letters, digits and inner apostrophes, in lower case. Other punctuation separates words and
is dropped: the words of "Long-tailed, isn't it?" are long, tailed, isn't, it. Where a script has no spaces
between words (Chinese, Japanese, Thai, Lao, Khmer, Burmese), each character with its marks is a token, and so
is each emoji.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import regex

from cmvae.modalities.text import EOS, PAD, SPECIAL_TOKENS, UNKNOWN

_WITHOUT_SPACES = r"\p{Script=Han}\p{Script=Hiragana}\p{Line_Break=Complex_Context}"
# Words do not begin with a mark, but contain marks: the vowels of Hindi.
_WORD = (
    rf"[\w\p{{N}}--[\p{{Connector_Punctuation}}\p{{Mark}}\p{{Join_Control}}{_WITHOUT_SPACES}]]"
    rf"[\w\p{{N}}--[\p{{Connector_Punctuation}}{_WITHOUT_SPACES}]]*"
)
_EMOJI = r"(?:\p{Emoji_Presentation}|\p{Extended_Pictographic}\uFE0F)"
# \X is a character as people see it, such as a letter with its marks or a family of emoji.
_TOKEN = regex.compile(
    rf"(?V1)(?=[[\p{{L}}\p{{M}}\p{{N}}]&&[{_WITHOUT_SPACES}]]|{_EMOJI})\X|{_WORD}(?:'{_WORD})*"
)


def split_words(sentence: str) -> list[str]:
    """The words of a sentence; different Unicode forms of a letter are the same letter."""
    return _TOKEN.findall(unicodedata.normalize("NFKC", sentence).replace("’", "'").lower())


def build_vocabulary(sentences: Iterable[Sequence[str]], min_count: int) -> tuple[str, ...]:
    """The special tokens, then the words by decreasing count, equal counts in alphabetical order.

    Args:
        sentences: the words of each sentence of the train split.
        min_count: rarer words are left out and become `<unk>`.
    """
    counts = Counter(word for sentence in sentences for word in sentence)
    words = sorted((word for word in counts if counts[word] >= min_count), key=lambda w: (-counts[w], w))
    return (*SPECIAL_TOKENS, *words)


class Tokenizer:
    """Encodes sentences as a fixed number of indices of a vocabulary.

    Args:
        vocabulary: begins with the special tokens.
        length: number of tokens per sentence: its words, `<eos>`, then `<pad>`. Longer sentences are
            truncated and end with `<eos>`, too.
    """

    def __init__(self, vocabulary: Sequence[str], length: int) -> None:
        self.vocabulary = tuple(vocabulary)
        self.length = length
        self._places = {word: place for place, word in enumerate(self.vocabulary)}

    def encode(self, words: Sequence[str]) -> np.ndarray:
        """The tokens of a sentence, (length,) int64."""
        unknown = self._places[UNKNOWN]
        tokens = np.full(self.length, self._places[PAD], dtype=np.int64)
        kept = [self._places.get(word, unknown) for word in words[: self.length - 1]]
        tokens[: len(kept) + 1] = [*kept, self._places[EOS]]
        return tokens
