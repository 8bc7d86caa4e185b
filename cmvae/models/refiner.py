"""The refiner of D-CMVAE: a diffusion of sharp images given the CMVAE's blurred reconstructions of them.

Palumbo et al. (ICLR 2024), figure 1(c), read as DiffuseVAE's form 1 (Pandey et al., TMLR 2022): a U-Net sees
the noisy image and one reconstruction, concatenated on channels. It works from any single reconstruction,
because a cross-modal or unconditional generation has no more than one.
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
from cmvae.utils.errors import UserError
from cmvae.utils.seeds import derive_seed

# The time embedding of diffusers' U-Net has so many times the channels of its first level.
_EMBEDDING_FACTOR = 4
_SHARED = "shared"


class RefinerExportConfig(BaseModel):
    """`config.yaml` of a refiner's export: all that is needed to build it, and which CMVAE it belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    refiner: RefinerConfig
    modalities: dict[ModalityName, AnyModality]
    shared_dim: int = Field(ge=1)
    cmvae_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Denoiser(nn.Module):
    """One U-Net for images of one shape, told which modality it looks at and, if wanted, z.

    Args:
        config: the whole refiner's.
        modality: the images.
        num_modalities: how many modalities share it.
        shared_dim: dimensions of z.

    Raises:
        UserError: the U-Net does not fit the images.
    """

    def __init__(
        self, config: RefinerConfig, modality: Modality, num_modalities: int, shared_dim: int
    ) -> None:
        super().__init__()
        channels, *size = modality.shape
        self.unet = _build_unet(config.network, channels, size)
        embedding_dim = _EMBEDDING_FACTOR * config.network.channels
        self.modality = nn.Embedding(num_modalities, embedding_dim)
        self.latent = nn.Linear(shared_dim, embedding_dim) if config.conditioning.latent else None

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        reconstruction: Tensor,
        modality: Tensor,
        shared: Tensor | None,
        present: Tensor,
    ) -> Tensor:
        """What the diffusion asks for: noise, velocity or image, (B, C, H, W).

        Args:
            noisy: x_t, (B, C, H, W).
            timesteps: t, (B,) int64.
            reconstruction: (B, C, H, W) in [−1, 1].
            modality: (B,) int64, below the number of modalities.
            shared: z, (B, D_z), if it is a condition.
            present: (B,) bool, false where there is no condition: zeros then stand in for it.
        """
        embedding = self.modality(modality)
        if self.latent is not None:
            embedding = embedding + self.latent(shared) * present[:, None]
        inputs = torch.cat([noisy, reconstruction * present[:, None, None, None]], dim=1)
        # Images come channels-last, in which this network takes twice as long on a CPU.
        inputs = inputs.contiguous()
        return self.unet(inputs, timesteps, class_labels=embedding).sample


