"""CMVAE: multimodal generative clustering.

`MultimodalClusterer` clusters data in memory in the way of scikit-learn.
`from cmvae import CMVAE; model = CMVAE.from_pretrained("runs/NAME/export")`, then `model.encode`,
`model.decode`, `model.assign` and `model.generate`. `DCMVAE.from_pretrained` adds the refiner:
`model.refine(model.cmvae.generate(16))`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cmvae.estimator import MultimodalClusterer as MultimodalClusterer
    from cmvae.models.cmvae import CMVAE as CMVAE
    from cmvae.models.dcmvae import DCMVAE as DCMVAE

__all__ = ["CMVAE", "DCMVAE", "MultimodalClusterer"]


_MODULES = {
    "CMVAE": "cmvae.models.cmvae",
    "DCMVAE": "cmvae.models.dcmvae",
    "MultimodalClusterer": "cmvae.estimator",
}


def __getattr__(name: str) -> Any:
    # The models import torch, which takes seconds; the checks of configs and shards must not wait for it.
    if name not in _MODULES:
        raise AttributeError(f"module 'cmvae' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
