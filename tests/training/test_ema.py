"""The average of weights, against arithmetic in double precision."""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cmvae.training.optimization import EMA_NAME, WeightAverage
from cmvae.utils.errors import UserError


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    module.to(memory_format=torch.channels_last)
    module[2].bias.requires_grad_(False)
    return module


def move(module):
    """Weights as after an update of an optimizer."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize(
    ("decay", "decays"),
    [
        # (1 + n) / (10 + n) after n updates, until it is more than the decay.
        (0.35, [1 / 10, 2 / 11, 3 / 12, 4 / 13, 0.35, 0.35, 0.35]),
        (0.999, [1 / 10, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16]),
        (0.0, [0.0] * 7),
    ],
)
def test_the_average_is_that_of_a_hand_computation(module, decay, decays):
    average = WeightAverage(module, decay)
    expected = {name: tensor.double() for name, tensor in weights(module).items()}
    for num_updates, d in enumerate(decays):
        move(module)
        now = weights(module)
        average.update(num_updates)
        assert_equal(weights(module), now)
        for name, tensor in now.items():
            expected[name] = d * expected[name] + (1 - d) * tensor.double()
    fixed = "2.bias"
    with average.applied():
        applied = weights(module)
    for name, tensor in applied.items():
        if name != fixed:
            torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert torch.equal(applied[fixed], now[fixed]), "what is not trained is not averaged"


def test_the_weights_come_back_to_the_last_bit_also_after_an_error(module):
    average = WeightAverage(module, 0.5)
    move(module)
    average.update(0)
    before = weights(module)
    with average.applied():
        assert not torch.equal(module[0].weight, before["0.weight"])
    assert_equal(weights(module), before)
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert_equal(weights(module), before)
    # Being looked at does not change it.
    with average.applied():
        first = weights(module)
    with average.applied():
        assert_equal(weights(module), first)


def test_a_saved_average_goes_on_as_if_it_had_never_stopped(module, tmp_path):
    average = WeightAverage(module, 0.9)
    move(module)
    average.update(0)
    content = {name: tensor.contiguous() for name, tensor in average.state_dict().items()}
    save_file(content, tmp_path / EMA_NAME)
    resumed_module = copy.deepcopy(module)
    resumed = WeightAverage(resumed_module, 0.9)
    resumed.load(tmp_path)
    found = []
    for one, of in ((average, module), (resumed, resumed_module)):
        torch.manual_seed(3)
        move(of)
        one.update(1)
        with one.applied():
            found.append(weights(of))
    assert_equal(*found)


def test_a_checkpoint_without_an_average_is_named(module, tmp_path):
    with pytest.raises(UserError, match=rf"{EMA_NAME}: missing, so the average"):
        WeightAverage(module, 0.9).load(tmp_path)