class Refiner(nn.Module):
    """Denoisers of all image modalities and the diffusion that they belong to.

    Args:
        config: networks, diffusion and conditions.
        modalities: each modality that is refined, by name.
        shared_dim: dimensions of the CMVAE's z.
        cmvae_sha256: hash of the weights of the CMVAE whose reconstructions are refined.
        autocast_dtype: precision of the networks; None is fp32. The diffusion is fp32 in any case.

    Raises:
        UserError: modalities of different shapes cannot share a U-Net, or one does not fit its images.
    """

    def __init__(
        self,
        config: RefinerConfig,
        modalities: Mapping[str, Modality],
        shared_dim: int,
        cmvae_sha256: str,
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.modalities = dict(modalities)
        self.shared_dim = shared_dim
        self.cmvae_sha256 = cmvae_sha256
        self.autocast_dtype = autocast_dtype
        self.diffusion = Diffusion(config.diffusion)
        self.groups = (
            {_SHARED: tuple(modalities)} if config.sharing == "shared" else {n: (n,) for n in modalities}
        )
        _check_shapes(self.groups, self.modalities)
        self.denoisers = nn.ModuleDict(
            {
                group: Denoiser(config, self.modalities[names[0]], len(names), shared_dim)
                for group, names in self.groups.items()
            }
        )

    @property
    def modality_names(self) -> tuple[str, ...]:
        """The modalities that are refined."""
        return tuple(self.modalities)

    def predict(
        self,
        group: str,
        noisy: Tensor,
        timesteps: Tensor,
        reconstruction: Tensor,
        modality: Tensor,
        shared: Tensor,
        present: Tensor,
    ) -> Tensor:
        """What the network of a group says of a batch, (B, C, H, W) fp32; arguments as `Denoiser.forward`."""
        with torch.autocast(noisy.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            output = self.denoisers[group](noisy, timesteps, reconstruction, modality, shared, present)
        return output.float()

    @torch.no_grad()
    def refine(
        self,
        images: Mapping[str, Tensor],
        shared: Tensor | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Sharp images from a CMVAE's reconstructions or generations.

        Args:
            images: by modality (B, C, H, W), what the CMVAE decoded; modalities that this refiner does not
                know come back as they are.
            shared: z, (B, D_z), that they were decoded from; only with `conditioning.latent`.
            seeds: B numbers, one a sample: a picture is a function of its seed, its modality and what it is
                refined from, whatever the batch. None draws them from torch's default stream.

        Returns:
            By modality (B, C, H, W) in [0, 1].

        Raises:
            ValueError: z is missing, or the numbers of images and seeds differ.
        """
        refined = dict(images)
        known = {name: x for name, x in images.items() if name in self.modalities}
        if not known:
            return refined
        batch_size = len(next(iter(known.values())))
        if self.config.conditioning.latent and shared is None:
            raise ValueError("this refiner is conditioned on z as well: give `shared`")
        if seeds is None:
            seeds = torch.randint(2**62, (batch_size,)).tolist()
        if len(seeds) != batch_size:
            raise ValueError(f"{len(seeds)} seeds for {batch_size} samples")
        for group, members in self.groups.items():
            names = [name for name in members if name in known]
            if names:
                conditions = {name: to_signed(known[name]) for name in names}
                refined |= self._sample(group, conditions, shared, seeds)
        return refined

    def _sample(
        self,
        group: str,
        conditions: Mapping[str, Tensor],
        shared: Tensor | None,
        seeds: Sequence[int],
    ) -> dict[str, Tensor]:
        """Images of one group in one run of the sampler, its modalities side by side in the batch."""
        sampler, names = self.config.sampler, list(conditions)
        reconstruction = torch.cat(list(conditions.values()))
        if shared is None:
            shared = reconstruction.new_zeros(len(seeds), self.shared_dim)
        shared = shared.repeat(len(names), 1)
        place = torch.tensor([self.groups[group].index(name) for name in names], device=shared.device)
        modality = place.repeat_interleave(len(seeds))
        conditional = self.config.conditioning.source != "none"

        def predict(noisy: Tensor, timesteps: Tensor, present: bool) -> Tensor:
            there = torch.full_like(timesteps, present, dtype=torch.bool)
            return self.predict(group, noisy, timesteps, reconstruction, modality, shared, there)

        # Known beforehand: asking the device for its time steps would make it wait at every one.
        first = sampler.guidance_from * self.diffusion.num_timesteps
        guided = (
            sampler.guidance != 1 and timestep >= first
            for timestep in self.diffusion.sampling_timesteps(sampler)
        )

        def predict_image(noisy: Tensor, timesteps: Tensor) -> Tensor:
            prediction = predict(noisy, timesteps, conditional)
            if next(guided):
                without = predict(noisy, timesteps, False)
                prediction = without + sampler.guidance * (prediction - without)
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
        """Write an export, `model.safetensors` and `config.yaml`, whole or not at all."""
        config = RefinerExportConfig(
            refiner=self.config,
            modalities=self.modalities,
            shared_dim=self.shared_dim,
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
            folder: the export.
            device: where to.
            autocast_dtype: precision of the networks; None is fp32.
            sampler: how to refine, instead of what the export's own config says.

        Raises:
            UserError: the folder is no refiner's export, is damaged, or its weights are not finite.
        """
        folder = Path(folder)
        export = read_export_config(folder, RefinerExportConfig)
        config = export.refiner if sampler is None else export.refiner.model_copy(update={"sampler": sampler})
        refiner = cls(config, export.modalities, export.shared_dim, export.cmvae_sha256, autocast_dtype)
        load_weights(refiner, folder)
        return refiner.to(device).eval()


def to_signed(images: Tensor) -> Tensor:
    """Images of [0, 1] in [−1, 1], where the diffusion works; what a decoder puts outside is clipped."""
    return images.clamp(0, 1) * 2 - 1


def _build_unet(config: UNetConfig, channels: int, size: Sequence[int]) -> nn.Module:
    """The U-Net of diffusers for the noisy image and its condition on channels."""
    levels = len(config.multipliers)
    halvings = levels - 1
    if any(side % 2**halvings for side in size):
        most = min((side & -side).bit_length() for side in size)
        raise UserError(
            f"refiner.network.multipliers: {levels} levels halve an image {halvings} times, which "
            f"{size[0]}×{size[1]} does not allow; give at most {most}"
        )
    heights = [size[0] // 2**level for level in range(levels)]
    unknown = set(config.attention_sizes) - set(heights)
    if unknown:
        raise UserError(
            f"refiner.network.attention_sizes: {sorted(unknown)[0]} is the height of no level; they are "
            f"{', '.join(map(str, heights))}"
        )
    attends = [height in config.attention_sizes for height in heights]
    widths = tuple(config.channels * multiplier for multiplier in config.multipliers)
    unet = UNet2DModel(
        sample_size=tuple(size),
        in_channels=2 * channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=config.blocks,
        down_block_types=tuple("AttnDownBlock2D" if yes else "DownBlock2D" for yes in attends),
        up_block_types=tuple("AttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)),
        dropout=config.dropout,
        norm_num_groups=math.gcd(32, config.channels),
        # What `Denoiser` embeds is added to the embedding of the time step as it is.
        class_embed_type="identity",
    )
    return cast(nn.Module, unet)


def _check_shapes(groups: Mapping[str, Sequence[str]], modalities: Mapping[str, Modality]) -> None:
    for names in groups.values():
        different = [name for name in names if modalities[name].shape != modalities[names[0]].shape]
        if different:
            raise UserError(
                f"refiner.sharing: one network for all modalities takes images of one shape, but {names[0]} "
                f"is {modalities[names[0]].shape} and {different[0]} is {modalities[different[0]].shape}. "
                "Set per_modality"
            )
