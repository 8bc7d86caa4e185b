"""Linear probes: how well a linear classifier predicts the class from the latents of one modality.

The shared z should determine the class, the private w should not. As in MMVAE+ and CMVAE, the classifier is
logistic regression on the locations of the posteriors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.report import GroupResult
from cmvae.evaluation.sampling import encode_sources

MAX_TRAINING_SAMPLES = 20_000
"""More change a linear classifier's accuracy in the third decimal, and take minutes."""
_MAX_ITERATIONS = 2000


@dataclass(frozen=True)
class ProbedLatents:
    """Locations of the posteriors of labelled samples, as features of the probes."""

    train: Mapping[str, np.ndarray]
    """Of the train split, see `encode_sources` with q(w|x); N samples."""
    test: Mapping[str, np.ndarray]
    """The same of the split that is evaluated."""
    seed: int
    """Seed of the choice of train samples."""

    def of(
        self, parts: Sequence[str]
    ) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None:
        """Features and labels, train and test, of the samples that have all the modalities.

        Args:
            parts: names such as `loc/m0`, which are concatenated.

        Returns:
            None if fewer than two classes can be learned, or no sample can be tested.
        """
        pairs = []
        for encoded in (self.train, self.test):
            there = np.all([encoded[f"has/{part.partition('/')[2]}"] for part in parts], axis=0)
            features = np.concatenate([encoded[part][there] for part in parts], axis=1)
            pairs.append((features, encoded["label"][there]))
        (features, label), test = pairs
        chosen = np.sort(np.random.default_rng(self.seed).permutation(len(label))[:MAX_TRAINING_SAMPLES])
        if len(np.unique(label[chosen])) < 2 or len(test[1]) == 0:
            return None
        return (features[chosen], label[chosen]), test


def encode_for_probes(context: EvaluationContext) -> ProbedLatents | str:
    """Encode the labelled samples, or say why there is nothing to probe."""
    split = context.settings.split
    if context.index.class_names is None:
        return "the data has no labels"
    if split == "train" or "train" not in context.index.splits:
        return f"no train split apart from the {split} split to learn from"
    test = _encode(context, split)
    if len(test["label"]) == 0:
        return f"no sample of the {split} split has a label"
    train = _encode(context, "train")
    if len(np.unique(train["label"])) < 2:
        return "the train split has labels of fewer than two classes"
    return ProbedLatents(train, test, context.settings.seed)


def evaluate_probes(context: EvaluationContext, latents: ProbedLatents | str | None = None) -> GroupResult:
    """Measure the accuracy of linear classifiers on z, w and both, `probe/{z,w,both}/MODALITY`.

    They are trained on the labelled samples of the train split that have the modality, and tested on those of
    the split that is evaluated.

    Args:
        context: model, data and settings.
        latents: of `encode_for_probes`; None encodes the samples.
    """
    latents = encode_for_probes(context) if latents is None else latents
    if isinstance(latents, str):
        return GroupResult(left_out={"probe": latents})
    result = GroupResult(
        protocol={
            "probe.classifier": "logistic regression, L2 with C = 1, on standardised posterior locations",
            "probe.max_train_samples": MAX_TRAINING_SAMPLES,
            "probe.test_split": context.settings.split,
            "probe.seed": context.settings.seed,
        }
    )
    for modality in context.model.modality_names:
        for latent, parts in parts_of(modality).items():
            sets = latents.of(parts)
            if sets is None:
                reason = "too few labelled samples have this modality"
                result.left_out[f"probe/{latent}/{modality}"] = reason
                continue
            train, test = sets
            result.protocol[f"probe.train_samples.{modality}"] = len(train[1])
            result.protocol[f"probe.test_samples.{modality}"] = len(test[1])
            result.metrics[f"probe/{latent}/{modality}"] = probe_accuracy(*train, *test)
    return result


def parts_of(modality: str) -> dict[str, tuple[str, ...]]:
    """The latents of a modality that are probed, and their parts."""
    z, w = f"loc/{modality}", f"private_loc/{modality}"
    return {"z": (z,), "w": (w,), "both": (z, w)}


def probe_accuracy(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    classifier: ClassifierMixin | None = None,
) -> float:
    """Accuracy of a classifier on test samples.

    Args:
        train_features: (N, D); every dimension is standardised with their statistics.
        train_labels: (N,), at least two classes.
        test_features: (T, D).
        test_labels: (T,).
        classifier: a classifier of scikit-learn; None is logistic regression.
    """
    pipeline = make_pipeline(StandardScaler(), classifier or LogisticRegression(max_iter=_MAX_ITERATIONS))
    return float(pipeline.fit(train_features, train_labels).score(test_features, test_labels))


def _encode(context: EvaluationContext, split: str) -> dict[str, np.ndarray]:
    """The labelled samples of a split, see `encode_sources`."""
    encoded = context.collect(
        context.batches(split), lambda batch: encode_sources(context.model, batch, with_private=True)
    )
    labelled = encoded["label"] >= 0
    return {name: values[labelled] for name, values in encoded.items()}
