"""Metrics of generated text: token accuracy, BLEU, named colours, and a text classifier.

Every metric compares text generated for a sample, from another modality or from the text itself, with the
real text of the sample; see `cmvae.evaluation.sampling`. docs/evaluation.md explains them.
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

# Before torchmetrics, which imports torchvision.
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
    """Classifier of the texts of one modality."""

    pipeline: Pipeline
    """Lines of words → classes."""
    modality: Modality
    """The text modality."""
    accuracy: float
    """Accuracy on the real texts of the split that is evaluated."""

    def classify(self, tokens: Tensor) -> Tensor:
        """Predict classes (B,) int64 of data (B, length)."""
        classes = self.pipeline.predict(to_texts(self.modality.to_stored(tokens), self.modality))
        return torch.from_numpy(classes.astype(np.int64)).to(tokens.device)


def train_text_classifier(context: EvaluationContext, modality: str) -> TextClassifier:
    """Train a classifier of one text modality on the train split; the same on every rank.

    It is logistic regression on TF-IDF of words and pairs of words. A linear model hardly depends on the
    order of words, so it can classify the faulty sentences of a decoder.

    Args:
        context: the evaluation; its split gives the accuracy.
        modality: a text modality.

    Raises:
        UserError: the data has no labels or no train split, its texts have no words or one class only, or the
            accuracy on real texts is below `MIN_ACCURACY`.
    """
    split = context.settings.split
    if context.index.class_names is None:
        raise UserError("the data has no labels to train a text classifier with")
    if split == "train" or "train" not in context.index.splits:
        raise UserError(f"no train split apart from the {split} split to train a text classifier on")
    train_texts, train_labels = _labelled_texts(context, modality, "train")
    texts, labels = _labelled_texts(context, modality, split)
    if len(set(train_labels.tolist())) < 2 or not any(train_texts) or not texts:
        raise UserError("too few labelled texts, or too few classes, to train a text classifier")
    pipeline = make_pipeline(
        TfidfVectorizer(tokenizer=str.split, token_pattern=None, lowercase=False, ngram_range=(1, 2)),
        LogisticRegression(max_iter=_MAX_ITERATIONS),
    )
    accuracy = float(pipeline.fit(train_texts, train_labels).score(texts, labels))
    if accuracy < MIN_ACCURACY:
        raise UserError(
            f"the text classifier has an accuracy of {accuracy:.1%} on real texts, below "
            f"{MIN_ACCURACY:.0%}, too low to judge generated ones"
        )
    return TextClassifier(pipeline, context.model.modalities[modality], accuracy)


def evaluate_text(context: EvaluationContext) -> GroupResult:
    """Compare generated with real texts, for every text TARGET and every SOURCE, itself included.

    Returns:
        `text/token_accuracy/SOURCE/TARGET` and `text/bleu/…`; if real texts name colours, also
        `text/colours/…` and `text/colours_by_chance/…`. The means are `…/self` over pairs with SOURCE =
        TARGET and `…/cross` over the others.
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
    """Metrics of one pair, by name."""
    generated, real = to_texts(pair.generated, modality), to_texts(pair.real, modality)
    # Chance level: the colours that a text shares with that of another sample.
    others = [real[place] for place in np.random.default_rng(seed).permutation(len(real))]
    metrics = {
        "token_accuracy": token_accuracy(pair.generated, pair.real),
        "bleu": bleu(generated, real),
        "colours": colour_agreement(generated, real),
        "colours_by_chance": colour_agreement(generated, others),
    }
    return {name: value for name, value in metrics.items() if value is not None}


def to_texts(stored: np.ndarray, modality: Modality) -> list[str]:
    """Convert stored tokens (N, length) to lines of words."""
    return [modality.describe(row) for row in stored]


def token_accuracy(generated: IntArray, real: IntArray) -> float:
    """Share of tokens that equal the real text's token in the same place.

    Args:
        generated: (N, length), indices in the vocabulary.
        real: (N, length); counted up to and including the first `<eos>`, because padding is easy to predict.
    """
    ends = real == SPECIAL_TOKENS.index(EOS)
    counted = (np.cumsum(ends, axis=1) - ends) == 0
    return float((generated == real)[counted].mean())


def bleu(generated: Sequence[str], real: Sequence[str]) -> float:
    """Corpus BLEU (Papineni et al., 2002) with one reference per text.

    N-grams have up to four words, or as many as the longest real text.

    Args:
        generated: N texts.
        real: N reference texts.
    """
    order = min(_MAX_BLEU_ORDER, max(len(text.split()) for text in real))
    if order == 0:
        return 0.0
    return float(bleu_score(list(generated), [[text] for text in real], n_gram=order))


def colour_agreement(generated: Sequence[str], real: Sequence[str]) -> float | None:
    """Mean F1 between the sets of colours that generated and real texts name.

    For texts with a single colour each, this is the share of correct colours.

    Args:
        generated: N texts.
        real: N texts; those without a colour are skipped.

    Returns:
        Mean in [0, 1]; None if no real text names a colour.
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
    """The labelled texts of a modality in a split, and their labels (N,)."""
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
