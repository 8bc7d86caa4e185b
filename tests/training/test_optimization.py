"""The learning rate against hand computations."""

import itertools

import pytest
import torch
from accelerate import Accelerator

from cmvae.config import OptimizerConfig
from cmvae.training.optimization import (
    build_optimizer,
    learning_rate,
    reinitialize_parameters,
    set_learning_rate,
)


def test_constant_rate_after_a_linear_warm_up():
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(step, 10, config) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_cosine_falls_to_zero_at_the_end():
    config = OptimizerConfig(learning_rate=2.0, schedule="cosine", warmup_steps=2)
    rates = [learning_rate(step, 12, config) for step in range(13)]
    assert rates[1] == rates[2] == 2.0
    assert rates[7] == pytest.approx(1.0)
    assert rates[12] == pytest.approx(0.0)
    assert all(earlier > later for earlier, later in itertools.pairwise(rates[2:]))


def test_what_starts_anew_has_no_past_and_the_rest_keeps_its_own():
    module = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(module, OptimizerConfig())
    for _ in range(3):
        module(torch.ones(1, 3)).square().sum().backward()
        optimizer.step()
    kept = {key: value.clone() for key, value in optimizer.state[module.bias].items()}
    bias = module.bias.detach().clone()
    reinitialize_parameters(Accelerator(cpu=True), optimizer, {module.weight: torch.full((2, 3), 7.0)})
    assert (module.weight == 7).all()
    past = optimizer.state[module.weight]
    assert all((past[key] == 0).all() for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))
    assert past["step"] == 3
    assert torch.equal(module.bias, bias)
    assert all(torch.equal(value, kept[key]) for key, value in optimizer.state[module.bias].items())


def test_adam_takes_the_settings_and_frozen_parameters_stay_out():
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    config = OptimizerConfig(learning_rate=0.1, betas=(0.5, 0.6), amsgrad=False, weight_decay=0.3)
    optimizer = build_optimizer(module, config)
    group = optimizer.param_groups[0]
    assert group["params"] == [module.weight]
    assert (group["betas"], group["amsgrad"], group["weight_decay"]) == ((0.5, 0.6), False, 0.3)
    set_learning_rate(optimizer, 0.05)
    assert group["lr"] == 0.05
