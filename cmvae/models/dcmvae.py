"""D-CMVAE: a CMVAE and the diffusion model that refines its images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from cmvae.config import RefinerExperiment, SamplerConfig
from cmvae.models.cmvae import CMVAE, stack_shared_locations
from cmvae.models.export import weights_sha256
from cmvae.models.precision import autocast_dtype
from cmvae.models.refiner import Refiner
from cmvae.utils.errors import UserError
from cmvae.utils.seeds import derive_seed


class DCMVAE:
    """A CMVAE and its refiner, on one device and in evaluation mode.

    Args:
        cmvae: the model that generates.
        refiner: the model that refines generated images. It must have been trained on reconstructions of
            `cmvae`; `from_pretrained` checks this.
    """

    def __init__(self, cmvae: CMVAE, refiner: Refiner) -> None:
        self.cmvae = cmvae
        self.refiner = refiner

    @classmethod
    def from_pretrained(
        cls,
        refiner: str | Path,
        cmvae: str | Path,
        device: str | torch.device = "cpu",
        autocast_dtype: torch.dtype | None = None,
        sampler: SamplerConfig | None = None,
    ) -> DCMVAE:
        """Load the exports of both models.

        Args:
            refiner: `RUN/export` of the refiner.
            cmvae: `RUN/export` of the CMVAE that the refiner was trained with.
            device: device of both models.
            autocast_dtype: precision of the refiner's networks; None is fp32.
            sampler: settings of the sampler; None is those of the export.

        Raises:
            UserError: an export is missing or damaged, or the refiner was trained with another CMVAE.
        """
        loaded = Refiner.from_pretrained(refiner, device, autocast_dtype, sampler)
        model = CMVAE.from_pretrained(cmvae, device)
        digest = weights_sha256(Path(cmvae))
        if digest != loaded.cmvae_sha256:
            raise UserError(
                f"{refiner}: trained with the CMVAE whose weights have SHA-256 {loaded.cmvae_sha256[:12]}…, "
                f"but {cmvae} has {digest[:12]}…. Pass the CMVAE that it was trained with, or train a new "
                "refiner for this one"
            )
        return cls(model, loaded)

    @classmethod
    def from_run(cls, config: RefinerExperiment, run_dir: Path, device: str | torch.device) -> DCMVAE:
        """Load the exports of a refiner's run and of its CMVAE, with the precision and sampler of `config`.

        Args:
            config: the experiment of the run; its sampler may have been changed.
            run_dir: folder of the run.
            device: device of both models.

        Raises:
            UserError: see `from_pretrained`.
        """
        return cls.from_pretrained(
            run_dir / "export",
            config.cmvae / "export",
            device,
            autocast_dtype(config.train.mixed_precision, torch.device(device)),
            config.refiner.sampler,
        )

    @torch.no_grad()
    def refine(
        self,
        images: Mapping[str, Tensor],
        shared: Tensor | None = None,
        private: Mapping[str, Tensor] | None = None,
        *,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Refine images of the CMVAE, see `Refiner.refine`.

        With `sampler.candidates` above 1, each image is refined several times, and the candidate x with the
        largest q(z|x) is kept.

        Args:
            images: decoded images (B, C, H, W) by modality.
            shared: z, (B, D_z), from which they were decoded. None: if z is needed, it is estimated from
                the images, as the mean of their joint posterior (1/M) Σ_m q(z|x_m).
            private: w by modality, (B, D_w), from which they were decoded. None: if w is needed, it is the
                location of q(w|x_m).
            seeds: seeds of the samples, B of them; None draws them from the default generator of torch.

        Returns:
            (B, C, H, W) in [0, 1] by modality.
        """
        candidates = self.refiner.config.sampler.candidates
        if shared is None and (self.refiner.reads_shared or candidates > 1):
            shared = stack_shared_locations(self.cmvae.encode(images)).mean(1)
        if private is None and self.refiner.reads_private:
            private = {name: q.private.loc for name, q in self.cmvae.encode(images).items()}
        if shared is None or candidates == 1:
            return self.refiner.refine(images, shared, private, seeds=seeds)
        if seeds is None:
            seeds = torch.randint(2**62, (len(next(iter(images.values()))),)).tolist()
        kept = self.refiner.refine(images, shared, private, seeds=seeds)
        log_density = self._log_density_of(shared, kept)
        for candidate in range(1, candidates):
            others = [derive_seed(seed, f"candidate {candidate}") for seed in seeds]
            refined = self.refiner.refine(images, shared, private, seeds=others)
            for name, new_density in self._log_density_of(shared, refined).items():
                is_better = new_density > log_density[name]
                kept[name] = torch.where(is_better[:, None, None, None], refined[name], kept[name])
                log_density[name] = torch.where(is_better, new_density, log_density[name])
        return kept

    def _log_density_of(self, shared: Tensor, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log q(z|x_m) of the refined modalities, (B,), in nats."""
        refined = {name: x for name, x in images.items() if name in self.refiner.modalities}
        return {name: q.shared.log_prob(shared) for name, q in self.cmvae.encode(refined).items()}

    def generate(
        self,
        num_samples: int | None = None,
        *,
        given: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
        cluster: int | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Generate every modality as `CMVAE.generate` does, and refine the images.

        Returns:
            Data (num_samples or B, *shape) by modality; images are (..., C, H, W) in [0, 1].
        """
        latents = self.cmvae.sample_latents(
            num_samples, given=given, mask=mask, cluster=cluster, generator=generator
        )
        images = self.cmvae.decode(latents.shared, latents.private)
        device = latents.shared.device
        seeds = torch.randint(2**62, (len(latents.shared),), device=device, generator=generator)
        return self.refine(images, latents.shared, latents.private, seeds=seeds.tolist())
