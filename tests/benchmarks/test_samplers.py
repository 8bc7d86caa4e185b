"""Measurements of samplers against the evaluation of a refiner with that sampler, and against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import samplers
import torch
from accelerate import Accelerator
from refiner_run import write_refiner_run
from samplers import TimedDCMVAE, measure_samplers, sampler_titles

from cmvae.config import SamplerConfig
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.evaluation.classifiers import load_classifiers
from cmvae.evaluation.frechet import FrechetDistance
from cmvae.evaluation.generative import evaluate_generative
from cmvae.evaluation.run import load_context
from cmvae.utils.errors import UserError

SAMPLERS = [SamplerConfig(num_steps=2), SamplerConfig(name="ddpm", num_steps=3, start=0.5, guidance=2)]


@pytest.fixture(scope="module")
def run(tmp_path_factory, quadrants_shards):
    """A refiner's experiment, and the index of its shards."""
    config = write_refiner_run(tmp_path_factory.mktemp("runs"), quadrants_shards)
    return config, ShardIndex.load(quadrants_shards)


@pytest.fixture(scope="module")
def measured(run):
    config, index = run
    return list(measure_samplers(config, index, config.run_dir, SAMPLERS))


def real_distance(shards, index, num_samples):
    """Train against test images, the mean over modalities."""
    classifiers = load_classifiers(shards, index, list(index.modalities), torch.device("cpu"))
    distances = []
    for name, classifier in classifiers.items():
        features = {}
        for split in ("train", "test"):
            (batch,) = EvaluationLoader(shards, split=split, modalities=[name], batch_size=192)
            _, read = classifier.classify(batch[name][:num_samples].float() / 255)
            features[split] = read[: int(batch["valid"].sum())].numpy()
        distances.append(FrechetDistance(features["test"]).to(features["train"]))
    return np.mean(distances)


def test_figures_are_those_of_the_evaluation_with_that_sampler(run, measured):
    config, index = run
    _, unrefined, *refined = measured
    assert [m.title for m in refined] == sampler_titles(SAMPLERS)
    for measurement, sampler in zip(refined, SAMPLERS, strict=True):
        changed = config.refiner.model_copy(update={"sampler": sampler})
        context = load_context(
            config.model_copy(update={"refiner": changed}), index, config.run_dir, Accelerator(cpu=True)
        )
        expected = evaluate_generative(context, {"coherence", "frechet"}).metrics
        of_refined = {key.removeprefix("refined/"): x for key, x in expected.items() if "refined/" in key}
        assert measurement.metrics == of_refined
        assert unrefined.metrics.items() <= expected.items()
        assert measurement.seconds > 0
        assert measurement.images_per_second > 0
    assert refined[0].metrics != refined[1].metrics


@pytest.mark.parametrize("num_samples", [None, 40])
def test_the_floor_is_as_many_train_images_against_the_split(run, measured, num_samples):
    config, index = run
    if num_samples is None:
        floor, size = measured[0], 90
    else:
        floor, unrefined = measure_samplers(config, index, config.run_dir, [], num_samples)
        size = num_samples
        # Of fewer samples everything else is another, too.
        assert unrefined.metrics["coherence/conditional"] != measured[1].metrics["coherence/conditional"]
    expected = pytest.approx(real_distance(config.data.shards, index, size), rel=1e-4)
    assert floor.metrics == {
        f"frechet/classifier/{kind}": expected
        for kind in ("unconditional", "conditional", "conditional_cross")
    }


def test_unconditional_generations_alone_have_the_figures_that_they_have_among_others(run, measured):
    config, index = run
    alone = list(measure_samplers(config, index, config.run_dir, SAMPLERS, unconditional=True))
    names = {"frechet/classifier/unconditional", "coherence/unconditional"}
    for measurement, among in zip(alone[1:], measured[1:], strict=True):
        assert measurement.metrics == {name: among.metrics[name] for name in names}


@pytest.mark.parametrize(
    ("num_samples", "settings", "expected"),
    [
        (20, {}, r"frechet/classifier/\w+: 20 samples are too few"),
        (None, {"num_generated": 8}, "frechet/classifier/unconditional: 8 sam"),
    ],
)
def test_too_few_samples_for_a_distance_are_refused(run, num_samples, settings, expected):
    config, index = run
    evaluation = config.evaluation.model_copy(update=settings)
    config = config.model_copy(update={"evaluation": evaluation})
    with pytest.raises(UserError, match=expected):
        next(measure_samplers(config, index, config.run_dir, SAMPLERS, num_samples))


def test_without_classifiers_nothing_is_measured(run):
    config, index = run
    with pytest.raises(UserError, match=r"no classifier for modality m0.*cmvae classifiers"):
        next(measure_samplers(config, index.model_copy(update={"classifiers": {}}), config.run_dir, SAMPLERS))


def test_a_rate_leaves_out_the_call_that_warms_up(run, monkeypatch):
    config, _ = run
    timed = TimedDCMVAE.from_pretrained(config.run_dir / "export", config.cmvae / "export")
    clock = iter([0.0, 100.0, 101.0, 103.0, 104.0, 108.0])
    monkeypatch.setattr(samplers, "now", lambda: next(clock))
    images = {"m0": torch.zeros(2, 3, 8, 8), "m1": torch.zeros(2, 1, 8, 8), "unknown": torch.zeros(2, 5)}
    timed.refine(images, seeds=[0, 1])
    assert timed.images_per_second == 4 / 100
    for _ in range(2):
        timed.refine(images, seeds=[0, 1])
    assert timed.images_per_second == 8 / 6


def test_titles_say_what_differs():
    assert sampler_titles([SamplerConfig(num_steps=1)]) == ["dpm_solver, 1 step"]
    several = [
        SamplerConfig(num_steps=5, guidance=1.5),
        SamplerConfig(name="ddim", num_steps=5),
        SamplerConfig(num_steps=10),
    ]
    assert sampler_titles(several) == [
        "dpm_solver, 5 steps, guidance 1.5",
        "ddim, 5 steps, guidance 1",
        "dpm_solver, 10 steps, guidance 1",
    ]
