"""Location-scale families of CMVAE: fp32 log-densities and reparametrised samples.

Noise is an argument, so densities and samples are pure functions of their inputs. Scales are parametrised as
in the released CMVAE: the raw value 0 is neutral, and a small constant is added to every scale.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import Self, override

from cmvae.utils.seeds import Generators, draw_normal, draw_uniform

SCALE_FLOOR = 1e-6
"""Lower bound that is added to every scale, so that a collapsing posterior has no infinite density."""


@dataclass(frozen=True)
class LocationScale(ABC):
    """Distribution of independent dimensions, value = loc + scale · noise.

    `loc` and `scale` broadcast to the shape of the value.
    """

    loc: Tensor
    scale: Tensor
    variance_factor: ClassVar[float]
    """Variance of the distribution whose scale is 1."""

    @staticmethod
    @abstractmethod
    def scale_from_raw(raw: Tensor) -> Tensor:
        """Convert unconstrained parameters (..., D) to positive scales (..., D)."""

    @staticmethod
    @abstractmethod
    def draw_noise(shape: Sequence[int], device: torch.device, generators: Generators = None) -> Tensor:
        """Draw standard noise of the family, fp32. Arguments as in `cmvae.utils.seeds.draw_normal`."""

    @abstractmethod
    def log_prob(self, value: Tensor, event_dims: int = 1) -> Tensor:
        """Log-density in nats, summed over the last `event_dims` axes."""

    @classmethod
    def variance_of(cls, scale: Tensor) -> Tensor:
        """Convert scales to variances, any shape."""
        return cls.variance_factor * scale.square()

    @classmethod
    def scale_of(cls, variance: Tensor) -> Tensor:
        """Convert variances to scales, any shape."""
        return (variance / cls.variance_factor).sqrt()

    @property
    def variance(self) -> Tensor:
        """Variance of every dimension, with the shape of `scale`."""
        return self.variance_of(self.scale)

    def sample(self, noise: Tensor) -> Tensor:
        """Transform standard noise into a reparametrised sample."""
        return self.loc + self.scale * noise

    def detach(self) -> Self:
        """Same distribution, with parameters detached from the graph."""
        return type(self)(self.loc.detach(), self.scale.detach())


class Normal(LocationScale):
    """Normal distribution. The scale is the standard deviation, the softplus of the raw value."""

    variance_factor = 1

    @staticmethod
    @override
    def scale_from_raw(raw: Tensor) -> Tensor:
        return F.softplus(raw) + SCALE_FLOOR

    @staticmethod
    @override
    def draw_noise(shape: Sequence[int], device: torch.device, generators: Generators = None) -> Tensor:
        return draw_normal(shape, device, generators)

    @override
    def log_prob(self, value: Tensor, event_dims: int = 1) -> Tensor:
        standardised = (value - self.loc) / self.scale
        density = -0.5 * standardised.square() - self.scale.log() - 0.5 * math.log(2 * math.pi)
        return sum_event_axes(density, event_dims)


class Laplace(LocationScale):
    """Laplace distribution. The scale is b, the mean absolute deviation."""

    variance_factor = 2

    @staticmethod
    @override
    def scale_from_raw(raw: Tensor) -> Tensor:
        """Softmax over the last axis times its length, so that the mean of the scales is 1."""
        return raw.softmax(-1) * raw.shape[-1] + SCALE_FLOOR

    @staticmethod
    @override
    def draw_noise(shape: Sequence[int], device: torch.device, generators: Generators = None) -> Tensor:
        # By the inverse of the distribution function, which is −infinity at 0, a possible uniform number.
        centred = draw_uniform(shape, device, generators) - 0.5
        centred = centred.clamp(min=torch.finfo(centred.dtype).eps / 2 - 0.5)
        return -centred.sign() * torch.log1p(-2 * centred.abs())

    @override
    def log_prob(self, value: Tensor, event_dims: int = 1) -> Tensor:
        density = -(value - self.loc).abs() / self.scale - (2 * self.scale).log()
        return sum_event_axes(density, event_dims)


def sum_event_axes(density: Tensor, event_dims: int) -> Tensor:
    """Sum over the last `event_dims` axes; 0 sums over none."""
    return density.flatten(-event_dims).sum(-1) if event_dims else density


FAMILIES: dict[str, type[LocationScale]] = {"normal": Normal, "laplace": Laplace}
