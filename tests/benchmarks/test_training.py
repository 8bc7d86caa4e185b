"""Jobs of training: what they count, and that they train."""

import json

import pytest
import training
from commands import ROOT
from training import ceiling_job, update_job

from cmvae.utils.errors import UserError

SMALL = [
    "train.batch_size=4",
    "train.mixed_precision=fp32",
    "optimizer.max_grad_norm=10",
    *(f"model.modalities.m{m}.network=resnet" for m in range(3)),
]


def test_the_ceiling_counts_the_operations_of_its_convolutions(monkeypatch):
    for name, value in (("SHAPES", ((8, 6),)), ("BATCH", 2), ("SECONDS", 0)):
        monkeypatch.setattr(training, f"CEILING_{name}", value)
    job = ceiling_job("fp32")
    # Forward, and for the gradients of images and of weights as much each; a multiplication and an addition.
    assert job.facts["flops"] == 3 * 2 * (2 * 6 * 6) * (8 * 8 * 9)
    assert job.num_items == 2
    assert job.facts["precision"] == "fp32"


def test_the_ceiling_is_of_the_fastest_shape_and_long_enough_to_be_timed(monkeypatch):
    taken = {}

    def measure(job):
        # A thousandth of a second a convolution; the second shape takes half of that.
        times = job.num_items / training.CEILING_BATCH
        taken[job.facts["side"]] = times * (0.5e-3 if job.facts["side"] == 3 else 1e-3)
        return {"seconds": taken[job.facts["side"]]}

    monkeypatch.setattr(training, "CEILING_SHAPES", ((4, 6), (8, 3)))
    monkeypatch.setattr(training, "CEILING_SECONDS", 0.01)
    monkeypatch.setattr(training.Job, "measure", measure)
    job = ceiling_job("bf16")
    assert (job.facts["channels"], job.facts["side"]) == (8, 3)
    assert min(taken.values()) >= 0.01


def test_an_update_is_of_the_config_with_what_was_changed():
    config = str(ROOT / "configs/digits.yaml")
    job = update_job(config, SMALL, image_size=8, updates=2)
    assert (job.num_items, job.facts["batch_size"], job.facts["precision"]) == (8, 4, "fp32")
    assert job.measure().keys() == {"seconds"}
    fewer = update_job(config, [*SMALL, "objective.cross_sources=1"], image_size=8)
    more = update_job(config, SMALL, image_size=8, synthetic=4)
    flops = {name: it.afterwards()["flops"] for name, it in {"all": job, "one": fewer, "four": more}.items()}
    assert flops["one"] < flops["all"] / 2 < flops["four"]
    assert more.facts["parameters"] > job.facts["parameters"]
    reference = update_job(config, SMALL, image_size=8, reference=True)
    # The upsampled convolutions have 4/9 of the operations.
    assert reference.afterwards()["flops"] > flops["all"] / 2


def test_reading_shards_is_part_of_an_update_when_it_is_asked_for(digits_shards):
    overrides = [*SMALL, f"data.shards={digits_shards}"]
    job = update_job(str(ROOT / "configs/digits.yaml"), overrides, read=True)
    assert 0 < job.measure()["data_wait_share"] < 1


def test_a_trace_is_written(tmp_path):
    path = tmp_path / "trace.json"
    job = update_job(str(ROOT / "configs/digits.yaml"), SMALL, image_size=8, profile=str(path))
    assert not path.exists(), "it would count as memory and warm-up of what is timed"
    job.afterwards()
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert any("conv" in event.get("name", "") for event in events)


def test_what_cannot_be_made_up_is_refused():
    with pytest.raises(UserError, match="caption: not an image modality"):
        update_job(str(ROOT / "configs/cubicc.yaml"))
    with pytest.raises(UserError, match="trains a refiner"):
        update_job(str(ROOT / "configs/digits_refiner.yaml"))
