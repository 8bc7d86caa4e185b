"""Coherence at the validations of a training."""

from __future__ import annotations

import pytest
from accelerate import Accelerator
from commands import run_cmvae

from cmvae.data.index import ShardIndex
from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.generative import evaluate_generative
from cmvae.evaluation.validation_coherence import ValidationCoherence
from cmvae.models.cmvae import CMVAE
from cmvae.training.run import run_training
from cmvae.training.validation import load_validation


@pytest.mark.parametrize("ema_decay", ["null", "0.9"])
def test_a_validation_measures_the_weights_that_are_exported(experiment, quadrants_shards, ema_decay):
    config = experiment(
        f"data.shards={quadrants_shards}",
        "data.cache_megabytes=0",
        "train.coherence_samples=8",
        "train.validate_every=3",
        f"train.ema_decay={ema_decay}",
    )
    index = ShardIndex.load(quadrants_shards)
    seen = []

    class Recorded(ValidationCoherence):
        def __call__(self, task, accelerator):
            assert not task.training
            seen.append(super().__call__(task, accelerator))
            return seen[-1]

    run_training(config, index, measure=Recorded(config, index, config.train.coherence_samples))
    # At step 3 and at the end.
    assert len(seen) == 2
    settings = config.evaluation.model_copy(update={"split": "validation", "num_generated": 8})
    model = CMVAE.from_pretrained(config.run_dir / "export")
    context = EvaluationContext(model, quadrants_shards, index, settings, Accelerator(cpu=True))
    expected = evaluate_generative(context, {"coherence"}).metrics["coherence/conditional"]
    validation = load_validation(config.run_dir)
    assert validation["coherence/conditional"] == seen[-1]["coherence/conditional"] == expected
    assert 0 <= validation["coherence/unconditional"] <= 1


def test_without_classifiers_a_training_says_how_to_get_them(experiment_file, tmp_path):
    done = run_cmvae("train", experiment_file, "train.coherence_samples=8", folder=tmp_path)
    assert done.returncode == 2
    assert "train.coherence_samples: " in done.stderr
    assert "Train them once: cmvae classifiers" in done.stderr
    assert done.stderr.rstrip().endswith("or set it to null")
    assert "Traceback" not in done.stderr
