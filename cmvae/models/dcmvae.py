"""D-CMVAE: a CMVAE and the diffusion that makes what it generates sharp."""

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
    """A CMVAE and its refiner, on one device, in evaluation mode.

    Args:
        cmvae: what generates.
        refiner: what refines it; it must have been trained on reconstructions of `cmvae`, which
            `from_pretrained` checks.
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
        """Load the exports of both.

        Args:
            refiner: `RUN/export` of the refiner.
            cmvae: `RUN/export` of the CMVAE that it was trained with.
            device: where to.
            autocast_dtype: precision of the refiner's networks; None is fp32.
            sampler: how to refine, instead of what the refiner's own config says.

        Raises:
            UserError: an export is missing or damaged, or the refiner belongs to another CMVAE.
        """
        loaded = Refiner.from_pretrained(refiner, device, autocast_dtype, sampler)
        model = CMVAE.from_pretrained(cmvae, device)
        given = weights_sha256(Path(cmvae))
        if given != loaded.cmvae_sha256:
            raise UserError(
                f"{refiner}: refines the CMVAE with the weights {loaded.cmvae_sha256[:12]}…, but {cmvae} has "
                f"{given[:12]}…. Give the CMVAE that it was trained with, or train a refiner for this one"
            )
        return cls(model, loaded)

    @classmethod
    def from_run(cls, config: RefinerExperiment, run_dir: Path, device: str | torch.device) -> DCMVAE:
        """Load what the run of a refiner left, in its precision and with the sampler of `config`.

        Args:
            config: the run's experiment, perhaps with another sampler.
            run_dir: folder of the run.
            device: where to.

        Raises:
            UserError: as `from_pretrained`.
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
        *,
        seeds: Sequence[int] | None = None,
    ) -> dict[str, Tensor]:
        """Sharp images from what the CMVAE made; see `Refiner.refine`.

        Of `sampler.candidates` pictures of an image x̂_m the one with the largest q(z | picture) is kept.

        Without `shared`, z is what the CMVAE reads back from the images where it is needed: the mean of their
        joint posterior (1/M) Σ_m q(z|x_m).
        """
        candidates = self.refiner.config.sampler.candidates
        if shared is None and (self.refiner.config.conditioning.latent or candidates > 1):
            shared = stack_shared_locations(self.cmvae.encode(images)).mean(1)
        if shared is None or candidates == 1:
            return self.refiner.refine(images, shared, seeds=seeds)
        if seeds is None:
            seeds = torch.randint(2**62, (len(next(iter(images.values()))),)).tolist()
        kept = self.refiner.refine(images, shared, seeds=seeds)
        log_density = self._log_density_of(shared, kept)
        for candidate in range(1, candidates):
            others = [derive_seed(seed, f"candidate {candidate}") for seed in seeds]
            made = self.refiner.refine(images, shared, seeds=others)
            for name, better in self._log_density_of(shared, made).items():
                is_better = better > log_density[name]
                kept[name] = torch.where(is_better[:, None, None, None], made[name], kept[name])
                log_density[name] = torch.where(is_better, better, log_density[name])
        return kept

    def _log_density_of(self, shared: Tensor, made: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Log q(z|x_m) in nats, (B,), of the modalities that are refined."""
        refined = {name: x for name, x in made.items() if name in self.refiner.modalities}
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
        """What `CMVAE.generate` makes of the same arguments, its images refined.

        Returns:
            By modality data (B, *shape), images (B, C, H, W) in [0, 1].
        """
        latents = self.cmvae.sample_latents(
            num_samples, given=given, mask=mask, cluster=cluster, generator=generator
        )
        images = self.cmvae.decode(latents.shared, latents.private)
        device = latents.shared.device
        seeds = torch.randint(2**62, (len(latents.shared),), device=device, generator=generator)
        return self.refine(images, latents.shared, seeds=seeds.tolist())
