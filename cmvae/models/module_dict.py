"""Modules by names that a user chooses."""

from __future__ import annotations

from torch import nn
from typing_extensions import override


class ModuleDict(nn.ModuleDict):
    """A `torch.nn.ModuleDict` whose keys may be names of its own attributes, such as `type` and `values`."""

    @override
    def __setitem__(self, key: str, module: nn.Module) -> None:
        # PyTorch refuses these keys, so that modules can be read as attributes, which nobody does here.
        self._modules[key] = module
