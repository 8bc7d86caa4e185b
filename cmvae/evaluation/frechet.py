"""Fréchet distance between sets of images, as Gaussians in the features of some network.

In the features of Inception-v3 it is the FID of Heusel et al., 2017; in any other it is not called so.
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

# torchmetrics imports torchvision, which must be mended first.
import cmvae.utils.torchvision_shim  # noqa: F401 isort:skip
from torchmetrics.image.fid import FrechetInceptionDistance  # isort:skip

_LOGGER = logging.getLogger(__name__)

INCEPTION_FEATURES = 2048
# Fewer samples than this many times the features, and the estimate of a covariance is a rough one.
_GOOD_RATIO = 10


class FrechetDistance:
    """Squared 2-Wasserstein distance to a fixed set of real features, both as Gaussians; float64.

    Args:
        real: (N, F), more samples than features.
    """

    def __init__(self, real: FloatArray) -> None:
        # Every rank holds all samples already, so there is nothing to synchronise.
        self._metric = FrechetInceptionDistance(
            _AlreadyFeatures(real.shape[1]), reset_real_features=False, sync_on_compute=False
        )
        self._metric.update(_double(real), real=True)

    def to(self, generated: FloatArray) -> float:
        """The distance to generated features (N', F), more samples than features."""
        self._metric.update(_double(generated), real=False)
        distance = float(self._metric.compute())
        self._metric.reset()
        return distance


def refusal(num_samples: int, num_features: int) -> str | None:
    """Why so few samples say nothing about a Gaussian of so many features; None where they do."""
    if num_samples > num_features:
        return None
    return (
        f"{num_samples:,} samples cannot give the covariance of {num_features:,} features: it takes more "
        "samples than features, and ten times as many to be good"
    )


def warn_if_few(name: str, num_samples: int, num_features: int) -> None:
    """Log a warning where samples are enough to compute a distance, but not to trust its absolute value."""
    if num_samples < _GOOD_RATIO * num_features:
        _LOGGER.warning(
            "%s: %s samples for %s features, below ten times as many, so the distance comes out too large; "
            "compare it only with those of equally many samples",
            name,
            f"{num_samples:,}",
            f"{num_features:,}",
        )


def load_inception(weights: Path | None, device: torch.device) -> nn.Module:
    """Inception-v3 of the FID, from `to_bytes` images to features (B, 2048).

    Args:
        weights: torch-fidelity's file; None lets torch-fidelity fetch it into torch's cache.
        device: where to.

    Raises:
        UserError: torch-fidelity is not installed, or the weights are missing, damaged or out of reach.
    """
    if importlib.util.find_spec("torch_fidelity") is None:
        raise UserError("torch-fidelity is not installed, which has Inception-v3: pip install torch-fidelity")
    if weights is not None:
        _check_weights(weights)
    path = None if weights is None else str(weights)
    try:
        metric = FrechetInceptionDistance(INCEPTION_FEATURES, feature_extractor_weights_path=path)
    except (OSError, RuntimeError, TypeError) as error:  # no network, or weights of another network
        raise UserError(
            f"the weights of Inception-v3 cannot be had from {path or 'the network'}: "
            f"{str(error).splitlines()[0]}. Put "
            "torch-fidelity's weights-inception-2015-12-05-6726825d.pth somewhere and set "
            "evaluation.inception_weights to its path"
        ) from error
    return metric.inception.to(device)


def to_bytes(images: Tensor) -> Tensor:
    """Images (B, 1 or 3, H, W) in [0, 1] as Inception takes them: (B, 3, H, W) uint8."""
    return images.clamp(0, 1).mul(255).round().to(torch.uint8).expand(-1, 3, -1, -1)


class _AlreadyFeatures(nn.Module):
    """In place of torchmetrics' network: its metric is then given features instead of images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def _double(features: FloatArray) -> Tensor:
    return torch.from_numpy(np.asarray(features, dtype=np.float64))


def _check_weights(path: Path) -> None:
    """Let a file through to torch-fidelity, which would run any pickle, only if it holds tensors alone."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise UserError(
            f"{path}: is no readable file of weights ({type(error).__name__}). Set "
            "evaluation.inception_weights to torch-fidelity's weights-inception-2015-12-05-6726825d.pth, or "
            "to null"
        ) from error
