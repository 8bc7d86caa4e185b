"""Linear probes: how well a linear classifier predicts the class from the latents of one modality.

The shared z should determine the class, the private w should not. As in MMVAE+ and CMVAE, the classifier is
logistic regression on the locations of the posteriors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.report import GroupResult

MAX_TRAINING_SAMPLES = 20_000
"""More change a linear classifier's accuracy in the third decimal, and take minutes."""
_MAX_ITERATIONS = 2000


def evaluate_probes(context: EvaluationContext) -> GroupResult:
    """Measure the accuracy of linear classifiers on z, w and both, `probe/{z,w,both}/MODALITY`.

    They are trained on the labelled samples of the train split that have the modality, and tested on those of
    the split that is evaluated.
    """
    split = context.settings.split
    if context.index.class_names is None:
        return GroupResult(left_out={"probe": "the data has no labels"})
    if split == "train" or "train" not in context.index.splits:
        return GroupResult(left_out={"probe": f"no train split apart from the {split} split to learn from"})
    test = _encode(context, split)
    if len(test["label"]) == 0:
        return GroupResult(left_out={"probe": f"no sample of the {split} split has a label"})
    train = _encode(context, "train")
    if len(np.unique(train["label"])) < 2:
        return GroupResult(left_out={"probe": "the train split has labels of fewer than two classes"})
    chosen = {
        name: _choose(_samples_with(train, name), context.settings.seed)
        for name in context.model.modality_names
    }
    result = GroupResult(
        protocol={
            "probe.classifier": "logistic regression, L2 with C = 1, on standardised posterior locations",
            "probe.max_train_samples": MAX_TRAINING_SAMPLES,
            "probe.test_split": split,
            "probe.seed": context.settings.seed,
        }
    )
    for modality, learned in chosen.items():
        tested = _samples_with(test, modality)
        result.protocol[f"probe.train_samples.{modality}"] = len(learned["label"])
        result.protocol[f"probe.test_samples.{modality}"] = len(tested["label"])
        if len(np.unique(learned["label"])) < 2 or len(tested["label"]) == 0:
            reason = "too few labelled samples have this modality"
            result.left_out |= {f"probe/{latent}/{modality}": reason for latent in ("z", "w", "both")}
            continue
        for latent in ("z", "w", "both"):
            result.metrics[f"probe/{latent}/{modality}"] = probe_accuracy(
                _features(learned, latent, modality),
                learned["label"],
                _features(tested, latent, modality),
                tested["label"],
            )
    return result


def probe_accuracy(
    train_features: np.ndarray, train_labels: np.ndarray, test_features: np.ndarray, test_labels: np.ndarray
) -> float:
    """Accuracy of logistic regression on test samples.

    Args:
        train_features: (N, D); every dimension is standardised with their statistics.
        train_labels: (N,), at least two classes.
        test_features: (T, D).
        test_labels: (T,).
    """
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_MAX_ITERATIONS))
    return float(classifier.fit(train_features, train_labels).score(test_features, test_labels))


def _encode(context: EvaluationContext, split: str) -> dict[str, np.ndarray]:
    """Encode labelled samples: `z/MODALITY` (N, D_z), `w/MODALITY` (N, D_w), `has/MODALITY`, `label` (N,)."""

    def compute(batch: Mapping[str, Any]) -> dict[str, Tensor]:
        posteriors = context.model.encode({name: batch[name] for name in context.model.modality_names})
        locations = {"label": batch["label"]}
        for (name, posterior), there in zip(posteriors.items(), batch["mask"].T, strict=True):
            locations[f"has/{name}"] = there
            locations |= {f"z/{name}": posterior.shared.loc, f"w/{name}": posterior.private.loc}
        return locations

    encoded = context.collect(context.batches(split), compute)
    labelled = encoded["label"] >= 0
    return {name: values[labelled] for name, values in encoded.items()}


def _samples_with(encoded: Mapping[str, np.ndarray], modality: str) -> dict[str, np.ndarray]:
    """The samples that have a modality."""
    there = encoded[f"has/{modality}"]
    return {name: values[there] for name, values in encoded.items()}


def _choose(encoded: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """A random choice of at most `MAX_TRAINING_SAMPLES`."""
    num_samples = len(encoded["label"])
    chosen = np.random.default_rng(seed).permutation(num_samples)[:MAX_TRAINING_SAMPLES]
    return {name: values[np.sort(chosen)] for name, values in encoded.items()}


def _features(encoded: dict[str, np.ndarray], latent: str, modality: str) -> np.ndarray:
    parts = ("z", "w") if latent == "both" else (latent,)
    return np.concatenate([encoded[f"{part}/{modality}"] for part in parts], axis=1)
