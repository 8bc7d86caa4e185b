"""Refiner of D-CMVAE: a diffusion model of images, conditioned on their blurred reconstructions by a CMVAE.

Source: Palumbo et al. (ICLR 2024), figure 1(c), implemented as formulation 1 of DiffuseVAE (Pandey et al.,
TMLR 2022): the input of a U-Net is the noisy image and one reconstruction, concatenated along channels. One
reconstruction is enough, because a cross-modal or unconditional generation provides no more. With
`conditioning.source: latent` the condition is (z, w) without a reconstruction, as in TreeDiffusion, which
reports a lower FID with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import cmvae.utils.torchvision_shim  # noqa: F401 isort:skip
import torch
from diffusers import UNet2DModel
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from typing_extensions import Self

from cmvae.config import RefinerConfig, SamplerConfig, UNetConfig
from cmvae.modalities import AnyModality, Modality, ModalityName
from cmvae.models.diffusion import Diffusion
from cmvae.models.export import load_weights, read_export_config, save_export
from cmvae.models.module_dict import ModuleDict
from cmvae.utils.errors import UserError
from cmvae.utils.seeds import derive_seed

# Dimensions of the time embedding in the U-Net of diffusers, per channel of its first level.
_EMBEDDING_FACTOR = 4
_SHARED = "shared"


class RefinerExportConfig(BaseModel):
    """`config.yaml` of a refiner's export: everything needed to build it, and the hash of its CMVAE."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    refiner: RefinerConfig
    modalities: dict[ModalityName, AnyModality]
    shared_dim: int = Field(ge=1)
    private_dim: int = Field(ge=1)
    cmvae_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Denoiser(nn.Module):
    """U-Net for images of one shape, conditioned on the modality and on a reconstruction, latents or both.

    Args:
        config: settings of the refiner.
        modality: a modality with the shape of the images.
        num_modalities: number of modalities that share the U-Net.
        latent_dim: D, dimensions of the latents that are a condition; 0 if none are.

    Raises:
        UserError: the U-Net does not fit the shape of the images.
    """

    def __init__(
        self, config: RefinerConfig, modality: Modality, num_modalities: int, latent_dim: int
    ) -> None:
        super().__init__()
        channels, *size = modality.shape
        self.sees_reconstruction = config.conditioning.source != "latent"
        in_channels = 2 * channels if self.sees_reconstruction else channels
        self.unet = _build_unet(config.network, in_channels, channels, size)
        embedding_dim = _EMBEDDING_FACTOR * config.network.channels
        self.modality = nn.Embedding(num_modalities, embedding_dim)
        self.latent = nn.Linear(latent_dim, embedding_dim) if latent_dim else None

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        reconstruction: Tensor | None,
        modality: Tensor,
        latent: Tensor | None,
        present: Tensor,
    ) -> Tensor:
        """Predict noise, velocity or image, see `cmvae.models.diffusion.Diffusion.target`.

        Args:
            noisy: x_t, (B, C, H, W).
            timesteps: t, (B,) int64.
            reconstruction: (B, C, H, W) in [−1, 1]; not used if only latents are a condition.
            modality: index of the modality, (B,) int64.
            latent: z or (z, w), (B, D); not used unless latents are a condition.
            present: (B,) bool, False where the condition is dropped, that is, replaced by zeros.

        Returns:
            (B, C, H, W)
        """
        embedding = self.modality(modality)
        if self.latent is not None:
            embedding = embedding + self.latent(latent) * present[:, None]
        inputs = noisy
        if self.sees_reconstruction and reconstruction is not None:
            inputs = torch.cat([noisy, reconstruction * present[:, None, None, None]], dim=1)
        # Images are channels-last, with which this network takes twice as long on a CPU.
        inputs = inputs.contiguous()
        return self.unet(inputs, timesteps, class_labels=embedding).sample


