"""Training in the way of the released code, with the same objective, as the reference of benchmarks.

One decoder call per pair of source and target, upsampling before and pooling after convolutions, the default
memory layout, fp32, and torch's default Adam.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn

from cmvae.config import ObjectiveConfig, OptimizerConfig
from cmvae.models.cmvae import CMVAE
from cmvae.models.networks.encoder import TwoTrunkEncoder
from cmvae.models.networks.image import (
    ImageDecoder,
    ImageEncoder,
    PooledResidualBlock,
    ResidualBlock,
    UpsampledResidualBlock,
)
from cmvae.training.cmvae_task import CMVAETask, LatentNoise


class PlainImageDecoder(nn.Module):
    """An `ImageDecoder` that upsamples before its convolutions.

    Args:
        decoder: decoder whose weights are copied.
    """

    def __init__(self, decoder: ImageDecoder) -> None:
        super().__init__()
        decoder = copy.deepcopy(decoder)
        self.height, self.width_px, self.stem = decoder.height, decoder.width_px, decoder.stem
        self.layers = plain_layers(decoder.layers)

    def forward(self, latents: Tensor) -> Tensor:
        """See `ImageDecoder.forward`."""
        maps = rearrange(self.stem(latents), "b (h w c) -> b c h w", h=self.height, w=self.width_px)
        return self.layers(maps.contiguous())


class _PlainUpsampledBlock(ResidualBlock):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.upsample(x))


class _PlainPooledBlock(ResidualBlock):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        self.pool = nn.AvgPool2d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(super().forward(x))


_PLAIN = {UpsampledResidualBlock: _PlainUpsampledBlock, PooledResidualBlock: _PlainPooledBlock}


def plain_layers(layers: nn.Sequential) -> nn.Sequential:
    """The same layers and weights, but blocks upsample before their convolutions and pool after them."""
    return nn.Sequential(*(_plain_block(layer) if type(layer) in _PLAIN else layer for layer in layers))


def _plain_block(block: nn.Module) -> ResidualBlock:
    first, second = (cast(nn.Conv2d, cast(nn.Sequential, block.branch)[place]) for place in (1, 3))
    plain = _PLAIN[type(block)](first.in_channels, second.out_channels)
    plain.load_state_dict(block.state_dict())
    return plain


class ReferenceTask(CMVAETask):
    """A `CMVAETask` that decodes pair by pair.

    Args:
        model: model whose weights are copied.
        objective: the objective; all cross sources are decoded.
    """

    def __init__(self, model: CMVAE, objective: ObjectiveConfig) -> None:
        plain = CMVAE(model.config, model.modalities)
        plain.load_state_dict(model.state_dict())
        for name, decoder in plain.decoders.items():
            if isinstance(decoder, ImageDecoder):
                plain.decoders[name] = PlainImageDecoder(decoder)
        for encoder in plain.encoders.values():
            if isinstance(encoder, ImageEncoder):
                for trunk in (encoder.shared_trunk, encoder.private_trunk):
                    trunk.layers = plain_layers(cast(nn.Sequential, trunk.layers))
                # Keeps the default memory layout, which the convolutions pass on.
                encoder.prepare = MethodType(TwoTrunkEncoder.prepare, encoder)  # type: ignore[method-assign]
        super().__init__(plain, objective.model_copy(update={"cross_sources": "all"}))

    def _log_likelihood(
        self, target: int, x: Tensor, shared: Tensor, private: Tensor, noise: LatentNoise
    ) -> Tensor:
        name = self.model.modality_names[target]
        auxiliary = self.model.auxiliary_prior(name) if len(private) > 1 else None
        decoded = []
        for source in range(len(private)):
            latents = private[source]
            if source != target and auxiliary is not None:
                latents = auxiliary.sample(noise.private[target, source])
            decoded.append(self._decode(name, x, shared[source], latents))
        return torch.stack(decoded)


def build_reference_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Adam:
    """Torch's default Adam, which is not fused."""
    return torch.optim.Adam(
        module.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        amsgrad=config.amsgrad,
        weight_decay=config.weight_decay,
    )
