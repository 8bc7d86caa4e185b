"""The two location-scale families of CMVAE: fp32 log-densities and reparametrised samples.

Noise is an argument, never drawn inside, so that a density or a sample is a pure function of its inputs.
The parametrisation of the scales is that of the released CMVAE: raw 0 is neutral, and a tiny constant bounds
every scale from below.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self

from cmvae.utils.seeds import Generators, draw_normal, draw_uniform

# Bounds every scale from below, so that a collapsing posterior cannot give an infinite density.
SCALE_FLOOR = 1e-6


@dataclass(frozen=True)
class LocationScale(ABC):
    """Independent dimensions, value = loc + scale · noise; both broadcast to the shape of the value."""

    loc: Tensor
    scale: Tensor

    @staticmethod
    @abstractmethod
    def scale_from_raw(raw: Tensor) -> Tensor:
        """Positive scales of unconstrained parameters (..., D)."""

    @staticmethod
    @abstractmethod
    def draw_noise(shape: Sequence[int], device: torch.device, generators: Generators = None) -> Tensor:
        """Standard noise of the family, fp32; arguments as for `cmvae.utils.seeds.draw_normal`."""

    @abstractmethod
    def log_prob(self, value: Tensor, event_dims: int = 1) -> Tensor:
        """Log-density in nats, summed over the last `event_dims` axes."""

    @staticmethod
    @abstractmethod
    def variance_of(scale: Tensor) -> Tensor:
        """The variance that belongs to a scale, any shape."""

    @staticmethod
    @abstractmethod
    def scale_of(variance: Tensor) -> Tensor:
        """The inverse of `variance_of`."""

    @property
    def variance(self) -> Tensor:
        """Of every dimension, the shape of `scale`."""
        return self.variance_of(self.scale)

    def sample(self, noise: Tensor) -> Tensor:
        """The reparametrised sample that belongs to `noise`."""
        return self.loc + self.scale * noise

    def detach(self) -> Self:
        """The same distribution, its parameters cut from the graph."""
        return type(self)(self.loc.detach(), self.scale.detach())


class Normal(LocationScale):
    """Normal distribution; the scale is the standard deviation."""

    @staticmethod
    def scale_from_raw(raw: Tensor) -> Tensor:
        """Softplus."""
        return F.softplus(raw) + SCALE_FLOOR

    @staticmethod
    def variance_of(scale: Tensor) -> Tensor:
        """As `LocationScale.variance_of`."""
        return scale.square()

    @staticmethod
    def scale_of(variance: Tensor) -> Tensor:
        """As `LocationScale.scale_of`."""
        return variance.sqrt()

    @staticmethod
    def draw_noise(shape: Sequence[int], device: torch.device, generators: Generators = None) -> Tensor:
        """Standard normal noise, fp32."""
        return draw_normal(shape, device, generators)

    def log_prob(self, value: Tensor, event_dims: int = 1) -> Tensor:
        """Log-density in nats, summed over the last `event_dims` axes."""
        standardised = (value - self.loc) / self.scale
        density = -0.5 * standardised.square() - self.scale.log() - 0.5 * math.log(2 * math.pi)
        return sum_event_axes(density, event_dims)


class Laplace(LocationScale):
    """Laplace distribution; the scale is b, the mean absolute deviation."""

    @staticmethod
    def scale_from_raw(raw: Tensor) -> Tensor:
        """Softmax over the last axis times its length, so that the scales average 1."""
        return raw.softmax(-1) * raw.shape[-1] + SCALE_FLOOR

    @staticmethod
    def variance_of(scale: Tensor) -> Tensor:
        """As `LocationScale.variance_of`."""
        return 2 * scale.square()

    @staticmethod
    def scale_of(variance: Tensor) -> Tensor:
        """As `LocationScale.scale_of`."""
        return (variance / 2).sqrt()

    @staticmethod
    def draw_noise(shape: Sequence[int], device: torch.device, generators: Generators = None) -> Tensor:
        """Standard Laplace noise, fp32, by the inverse distribution function."""
        centred = draw_uniform(shape, device, generators) - 0.5
        # A uniform number may be exactly 0, whose image would be −infinity.
        centred = centred.clamp(min=torch.finfo(centred.dtype).eps / 2 - 0.5)
        return -centred.sign() * torch.log1p(-2 * centred.abs())

    def log_prob(self, value: Tensor, event_dims: int = 1) -> Tensor:
        """Log-density in nats, summed over the last `event_dims` axes."""
        density = -(value - self.loc).abs() / self.scale - (2 * self.scale).log()
        return sum_event_axes(density, event_dims)


def sum_event_axes(density: Tensor, event_dims: int) -> Tensor:
    """The sum over the last `event_dims` axes, which may be none."""
    return density.flatten(-event_dims).sum(-1) if event_dims else density


FAMILIES: dict[str, type[LocationScale]] = {"normal": Normal, "laplace": Laplace}
