"""What generated text is worth: token by token, as sentences, and by the colours and the class that it names.

Every metric compares what is generated for a sample, from one of its other modalities or from the text
itself, with the sample's own text; how it is generated is told by `cmvae.evaluation.sampling`.
docs/metrics.md says what each is good for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from torch import Tensor

from cmvae.clustering import IntArray
from cmvae.evaluation.classifiers import MIN_ACCURACY
from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.report import GroupResult
from cmvae.evaluation.sampling import Pair, generate_pairs
from cmvae.modalities import Modality
from cmvae.modalities.text import EOS, SPECIAL_TOKENS
from cmvae.utils.errors import UserError

# torchmetrics imports torchvision, which must be mended first.
import cmvae.utils.torchvision_shim  # noqa: F401 isort:skip
from torchmetrics.functional.text import bleu_score  # isort:skip

COLOURS = frozenset(
    {"black", "white", "red", "green", "yellow", "blue", "brown", "orange", "pink", "purple", "grey", "gray"}
)
"""The basic colour terms of English (Berlin & Kay, 1969), with both spellings of grey."""
_MAX_BLEU_ORDER = 4
_MAX_ITERATIONS = 1000


@dataclass(frozen=True)
class TextClassifier:
    """Reads the class of a text off its words."""

    pipeline: Pipeline
    modality: Modality
    accuracy: float
    """On the real texts of the split that is evaluated."""

    def classify(self, tokens: Tensor) -> Tensor:
        """Classes (B,) int64 of data (B, length)."""
        classes = self.pipeline.predict(to_texts(self.modality.to_stored(tokens), self.modality))
        return torch.from_numpy(classes.astype(np.int64)).to(tokens.device)


def train_text_classifier(context: EvaluationContext, modality: str) -> TextClassifier:
    """Fit what reads the class of one modality's texts, on the train split; the same on every rank.

    Logistic regression on TF-IDF of words and pairs of words: a linear model that looks at which words there
    are and hardly at their order, so that it reads the faulty sentences of a decoder, too.

    Args:
        context: the evaluation; its split says the accuracy.
        modality: of kind text.

    Raises:
        UserError: the data has no labels or no train split, its texts have no words or are of one class, or
            the classifier reads fewer than `MIN_ACCURACY` of the real texts right.
    """
    split = context.settings.split
    if context.index.class_names is None:
        raise UserError("the data has no labels to learn to read texts from")
    if split == "train" or "train" not in context.index.splits:
        raise UserError(f"no train split apart from the {split} split to learn to read texts from")
    train_texts, train_labels = _labelled_texts(context, modality, "train")
    texts, labels = _labelled_texts(context, modality, split)
    if len(set(train_labels.tolist())) < 2 or not any(train_texts) or not texts:
        raise UserError("too few labelled texts, or too few classes of them, to learn to read them")
    pipeline = make_pipeline(
        TfidfVectorizer(tokenizer=str.split, token_pattern=None, lowercase=False, ngram_range=(1, 2)),
        LogisticRegression(max_iter=_MAX_ITERATIONS),
    )
    accuracy = float(pipeline.fit(train_texts, train_labels).score(texts, labels))
    if accuracy < MIN_ACCURACY:
        raise UserError(
            f"words tell the class of only {accuracy:.1%} of the real texts, below {MIN_ACCURACY:.0%}, so "
            "what they say of generated ones means nothing"
        )
    return TextClassifier(pipeline, context.model.modalities[modality], accuracy)


def evaluate_text(context: EvaluationContext) -> GroupResult:
    """Of all text modalities, and of every pair of SOURCE and TARGET, self included.

    Returns:
        `text/token_accuracy/SOURCE/TARGET`, `text/bleu/…`, and where real texts name colours
        `text/colours/…`, beside it `text/colours_by_chance/…`; each also as `…/self` and `…/cross`, means
        over pairs of a text with itself and with another source.
    """
    targets = context.measured_by("text")
    if not targets:
        return GroupResult(left_out={"text": "the model has no text"})
    result = GroupResult(
        protocol={
            "text.split": context.settings.split,
            "text.generated": "most probable words, z ~ q(z|x) of the source, w ~ p(w)",
            "text.token_accuracy": f"over the places of the real text up to its {EOS}",
            "text.colours": "mean F1 of the colours named, over samples whose real text names one",
        }
    )
    means: dict[str, list[float]] = {}
    for pair in generate_pairs(context, targets):
        modality = context.model.modalities[pair.target]
        metrics = _compare(pair, modality, context.settings.seed)
        result.protocol[f"text.num_samples.{pair.source}.{pair.target}"] = len(pair.real)
        if "colours" not in metrics:
            result.left_out[f"text/colours/{pair.source}/{pair.target}"] = "no real text names a colour"
        for name, value in metrics.items():
            result.metrics[f"text/{name}/{pair.source}/{pair.target}"] = value
            kind = "self" if pair.source == pair.target else "cross"
            means.setdefault(f"text/{name}/{kind}", []).append(value)
    result.metrics |= {name: float(np.mean(values)) for name, values in means.items()}
    return result


def _compare(pair: Pair, modality: Modality, seed: int) -> dict[str, float]:
    """The metrics of one pair, by name."""
    generated, real = to_texts(pair.generated, modality), to_texts(pair.real, modality)
    # What a text shares with that of any sample is no merit of what it was generated from.
    others = [real[place] for place in np.random.default_rng(seed).permutation(len(real))]
    metrics = {
        "token_accuracy": token_accuracy(pair.generated, pair.real),
        "bleu": bleu(generated, real),
        "colours": colour_agreement(generated, real),
        "colours_by_chance": colour_agreement(generated, others),
    }
    return {name: value for name, value in metrics.items() if value is not None}


def to_texts(stored: np.ndarray, modality: Modality) -> list[str]:
    """Stored tokens (N, length) as lines of words."""
    return [modality.describe(row) for row in stored]


def token_accuracy(generated: IntArray, real: IntArray) -> float:
    """Share of tokens that stand where the real text has them.

    Args:
        generated: (N, length), places in the vocabulary.
        real: (N, length); counted up to its first `<eos>`, which is the last token that a model must get
            right. What fills the rest up would make every model look good.
    """
    ends = real == SPECIAL_TOKENS.index(EOS)
    counted = (np.cumsum(ends, axis=1) - ends) == 0
    return float((generated == real)[counted].mean())


def bleu(generated: Sequence[str], real: Sequence[str]) -> float:
    """BLEU (Papineni et al., 2002) of a whole set, each text with one reference.

    Of up to four words in a row, as usual, or as many as the longest real text has.

    Args:
        generated: N texts.
        real: N texts, the references.
    """
    order = min(_MAX_BLEU_ORDER, max(len(text.split()) for text in real))
    if order == 0:
        return 0.0
    return float(bleu_score(list(generated), [[text] for text in real], n_gram=order))


def colour_agreement(generated: Sequence[str], real: Sequence[str]) -> float | None:
    """Do generated texts name the colours that the real ones name? Mean F1 of the two sets of colours.

    Where a real text names a single colour and a generated one, too, this is the share of texts that name the
    right one; naming all colours at once does not pay.

    Args:
        generated: N texts.
        real: N texts; those without any colour do not count.

    Returns:
        In [0, 1]; None where no real text names a colour.
    """
    scores = []
    for text, reference in zip(generated, real, strict=True):
        named, wanted = _colours(text), _colours(reference)
        if wanted:
            scores.append(2 * len(named & wanted) / (len(named) + len(wanted)))
    return float(np.mean(scores)) if scores else None


def _colours(text: str) -> set[str]:
    return {"grey" if word == "gray" else word for word in text.lower().split() if word in COLOURS}


def _labelled_texts(context: EvaluationContext, modality: str, split: str) -> tuple[list[str], IntArray]:
    """The texts that a split has of a modality with a label, and their labels (N,)."""
    place = context.model.modality_names.index(modality)
    collected = context.collect(
        context.batches(split),
        lambda batch: {
            "tokens": batch[modality],
            "label": batch["label"],
            "there": batch["mask"][:, place] & (batch["label"] >= 0),
        },
    )
    there = collected["there"]
    tokens, of_name = collected["tokens"][there], context.model.modalities[modality]
    return to_texts(of_name.to_stored(tokens), of_name), collected["label"][there]
