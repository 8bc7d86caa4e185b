"""Predicted values of a model that is known, against scikit-learn and by hand."""

from __future__ import annotations

import json

import pytest
import torch
from made_up_context import make_context
from mixed import COLOURS, Mixed, MixedOracle, mixed_batch

from cmvae.evaluation.prediction import evaluate_prediction


def test_numbers_and_categories_are_compared_value_by_value():
    model = MixedOracle()
    model.say["photo"] = lambda classes: (classes + 1) % 3
    data = {"test": mixed_batch(Mixed(), "test")}
    result = evaluate_prediction(make_context(model, data, tuple(COLOURS), batch_size=16))
    label = data["test"]["label"].numpy()
    # In units of the data, not standardised: the share of the variance is the same.
    sizes = data["test"]["sizes"].numpy()
    for source, shift in (("caption", 0), ("habitat", 0), ("sizes", 0), ("photo", 1)):
        said = ((label + shift) % 3 - 1.0)[:, None]
        r2 = 1 - ((sizes - said) ** 2).sum(0) / ((sizes - sizes.mean(0)) ** 2).sum(0)
        assert result.metrics[f"prediction/r2/{source}/sizes"] == pytest.approx(r2.mean(), abs=1e-5)
        right = 0.0 if shift else 1.0
        assert result.metrics[f"prediction/accuracy/{source}/habitat"] == right
        # Of three marks one is set: where it is in the wrong place, two of three are wrong.
        assert result.metrics[f"prediction/accuracy/{source}/marks"] == pytest.approx(1 - (1 - right) * 2 / 3)
        assert result.metrics[f"prediction/accuracy_by_chance/{source}/habitat"] == pytest.approx(1 / 3)
        assert result.metrics[f"prediction/accuracy_by_chance/{source}/marks"] == pytest.approx(2 / 3)
    assert result.metrics["prediction/r2/photo/sizes"] < 0 < 0.9 < result.metrics["prediction/r2/marks/sizes"]
    assert not [name for name in result.metrics if name.endswith(("/photo", "/caption"))]
    json.dumps(result.protocol)


def test_a_missing_target_is_no_reference():
    data = {"test": mixed_batch(Mixed(), "test")}
    mask = torch.ones(60, 5, dtype=torch.bool)
    mask[:25, 4] = False
    mask[1:, 2] = False
    data["test"]["habitat"][:25] = 0
    data["test"]["mask"] = mask
    result = evaluate_prediction(make_context(MixedOracle(), data, tuple(COLOURS)))
    assert result.metrics["prediction/accuracy/photo/habitat"] == 1
    assert result.protocol["prediction.num_samples.photo.habitat"] == 35
    assert result.left_out["prediction/r2/photo/sizes"] == "a single sample has no variance"
    assert "prediction/accuracy/sizes/habitat" not in result.metrics


def test_a_dimension_that_is_constant_in_the_split_has_no_share():
    """Constant but for rounding: its share would be minus some power of ten, and rule the mean."""
    data = {"test": mixed_batch(Mixed(), "test")}
    whole = evaluate_prediction(make_context(MixedOracle(), data, tuple(COLOURS))).metrics
    own = data["test"]["sizes"].numpy().copy()
    said = data["test"]["label"].numpy() - 1.0
    data["test"]["sizes"][:, 1] = 0.7 + 1e-7 * torch.arange(60) / 60
    result = evaluate_prediction(make_context(MixedOracle(), data, tuple(COLOURS)))
    expected = 1 - ((own[:, 0] - said) ** 2).sum() / ((own[:, 0] - own[:, 0].mean()) ** 2).sum()
    assert result.metrics["prediction/r2/caption/sizes"] == pytest.approx(expected, abs=1e-5)
    assert result.metrics["prediction/r2/caption/sizes"] != whole["prediction/r2/caption/sizes"]
    data["test"]["sizes"][:, 0] = -0.2
    result = evaluate_prediction(make_context(MixedOracle(), data, tuple(COLOURS)))
    assert result.left_out["prediction/r2/caption/sizes"] == "the test split has no variance"
