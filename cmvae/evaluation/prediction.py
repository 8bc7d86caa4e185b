"""Accuracy of generated vectors, bits and categories, value by value."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import r2_score

from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.report import GroupResult
from cmvae.evaluation.sampling import Pair, generate_pairs
from cmvae.modalities import Modality, VectorModality

_LEAST_SPREAD = 1e-5


def evaluate_prediction(context: EvaluationContext) -> GroupResult:
    """Compare generated vectors, bits and categories with real ones, for every SOURCE and TARGET.

    Returns:
        For vectors, `prediction/r2/SOURCE/TARGET`: explained share of the variance, averaged over dimensions
        that vary; at most 1, and below 0 if worse than the mean of the split. For others,
        `prediction/accuracy/SOURCE/TARGET`: share of correct values, and
        `prediction/accuracy_by_chance/SOURCE/TARGET`: that of always predicting the most frequent value.
    """
    targets = context.measured_by("prediction")
    if not targets:
        return GroupResult(left_out={"prediction": "the model has no vectors, bits or categories"})
    result = GroupResult(
        protocol={
            "prediction.split": context.settings.split,
            "prediction.generated": "mean or mode of the decoder, z ~ q(z|x) of the source, w ~ p(w)",
        }
    )
    for pair in generate_pairs(context, targets):
        name = f"{pair.source}/{pair.target}"
        result.protocol[f"prediction.num_samples.{pair.source}.{pair.target}"] = len(pair.real)
        if np.issubdtype(pair.real.dtype, np.floating):
            varying = _varying(pair.real, context.model.modalities[pair.target])
            if len(pair.real) < 2:
                result.left_out[f"prediction/r2/{name}"] = "a single sample has no variance"
            elif not varying.any():
                result.left_out[f"prediction/r2/{name}"] = (
                    f"the {context.settings.split} split has no variance"
                )
            else:
                r2 = r2_score(pair.real[:, varying], pair.generated[:, varying])
                result.metrics[f"prediction/r2/{name}"] = float(r2)
        else:
            result.metrics[f"prediction/accuracy/{name}"] = float(np.mean(pair.generated == pair.real))
            result.metrics[f"prediction/accuracy_by_chance/{name}"] = _by_chance(pair)
    return result


def _varying(real: np.ndarray, modality: Modality) -> np.ndarray:
    """(D,) bool, the dimensions that vary in the split; the others have no variance to explain.

    The threshold is relative to the train split, because a standardised constant differs by rounding.
    """
    usual = np.asarray(modality.std) if isinstance(modality, VectorModality) else 1.0
    return real.std(axis=0, dtype=np.float64) > _LEAST_SPREAD * usual


def _by_chance(pair: Pair) -> float:
    """Accuracy of always predicting the most frequent value of each dimension."""
    columns = pair.real.reshape(len(pair.real), -1).T
    return float(
        np.mean([np.unique(column, return_counts=True)[1].max() for column in columns]) / len(pair.real)
    )
