"""A tiny untrained CMVAE and tiny untrained refiners, to test D-CMVAE."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmvae.config import ModalityConfig, ModelConfig, RefinerConfig
from cmvae.modalities import ImageModality, Modality
from cmvae.models.cmvae import CMVAE
from cmvae.models.refiner import Refiner

NAMES = ("a", "b", "c")
SHARED_DIM, PRIVATE_DIM = 4, 3
NETWORK = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "dropout": 0.0}


def image_modality(*shape: int) -> Modality:
    return ImageModality(shape=shape)


def make_cmvae(modalities: Mapping[str, Modality] | None = None, seed: int = 0) -> CMVAE:
    """An untrained CMVAE whose reconstructions still depend on the input."""
    modalities = modalities or dict.fromkeys(NAMES, image_modality(3, 8, 8))
    torch.manual_seed(seed)
    config = ModelConfig(
        shared_dim=SHARED_DIM,
        private_dim=PRIVATE_DIM,
        num_clusters=5,
        modalities={name: ModalityConfig(width=2) for name in modalities},
    )
    return CMVAE(config, modalities).eval()


def make_config(**sections: Any) -> RefinerConfig:
    """Tiny refiner settings with overrides per section, e.g. `make_config(diffusion={"prediction": "v"})`."""
    small: dict[str, Any] = {
        "network": NETWORK,
        "diffusion": {"num_timesteps": 20},
        "conditioning": {},
        "sampler": {"num_steps": 4},
    }
    for name, section in sections.items():
        small[name] = {**small[name], **section} if isinstance(section, dict) else section
    return RefinerConfig.model_validate(small)


def make_refiner(
    modalities: Mapping[str, Modality] | Sequence[str] = NAMES,
    cmvae_sha256: str = "0" * 64,
    seed: int = 0,
    autocast_dtype: torch.dtype | None = None,
    shared_dim: int = SHARED_DIM,
    private_dim: int = PRIVATE_DIM,
    **sections: Any,
) -> Refiner:
    """An untrained refiner with the settings of `make_config`; `modalities` given as names are 8×8 images."""
    if not isinstance(modalities, Mapping):
        modalities = dict.fromkeys(modalities, image_modality(3, 8, 8))
    torch.manual_seed(seed)
    return Refiner(
        make_config(**sections), modalities, shared_dim, private_dim, cmvae_sha256, autocast_dtype
    ).eval()


class Told(nn.Module):
    """Replaces a denoiser and predicts `think(reconstruction)` as the clean image."""

    def __init__(self, think: Any = lambda reconstruction: reconstruction) -> None:
        super().__init__()
        self.think = think

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        reconstruction: Tensor,
        modality: Tensor,
        latent: Tensor,
        present: Tensor,
    ) -> Tensor:
        return self.think(reconstruction)


def tell(refiner: Refiner, **arguments: Any) -> Refiner:
    """Replace all networks of a refiner that predicts images by `Told`."""
    assert refiner.config.diffusion.prediction == "sample"
    for group in refiner.denoisers:
        refiner.denoisers[group] = Told(**arguments)
    return refiner


def record_calls(refiner: Refiner) -> list[dict[str, Tensor]]:
    """Record all later calls of denoisers: arguments by name, and `output`."""
    calls: list[dict[str, Tensor]] = []
    names = ("noisy", "timesteps", "reconstruction", "modality", "latent", "present")

    def note(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        calls.append({**dict(zip(names, arguments, strict=True)), "output": output})

    for denoiser in refiner.denoisers.values():
        denoiser.register_forward_hook(note)
    return calls


def silence(refiner: Refiner) -> Refiner:
    """Make every network predict zeros."""
    for denoiser in refiner.denoisers.values():
        nn.init.zeros_(denoiser.unet.conv_out.weight)
        nn.init.zeros_(denoiser.unet.conv_out.bias)
    return refiner


def signal_power(num_timesteps: int) -> np.ndarray:
    """ᾱ of the linear schedule of DDPM, (T,), in double precision."""
    return np.cumprod(1 - np.linspace(1e-4, 0.02, num_timesteps))
