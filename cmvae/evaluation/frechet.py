"""Fréchet distance between sets of images, as Gaussians in the features of a network.

In the features of Inception-v3 it is the FID (Heusel et al., 2017).
"""

from __future__ import annotations

import importlib.util
import logging
import pickle
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cmvae.clustering import FloatArray
from cmvae.utils.errors import UserError

# Before torchmetrics, which imports torchvision.
import cmvae.utils.torchvision_shim  # noqa: F401 isort:skip
from torchmetrics.image.fid import FrechetInceptionDistance  # isort:skip

_LOGGER = logging.getLogger(__name__)

INCEPTION_FEATURES = 2048
# With fewer samples per feature, the estimate of a covariance is rough.
_GOOD_RATIO = 10


class FrechetDistance:
    """Squared 2-Wasserstein distance to a fixed set of real features, both as Gaussians, in float64.

    Args:
        real: (N, F), more samples than features.
    """

    def __init__(self, real: FloatArray) -> None:
        # Every rank already holds all samples.
        self._metric = FrechetInceptionDistance(
            _AlreadyFeatures(real.shape[1]), reset_real_features=False, sync_on_compute=False
        )
        self._metric.update(_double(real), real=True)

    def to(self, generated: FloatArray) -> float:
        """Distance to generated features (N', F), more samples than features."""
        self._metric.update(_double(generated), real=False)
        distance = float(self._metric.compute())
        self._metric.reset()
        return distance


def refusal(num_samples: int, num_features: int) -> str | None:
    """Why there are too few samples for a Gaussian of so many features; None if there are enough."""
    if num_samples > num_features:
        return None
    return (
        f"{num_samples:,} samples are too few for the covariance of {num_features:,} features, which takes "
        "more samples than features, and ten times as many for a good estimate"
    )


def warn_if_few(name: str, num_samples: int, num_features: int) -> None:
    """Log a warning if there are enough samples for a distance, but too few for a good estimate."""
    if num_samples < _GOOD_RATIO * num_features:
        _LOGGER.warning(
            "%s: %s samples for %s features, fewer than ten times as many, so the distance is overestimated; "
            "compare it only at equal numbers of samples",
            name,
            f"{num_samples:,}",
            f"{num_features:,}",
        )


def load_inception(weights: Path | None, device: torch.device) -> nn.Module:
    """Load Inception-v3 of the FID, which maps `to_bytes` images to features (B, 2048).

    Args:
        weights: torch-fidelity's file; None lets torch-fidelity download it into torch's cache.
        device: device of the network.

    Raises:
        UserError: torch-fidelity is not installed, or the weights are missing, damaged or not available.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UserError(
            "Inception-v3 requires torch-fidelity, which is not installed: pip install torch-fidelity"
        )
    if weights is not None:
        _check_weights(weights)
    path = None if weights is None else str(weights)
    try:
        metric = FrechetInceptionDistance(INCEPTION_FEATURES, feature_extractor_weights_path=path)
    except (OSError, RuntimeError, TypeError) as error:  # no network, or weights of another network
        raise UserError(
            f"the weights of Inception-v3 cannot be loaded from {path or 'the network'}: "
            f"{str(error).splitlines()[0]}. Download torch-fidelity's "
            "weights-inception-2015-12-05-6726825d.pth and set evaluation.inception_weights to its path"
        ) from error
    return metric.inception.to(device)


def to_bytes(images: Tensor) -> Tensor:
    """Convert images (B, 1 or 3, H, W) in [0, 1] to the input of Inception, (B, 3, H, W) uint8."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8).expand(-1, 3, -1, -1)


class _AlreadyFeatures(nn.Module):
    """Identity that replaces torchmetrics' network, so that the metric takes features instead of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _double(features: FloatArray) -> Tensor:
    return torch.from_numpy(np.asarray(features, dtype=np.float64))


def _check_weights(path: Path) -> None:
    """Raise unless a file holds tensors only: torch-fidelity would unpickle anything."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path}: is not a readable weights file ({type(error).__name__}). Set "
            "evaluation.inception_weights to torch-fidelity's weights-inception-2015-12-05-6726825d.pth, or "
            "to null"
        ) from error
