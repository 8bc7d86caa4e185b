"""Training the refiner of a frozen CMVAE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cmvae.config import RefinerExperiment
from cmvae.data.index import ShardIndex, SplitName
from cmvae.modalities import Modality
from cmvae.models.cmvae import CMVAE
from cmvae.models.dcmvae import DCMVAE
from cmvae.models.export import weights_sha256
from cmvae.models.refiner import Refiner, to_signed
from cmvae.training.task import Preview, Task
from cmvae.utils.seeds import draw_normal, draw_uniform, sample_generators


@dataclass(frozen=True)
class RefinerNoise:
    """Noise of one step for one modality; the loss is a deterministic function of it and the batch."""

    source: Tensor
    """(B,) int64, the modality that each sample's reconstruction comes from."""
    shared: Tensor
    """(B, D_z), for z ~ q(z|x_source) if it is sampled."""
    private: Tensor
    """(B, D_w), for w ~ p(w), as in generation."""
    condition: Tensor
    """(B, C, H, W) standard normal, for noise on the reconstruction."""
    present: Tensor
    """(B,) bool, false where the condition is left out."""
    timesteps: Tensor
    """(B,) int64."""
    image: Tensor
    """(B, C, H, W) standard normal: the noise that the diffusion adds."""


class RefinerTask(Task):
    """The denoising loss of a refiner on reconstructions by a frozen CMVAE.

    At each step the condition of an image of modality m is one reconstruction x̂(n→m), n uniform over the
    modalities, self and cross, w ~ p(w) as in generation; see `ConditioningConfig` for the other choices.

    Args:
        refiner: what is trained.
        cmvae: what reconstructs, on its device, in evaluation mode; no part of this module's state, so that
            nothing wraps, trains or saves it.
    """

    name = "refiner"
    progress_metric = "denoising_loss"
    channels_last = False

    def __init__(self, refiner: Refiner, cmvae: CMVAE) -> None:
        super().__init__()
        self.refiner = refiner
        # In a tuple, where torch does not look for submodules.
        self._frozen = (cmvae.requires_grad_(False),)

    @property
    def cmvae(self) -> CMVAE:
        """The frozen CMVAE."""
        return self._frozen[0]

    @property
    def modalities(self) -> Mapping[str, Modality]:
        """The CMVAE's modalities: all are sources, and the images among them targets."""
        return self.cmvae.modalities

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The U-Nets, and the encoders and decoders of the CMVAE."""
        cmvae = self.cmvae
        return (*self.refiner.denoisers.values(), *cmvae.encoders.values(), *cmvae.decoders.values())

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Precision of the U-Nets; setting it sets that of the CMVAE as well."""
        return self.refiner.autocast_dtype

    @autocast_dtype.setter
    def autocast_dtype(self, dtype: torch.dtype | None) -> None:
        self.refiner.autocast_dtype = self.cmvae.autocast_dtype = dtype

    @property
    def frozen_hashes(self) -> dict[str, str]:
        """Hash of the weights of the CMVAE."""
        return {"cmvae_sha256": self.refiner.cmvae_sha256}

    def draw_noise(
        self, images: Mapping[str, Tensor], mask: Tensor, generators: Sequence[torch.Generator]
    ) -> dict[str, RefinerNoise]:
        """Noise of one step by target modality.

        Args:
            images: the targets, (B, C, H, W).
            mask: (B, M) bool, the modalities that a sample has: its sources; at least one.
            generators: one per sample.
        """
        conditioning, device = self.refiner.config.conditioning, mask.device
        num_timesteps, dims = self.refiner.diffusion.num_timesteps, self.cmvae.config
        leading = (len(mask), len(images))
        uniform = draw_uniform((*leading, mask.shape[1] + 2), device, generators)
        latents = self.cmvae.family.draw_noise(
            (*leading, dims.shared_dim + dims.private_dim), device, generators
        )
        drawn = {}
        for place, (name, x) in enumerate(images.items()):
            choice, left_out, time = uniform[:, place].split([mask.shape[1], 1, 1], dim=1)
            source = torch.full((len(x),), self.modality_names.index(name), device=device)
            if conditioning.source == "any":
                # Not `multinomial`, for which a GPU waits to have its probabilities checked.
                source = choice.masked_fill(~mask, -1).argmax(1)
            present = left_out[:, 0] >= conditioning.dropout
            condition, image = draw_normal((len(x), 2, *x.shape[1:]), device, generators).unbind(1)
            drawn[name] = RefinerNoise(
                source=source,
                shared=latents[:, place, : dims.shared_dim],
                private=latents[:, place, dims.shared_dim :],
                condition=condition,
                present=present if conditioning.source != "none" else torch.zeros_like(present),
                timesteps=(time[:, 0] * num_timesteps).long(),
                image=image,
            )
        return drawn

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted squared error of the prediction.

        Args:
            batch: as of `CMVAETask.forward`; images are in [0, 1].

        Returns:
            The loss, a mean over pixels and over the images of valid samples, and a report: `denoising_loss`
            (mean over the images that a sample has) and `denoising_loss/MODALITY`, (B,) each, zero of an
            image that a sample lacks.
        """
        inputs = {name: batch[name] for name in self.modality_names}
        mask, valid = batch["mask"], batch["valid"]
        # A sample without modalities has no source, one without images nothing to denoise.
        sources = mask | ~mask.any(1, keepdim=True)
        places = [self.modality_names.index(name) for name in self.refiner.modality_names]
        targets = torch.stack([mask[:, place] for place in places])  # (images, B)
        valid = valid & targets.any(0)
        # A precision that a launcher enabled around this call is for networks alone.
        with torch.autocast(valid.device.type, enabled=False):
            images = {name: inputs[name] for name in self.refiner.modality_names}
            generators = sample_generators(batch["_seed"], batch["_place"], mask.device)
            noise = self.draw_noise(images, sources, generators)
            reconstructions, latents = self._encode(inputs, noise)
            losses = self._denoise(images, reconstructions, latents, noise)
            losses = {
                name: torch.where(there, losses[name], 0) for name, there in zip(images, targets, strict=True)
            }
            total = torch.stack(list(losses.values())).sum(0) / targets.sum(0).clamp(min=1)
            loss = (total * valid).sum() / valid.sum().clamp(min=1)
        report = {self.progress_metric: total} | {
            f"{self.progress_metric}/{name}": x for name, x in losses.items()
        }
        return loss, {name: values.detach() for name, values in report.items()}

    @torch.no_grad()
    def _encode(
        self, inputs: Mapping[str, Tensor], noise: Mapping[str, RefinerNoise]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Conditions by target: x̂ (B, C, H, W) in [−1, 1], unless only latents are one, and the latents."""
        posteriors = self.cmvae.encode(inputs)
        locations = torch.stack([posterior.shared.loc for posterior in posteriors.values()])  # (M, B, D_z)
        scales = torch.stack([posterior.shared.scale for posterior in posteriors.values()])
        reconstructions, latents = {}, {}
        for name, drawn in noise.items():
            rows = torch.arange(len(drawn.source), device=locations.device)
            posterior = self.cmvae.family(locations[drawn.source, rows], scales[drawn.source, rows])
            if self.refiner.config.conditioning.shared == "sample":
                z = posterior.sample(drawn.shared)
            else:
                z = posterior.loc
            if self.refiner.reads_private:
                w = posteriors[name].private.sample(drawn.private)
                latents[name] = self.refiner.latent_of(z, w)
                continue
            w = self.cmvae.private_prior.sample(drawn.private)
            x = to_signed(self.cmvae.decode(z, {name: w})[name])
            reconstructions[name] = x + self.refiner.config.conditioning.noise * drawn.condition
            latents[name] = z
        return reconstructions, latents

    def _denoise(
        self,
        images: Mapping[str, Tensor],
        reconstructions: Mapping[str, Tensor],
        latents: Mapping[str, Tensor],
        noise: Mapping[str, RefinerNoise],
    ) -> dict[str, Tensor]:
        """Loss of every sample (B,), by target; modalities that share a network go through it together."""
        losses: dict[str, Tensor] = {}
        diffusion = self.refiner.diffusion
        for group, names in self.refiner.groups.items():
            x = torch.cat([to_signed(images[name]) for name in names])
            added, timesteps, present = (
                torch.cat([getattr(noise[name], part) for name in names])
                for part in ("image", "timesteps", "present")
            )
            place = torch.arange(len(names), device=x.device)
            prediction = self.refiner.predict(
                group,
                diffusion.add_noise(x, added, timesteps),
                timesteps,
                torch.cat([reconstructions[name] for name in names]) if reconstructions else None,
                place.repeat_interleave(len(x) // len(names)),
                torch.cat([latents[name] for name in names]),
                present,
            )
            error = (prediction - diffusion.target(x, added, timesteps)).square().flatten(1).mean(1)
            weighted = error * diffusion.loss_weights(timesteps)
            losses |= zip(names, weighted.chunk(len(names)), strict=True)
        return losses

    def validation_metrics(self, records: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Means of the report."""
        return {name: float(x.mean()) for name, x in records.items() if name.startswith(self.progress_metric)}

    def show(self, batch: Mapping[str, Any], num_samples: int, generator: torch.Generator) -> Preview:
        """The first samples of a batch: input, CMVAE and D-CMVAE for every pair of modalities."""
        # matplotlib is imported when something is drawn.
        from cmvae.visualize.previews import generate_refinements

        inputs = {name: batch[name][:num_samples] for name in self.modality_names}
        mask = batch["mask"][:num_samples]
        made = generate_refinements(DCMVAE(self.cmvae, self.refiner), inputs, mask, generator)
        return Preview({"refinements": made.draw})

    def export(
        self,
        folder: Path,
        state: Mapping[str, Tensor],
        batches: Callable[[SplitName, int | None], Iterable[Mapping[str, Any]]],
    ) -> None:
        """Write the refiner as an export; called on rank 0 alone, and reads no `batches`."""
        own = self.refiner
        refiner = Refiner(own.config, own.modalities, own.shared_dim, own.private_dim, own.cmvae_sha256)
        refiner.load_state_dict({name.removeprefix("refiner."): x for name, x in state.items()})
        refiner.save_pretrained(folder)


def build_refiner_task(
    config: RefinerExperiment,
    index: ShardIndex,
    device: torch.device,
    autocast_dtype: torch.dtype | None,
) -> RefinerTask:
    """The task of a refiner's experiment, with fresh weights; see `cmvae.training.tasks.build_task`.

    Raises:
        UserError: the CMVAE's export is missing or damaged, or other data or networks do not fit it.
    """
    export = config.cmvae / "export"
    cmvae = CMVAE.from_pretrained(export, device, autocast_dtype)
    index.check_modalities(cmvae.modalities, config.data.shards)
    modalities = {name: modality for name, modality in cmvae.modalities.items() if modality.kind == "image"}
    sizes = cmvae.config.shared_dim, cmvae.config.private_dim
    refiner = Refiner(config.refiner, modalities, *sizes, weights_sha256(export), autocast_dtype)
    return RefinerTask(refiner, cmvae)
