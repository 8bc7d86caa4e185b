import re

import pytest
import torch
from torch import nn

from cmvae.modalities.base import NAME_PATTERN
from cmvae.models.module_dict import ModuleDict

ATTRIBUTES = [name for name in dir(nn.ModuleDict()) if re.fullmatch(NAME_PATTERN, name)]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_names_of_attributes_are_keys(name):
    modules = nn.Sequential(ModuleDict({name: nn.Linear(2, 1), "other": nn.Linear(1, 1)}))
    assert list(modules[0]) == [name, "other"]
    assert set(modules.state_dict()) == {
        f"0.{key}.{part}" for key in (name, "other") for part in ("weight", "bias")
    }
    modules[0][name](torch.ones(1, 2)).sum().backward()
    assert sum(parameter.grad is not None for parameter in modules.parameters()) == 2
    assert modules.double()[0][name].weight.dtype == torch.float64