class Refiner(nn.Module):
    """Diffusion models of all image modalities.

    Args:
        config: settings of networks, diffusion, conditions and sampler.
        modalities: modalities that are refined, by name.
        shared_dim: D_z of the CMVAE.
        private_dim: D_w of the CMVAE.
        cmvae_sha256: hash of the weights of the CMVAE whose reconstructions are refined.
        autocast_dtype: precision of the networks; None is fp32. The diffusion is always fp32.

    Raises:
        UserError: modalities of different shapes are to share a U-Net, or a U-Net does not fit its images.
    """

    def __init__(
        self,
        config: RefinerConfig,
        modalities: Mapping[str, Modality],
        shared_dim: int,
        private_dim: int,
        cmvae_sha256: str,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.modalities = dict(modalities)
        self.shared_dim, self.private_dim = shared_dim, private_dim
        self.cmvae_sha256 = cmvae_sha256
        self.autocast_dtype = autocast_dtype
        self.diffusion = Diffusion(config.diffusion)
        # Modalities by the name of their network.
        self.groups = (
            {_SHARED: tuple(modalities)} if config.sharing == "shared" else {n: (n,) for n in modalities}
        )
        _check_shapes(self.groups, self.modalities)
        latent_dim = shared_dim if config.conditioning.latent else 0
        if self.reads_private:
            latent_dim = shared_dim + private_dim
        self.denoisers = ModuleDict(
            {
                group: Denoiser(config, self.modalities[names[0]], len(names), latent_dim)
                for group, names in self.groups.items()
            }
        )

    @property
    def modality_names(self) -> tuple[str, ...]:
        """Names of the modalities that are refined."""
        return tuple(self.modalities)

    @property
    def reads_private(self) -> bool:
        """Whether w is a condition."""
        return self.config.conditioning.source == "latent"

    @property
    def reads_shared(self) -> bool:
        """Whether z is a condition."""
        return self.reads_private or self.config.conditioning.latent

    def latent_of(self, shared: Tensor, private: Tensor | None) -> Tensor:
        """The latents that are a condition: (B, D_z) or, with w, (B, D_z + D_w)."""
        return torch.cat([shared, private], dim=1) if self.reads_private and private is not None else shared

    def predict(
        self,
        group: str,
        noisy: Tensor,
        timesteps: Tensor,
        reconstruction: Tensor | None,
        modality: Tensor,
        latent: Tensor,
        present: Tensor,
    ) -> Tensor:
        """Predict with the network of a group, (B, C, H, W) fp32. Arguments as in `Denoiser.forward`."""
        with torch.autocast(noisy.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            output = self.denoisers[group](noisy, timesteps, reconstruction, modality, latent, present)
        return output.float()

    @torch.no_grad()
    def refine(
        self,
        images: Mapping[str, Tensor],
        shared: Tensor | None = None,
        private: Mapping[str, Tensor] | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Refine reconstructions or generations of a CMVAE.

        Args:
            images: decoded images (B, C, H, W) by modality. Modalities that this refiner was not trained on
                are returned unchanged.
            shared: z, (B, D_z), from which they were decoded; needed if z is a condition.
            private: w by modality, (B, D_w), from which they were decoded; needed if w is a condition.
            seeds: one seed per sample. A refined image depends only on its seed, its modality and its
                conditions, not on its batch. None draws the seeds from the default generator of torch.

        Returns:
            (B, C, H, W) in [0, 1] by modality.

        Raises:
            ValueError: z or w is missing, or there is not one seed per sample.
        """
        refined = dict(images)
        known = {name: x for name, x in images.items() if name in self.modalities}
        if not known:
            return refined
        batch_size = len(next(iter(known.values())))
        if self.reads_shared and shared is None:
            raise ValueError("this refiner is conditioned on z; pass `shared`")
        if self.reads_private and private is None:
            raise ValueError("this refiner is conditioned on w; pass `private`")
        if seeds is None:
            seeds = torch.randint(2**62, (batch_size,)).tolist()
        if len(seeds) != batch_size:
            raise ValueError(f"{len(seeds)} seeds for {batch_size} samples; pass one per sample")
        for group, members in self.groups.items():
            names = [name for name in members if name in known]
            if names:
                conditions = {name: to_signed(known[name]) for name in names}
                refined |= self._sample(group, conditions, shared, private or {}, seeds)
        return refined

    def _sample(
        self,
        group: str,
        conditions: Mapping[str, Tensor],
        shared: Tensor | None,
        private: Mapping[str, Tensor],
        seeds: Sequence[int],
    ) -> dict[str, Tensor]:
        """Refine the modalities of one group together, concatenated along the batch axis."""
        sampler, names = self.config.sampler, list(conditions)
        reconstruction = torch.cat(list(conditions.values()))
        if shared is None:
            shared = reconstruction.new_zeros(len(seeds), self.shared_dim)
        latent = torch.cat([self.latent_of(shared, private.get(name)) for name in names])
        index = torch.tensor([self.groups[group].index(name) for name in names], device=shared.device)
        modality = index.repeat_interleave(len(seeds))
        is_conditional = self.config.conditioning.source != "none"

        def predict(noisy: Tensor, timesteps: Tensor, with_condition: bool) -> Tensor:
            present = torch.full_like(timesteps, with_condition, dtype=torch.bool)
            return self.predict(group, noisy, timesteps, reconstruction, modality, latent, present)

        # Computed beforehand: reading the time steps from the device would synchronise at every step.
        first = sampler.guidance_from * self.diffusion.num_timesteps
        guided = (
            sampler.guidance != 1 and timestep >= first
            for timestep in self.diffusion.sampling_timesteps(sampler)
        )

        def predict_image(noisy: Tensor, timesteps: Tensor) -> Tensor:
            prediction = predict(noisy, timesteps, is_conditional)
            if next(guided):
                unconditional = predict(noisy, timesteps, False)
                prediction = unconditional + sampler.guidance * (prediction - unconditional)
            return self.diffusion.predicted_image(prediction, noisy, timesteps).clamp(-1, 1)

        generators = [
            torch.Generator().manual_seed(derive_seed(seed, name)) for name in names for seed in seeds
        ]
        samples = self.diffusion.sample(
            predict_image,
            reconstruction.shape,
            sampler,
            generators,
            device=reconstruction.device,
            start_from=reconstruction,
        )
        return dict(zip(names, ((samples.clamp(-1, 1) + 1) / 2).chunk(len(names)), strict=True))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an export, `model.safetensors` and `config.yaml`, atomically."""
        config = RefinerExportConfig(
            refiner=self.config,
            modalities=self.modalities,
            shared_dim=self.shared_dim,
            private_dim=self.private_dim,
            cmvae_sha256=self.cmvae_sha256,
        )
        save_export(Path(folder), config, self.state_dict())

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        autocast_dtype: torch.dtype | None = None,
        sampler: SamplerConfig | None = None,
    ) -> Self:
        """Load an export that `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: folder of the export.
            device: device of the refiner.
            autocast_dtype: precision of the networks; None is fp32.
            sampler: settings of the sampler; None is those of the export.

        Raises:
            UserError: the folder is not the export of a refiner or is damaged, or the weights are not finite
                or do not fit the config.
        """
        folder = Path(folder)
        export = read_export_config(folder, RefinerExportConfig)
        config = export.refiner if sampler is None else export.refiner.model_copy(update={"sampler": sampler})
        sizes = export.shared_dim, export.private_dim
        refiner = cls(config, export.modalities, *sizes, export.cmvae_sha256, autocast_dtype)
        load_weights(refiner, folder)
        return refiner.to(device).eval()


def to_signed(images: Tensor) -> Tensor:
    """Convert images from [0, 1] to [−1, 1], the range of the diffusion, and clip values outside."""
    return images.clamp(0, 1) * 2 - 1


def _build_unet(config: UNetConfig, in_channels: int, channels: int, size: Sequence[int]) -> nn.Module:
    """U-Net of diffusers from `in_channels` to `channels`."""
    levels = len(config.multipliers)
    halvings = levels - 1
    if any(side % 2**halvings for side in size):
        most = min((side & -side).bit_length() for side in size)
        raise UserError(
            f"refiner.network.multipliers: {levels} levels halve an image {halvings} times, but the sides of "
            f"{size[0]}×{size[1]} are not divisible by {2**halvings}. Set at most {most} multipliers"
        )
    heights = [size[0] // 2**level for level in range(levels)]
    unknown = set(config.attention_sizes) - set(heights)
    if unknown:
        raise UserError(
            f"refiner.network.attention_sizes: no level has height {sorted(unknown)[0]}. The heights are "
            f"{', '.join(map(str, heights))}"
        )
    attends = [height in config.attention_sizes for height in heights]
    widths = tuple(config.channels * multiplier for multiplier in config.multipliers)
    unet = UNet2DModel(
        sample_size=tuple(size),
        in_channels=in_channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=config.blocks,
        down_block_types=tuple("AttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
        up_block_types=tuple("AttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)),
        dropout=config.dropout,
        norm_num_groups=math.gcd(32, config.channels),
        # The embedding of `Denoiser` is added to that of the time step unchanged.
        class_embed_type="identity",
    )
    return cast(nn.Module, unet)


def _check_shapes(groups: Mapping[str, Sequence[str]], modalities: Mapping[str, Modality]) -> None:
    for names in groups.values():
        different = [name for name in names if modalities[name].shape != modalities[names[0]].shape]
        if different:
            raise UserError(
                f"refiner.sharing: a shared network needs images of one shape, but {names[0]} has shape "
                f"{modalities[names[0]].shape} and {different[0]} has {modalities[different[0]].shape}. Set "
                "refiner.sharing to per_modality"
            )
