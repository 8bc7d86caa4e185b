"""CMVAE: encoders, decoders, the cluster prior; no loss in it.

Everything that training and validation need goes through calls of submodules, because under DeepSpeed ZeRO-3
a parameter is empty outside its module's call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from cmvae.clustering import ClusterHierarchy, confidence, joint_location, responsibilities, vote
from cmvae.config import ModelConfig
from cmvae.modalities import AnyModality, Modality, ModalityName
from cmvae.models.distributions import FAMILIES, LocationScale
from cmvae.models.export import ClusterRecord, load_clusters, load_weights, read_export_config, save_export
from cmvae.models.likelihoods import likelihood_of
from cmvae.models.networks import network_family
from cmvae.models.networks.encoder import TwoTrunkEncoder
from cmvae.utils.errors import UserError

Module = TypeVar("Module", bound=nn.Module)

# Values times filters that a decoder makes in one call on a CPU, 55 images of the published PolyMNIST:
# its feature maps grow with both. Fewer would make it slower, more would only take memory.
_DECODED_AT_A_TIME = 2**23


def _full_precision(output: Tensor) -> Tensor:
    """Densities and reductions want at least fp32, whatever precision the networks ran in."""
    return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a batch that is split would have other statistics than as a whole."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def channels_last(module: Module) -> Module:
    """Lay convolution weights out channels-last, as the images and all feature maps are."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Posterior(NamedTuple):
    """What one modality says: q(z|x_m) with parameters (B, D_z) and q(w_m|x_m) with (B, D_w)."""

    shared: LocationScale
    private: LocationScale


def stack_shared_locations(posteriors: Mapping[str, Posterior]) -> Tensor:
    """Locations of q(z|x_m), (B, M, D_z): what clusters are read from."""
    return torch.stack([posterior.shared.loc for posterior in posteriors.values()], dim=1)


class Latents(NamedTuple):
    """What a joint generation is decoded from."""

    shared: Tensor
    """z, (B, D_z)."""
    private: dict[str, Tensor]
    """w_m by modality, (B, D_w)."""


class Assignment(NamedTuple):
    """Clusters of a batch, after the selection."""

    cluster: Tensor
    """(B,) int64."""
    confidence: Tensor
    """(B,): by vote the mean over the modalities of their responsibility of the cluster, else p(c | z) at the
    joint location."""
    responsibilities: Tensor
    """(B, M, C) p(c | z) at each modality's posterior location."""


class ExportConfig(BaseModel):
    """`config.yaml` of an export: all that is needed to build the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[3] = 3
    model: ModelConfig
    modalities: dict[ModalityName, AnyModality]


class ClusterPrior(nn.Module):
    """p(c) p(z|c): learned weights π and means, scales fixed at the neutral raw 0 while training."""

    def __init__(self, family: type[LocationScale], num_clusters: int, dim: int, mean_range: float) -> None:
        super().__init__()
        self.family = family
        self.logits = nn.Parameter(torch.zeros(num_clusters))
        self.means = nn.Parameter(torch.empty(num_clusters, dim).uniform_(-mean_range, mean_range))
        # Fixed while training; an export whose clusters were found in z has what fits them.
        self.register_buffer("scale", family.scale_from_raw(torch.zeros(dim)))
        # Clusters that the selection kept; all of them while training.
        self.register_buffer("active", torch.ones(num_clusters, dtype=torch.bool))
        self.scale: Tensor
        self.active: Tensor

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Log π (C,), −∞ where a cluster is not active, and log p(z|c) (..., C) of every cluster.

        Args:
            z: (..., D).
        """
        return self.log_weights, self.family(self.means, self.scale).log_prob(z.unsqueeze(-2))

    @property
    def log_weights(self) -> Tensor:
        """Log π (C,), renormalised over the active clusters, −∞ elsewhere."""
        return self.logits.masked_fill(~self.active, -torch.inf).log_softmax(-1)

    @torch.no_grad()
    def take(self, hierarchy: ClusterHierarchy, num_clusters: int) -> None:
        """Have the clusters of one set of a hierarchy, and no others active.

        Args:
            hierarchy: of at most as many clusters as this prior has.
            num_clusters: size of the set.

        Raises:
            ValueError: there is no such set.
        """
        step, active = hierarchy.step(num_clusters), torch.from_numpy(hierarchy.active(num_clusters))
        self.active.zero_()[: len(active)] = active.to(self.active.device)
        if hierarchy.is_pruned:
            return  # parts of the mixture that this is
        self.means[: len(active)] = torch.from_numpy(hierarchy.means[step]).to(self.means)
        # Weights of clusters that are gone mean nothing, and must be finite.
        shares = torch.from_numpy(hierarchy.shares[step]).to(self.logits)
        self.logits[: len(active)] = shares.clamp(min=torch.finfo(shares.dtype).tiny).log()
        variance = torch.full_like(self.scale, float(hierarchy.variance[step]))
        self.scale.copy_(self.family.scale_of(variance))

    def sample(self, clusters: Tensor, noise: Tensor) -> Tensor:
        """Samples of p(z|c) for `clusters` (B,) from `noise` (B, D)."""
        return self.family(self.means[clusters], self.scale).sample(noise)


class AuxiliaryPrior(nn.Module):
    """r_m(w_m) of MMVAE+: mean 0, learned scale; stands in for w_m when another modality is the source."""

    def __init__(self, family: type[LocationScale], dim: int) -> None:
        super().__init__()
        self.family = family
        self.raw_scale = nn.Parameter(torch.zeros(dim))

    def forward(self) -> Tensor:
        """The scales (D,)."""
        return self.family.scale_from_raw(self.raw_scale)


class CMVAE(nn.Module):
    """The generative model with its encoders.

    Args:
        config: sizes, family and networks.
        modalities: each modality that `config` names, by name.
        autocast_dtype: precision of the networks; None is fp32. Densities are fp32 in any case.

    Raises:
        UserError: the network of a modality does not fit it.
    """

    def __init__(
        self,
        config: ModelConfig,
        modalities: Mapping[str, Modality],
        autocast_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.modalities = {name: modalities[name] for name in config.modalities}
        self.autocast_dtype = autocast_dtype
        self.family = FAMILIES[config.family]
        self.encoders = nn.ModuleDict()
        self.decoders = nn.ModuleDict()
        for name, modality_config in config.modalities.items():
            modality = self.modalities[name]
            networks = network_family(modality_config.network or modality.network, modality, name)
            sizes = (modality, modality_config.width, config.shared_dim, config.private_dim)
            self.encoders[name] = networks.encoder(*sizes)
            self.decoders[name] = networks.decoder(*sizes)
        self.likelihoods = {
            name: likelihood_of(modality_config.likelihood, self.modalities[name])
            for name, modality_config in config.modalities.items()
        }
        self.cluster_prior = ClusterPrior(
            self.family, config.num_clusters, config.shared_dim, config.cluster_mean_range
        )
        # With one modality there is no other source, so r would be a parameter that nothing uses.
        self.auxiliary_priors = nn.ModuleDict(
            {name: AuxiliaryPrior(self.family, config.private_dim) for name in config.modalities}
            if len(config.modalities) > 1
            else {}
        )
        private_raw = torch.zeros(config.private_dim)
        self.register_buffer("private_scale", self.family.scale_from_raw(private_raw), persistent=False)
        self.private_scale: Tensor

    @property
    def modality_names(self) -> tuple[str, ...]:
        """The modalities, in the order of every M axis."""
        return tuple(self.config.modalities)

    @property
    def private_prior(self) -> LocationScale:
        """p(w_m), the same fixed density for every modality; parameters (D_w,)."""
        return self.family(torch.zeros_like(self.private_scale), self.private_scale)

    def auxiliary_prior(self, modality: str) -> LocationScale:
        """r_m(w_m), parameters (D_w,)."""
        scale = self.auxiliary_priors[modality]()
        return self.family(torch.zeros_like(scale), scale)

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Posterior]:
        """Posteriors of the modalities in `inputs`.

        Args:
            inputs: by modality, data (B, *shape), see `cmvae.modalities`; images are in [0, 1].
        """
        posteriors = {}
        for name, x in inputs.items():
            with self._network_precision(x.device):
                outputs = self.encoders[name](x)
            shared_loc, shared_raw, private_loc, private_raw = map(_full_precision, outputs)
            posteriors[name] = Posterior(
                self.family(shared_loc, self.family.scale_from_raw(shared_raw)),
                self.family(private_loc, self.family.scale_from_raw(private_raw)),
            )
        return posteriors

    def encode_shared(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Locations of q(z|x_m) alone, (B, D_z) by modality, for a training that needs nothing else.

        Args:
            inputs: as of `encode`.
        """
        locations = {}
        for name, x in inputs.items():
            with self._network_precision(x.device):
                locations[name] = _full_precision(cast(TwoTrunkEncoder, self.encoders[name]).encode_shared(x))
        return locations

    def decode(self, shared: Tensor, private: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean of p(x_m | z, w_m), or the most probable value, for every modality in `private`.

        Args:
            shared: z, (..., D_z).
            private: w_m by modality, (..., D_w) with the same leading axes as z.

        Returns:
            By modality data (..., *shape), images (..., C, H, W) in fp32.
        """
        decoded = self.decode_parameters(shared, private)
        return {name: self.likelihoods[name].to_data(parameters) for name, parameters in decoded.items()}

    def decode_parameters(self, shared: Tensor, private: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of p(x_m | z, w_m) for every modality in `private`.

        A decoder is called once, but on a CPU for so few latents at a time that its feature maps stay small.

        Args:
            shared: z, (..., D_z).
            private: w_m by modality, (..., D_w) with the same leading axes as z.

        Returns:
            By modality (..., *parameter shape), fp32: locations or logits, see `cmvae.models.likelihoods`.
        """
        lead = shared.shape[:-1]
        decoded = {}
        for name, w in private.items():
            latents = torch.cat([shared, w], dim=-1).flatten(0, -2)
            with self._network_precision(shared.device):
                parts = [self.decoders[name](part) for part in latents.chunk(self._num_parts(name, latents))]
            location = parts[0] if len(parts) == 1 else torch.cat(parts)
            decoded[name] = _full_precision(location).unflatten(0, lead)
        return decoded

    @torch.no_grad()
    def assign(self, inputs: Mapping[str, Tensor], mask: Tensor | None = None) -> Assignment:
        """Clusters of a batch from the modalities given, by `config.assign_by`.

        Args:
            inputs: by modality, data (B, *shape); images are in [0, 1].
            mask: (B, M) bool, false where a sample lacks one of `inputs`; None if none lacks any.
        """
        shared = stack_shared_locations(self.encode(inputs))
        log_weights, log_density = (tensor.cpu().numpy() for tensor in self.cluster_prior(shared))
        active = self.cluster_prior.active.cpu().numpy()
        log_weights = np.where(active, log_weights, 0)
        probabilities = responsibilities(log_density, log_weights, active)
        present = np.ones(probabilities.shape[:2], dtype=bool) if mask is None else mask.cpu().numpy()
        if self.config.assign_by == "joint":
            clusters, certainty = self.assign_jointly(shared.cpu().numpy(), present)
        else:
            clusters = vote(probabilities, present)
            certainty = confidence(probabilities, clusters, present)
        return Assignment(
            torch.from_numpy(clusters), torch.from_numpy(certainty), torch.from_numpy(probabilities)
        )

    def assign_jointly(self, shared_loc: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Clusters where the modalities put samples together, see `cmvae.clustering.joint_location`.

        Args:
            shared_loc: (N, M, D_z) locations of q(z|x_m).
            present: (N, M) bool, the modalities that a sample has. Samples without any get a cluster that
                means nothing.

        Returns:
            (N,) clusters and (N,) p(c | z) of them at the joint locations.
        """
        present = present | ~present.any(axis=1, keepdims=True)
        probabilities = self.cluster_probabilities(joint_location(shared_loc, present))
        return probabilities.argmax(axis=1), probabilities.max(axis=1)

    def cluster_probabilities(self, locations: np.ndarray) -> np.ndarray:
        """p(c | z) over the active clusters, (N, C) with 0 for the others, at `locations` (N, D_z)."""
        active = self.cluster_prior.active.cpu().numpy()
        log_weights = np.where(active, self.cluster_prior.log_weights.detach().cpu().numpy(), 0)
        return responsibilities(self.log_density(locations)[:, None], log_weights, active)[:, 0]

    @torch.no_grad()
    def log_density(self, locations: np.ndarray) -> np.ndarray:
        """Log p(z|c) of every cluster, (..., C), for `locations` (..., D_z) that lie on the CPU."""
        z = torch.from_numpy(locations).to(self.private_scale.device)
        density: np.ndarray = self.cluster_prior(z)[1].cpu().numpy()
        return density

    @torch.no_grad()
    def reconstruct(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Each modality from its own posterior locations, data (B, *shape)."""
        return {
            name: self.decode(posterior.shared.loc, {name: posterior.private.loc})[name]
            for name, posterior in self.encode(inputs).items()
        }

    @torch.no_grad()
    def generate(
        self,
        num_samples: int | None = None,
        *,
        given: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
        cluster: int | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Generate every modality: unconditionally, of one cluster, or from other modalities.

        z comes from the prior p(z), from p(z|c), or from the mixture of q(z|x_m) over the modalities given;
        w always from p(w), as method and protocols have it.

        Args:
            num_samples: how many; only without `given`.
            given: by modality, data (B, *shape) to condition on; images are in [0, 1].
            mask: (B, number of `given`) bool, false where a sample lacks one of `given`; it must have one at
                least. None if none lacks any.
            cluster: index of a cluster; only without `given`.
            generator: random stream, on the model's device; None uses torch's default.

        Returns:
            By modality data (num_samples or B, *shape) as `decode` returns it; `modalities[name].to_text`
            and `modalities[name].to_stored` convert it to the units of the data set.

        Raises:
            ValueError: neither or both of `num_samples` and `given`, or `cluster` with `given`.
        """
        latents = self.sample_latents(
            num_samples, given=given, mask=mask, cluster=cluster, generator=generator
        )
        return self.decode(latents.shared, latents.private)

    @torch.no_grad()
    def sample_latents(
        self,
        num_samples: int | None = None,
        *,
        given: Mapping[str, Tensor] | None = None,
        mask: Tensor | None = None,
        cluster: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Latents:
        """What `generate` decodes; arguments and errors as there."""
        if given is not None and num_samples is None and cluster is None:
            shared = self._sample_posterior(given, mask, generator)
        elif num_samples is not None and given is None:
            shared = self._sample_prior(num_samples, cluster, generator)
        else:
            raise ValueError("give num_samples (and cluster, if wanted) or given, not both")
        private = {}
        for name in self.modality_names:
            noise = self.family.draw_noise((len(shared), self.config.private_dim), shared.device, generator)
            private[name] = self.private_prior.sample(noise)
        return Latents(shared, private)

    def _sample_prior(
        self, num_samples: int, cluster: int | None, generator: torch.Generator | None
    ) -> Tensor:
        device = self.private_scale.device
        noise = self.family.draw_noise((num_samples, self.config.shared_dim), device, generator)
        if cluster is None:
            weights = self.cluster_prior.log_weights.exp()
            clusters = torch.multinomial(weights, num_samples, replacement=True, generator=generator)
        else:
            clusters = torch.full((num_samples,), cluster, dtype=torch.long, device=device)
        return self.cluster_prior.sample(clusters, noise)

    def _sample_posterior(
        self, given: Mapping[str, Tensor], mask: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        posteriors = list(self.encode(given).values())
        locations = torch.stack([posterior.shared.loc for posterior in posteriors])  # (J, B, D)
        scales = torch.stack([posterior.shared.scale for posterior in posteriors])
        num_sources, batch_size, dim = locations.shape
        if mask is None:
            source = torch.randint(num_sources, (batch_size,), device=locations.device, generator=generator)
        else:
            source = mask.float().multinomial(1, generator=generator).squeeze(1)
        rows = torch.arange(batch_size, device=locations.device)
        noise = self.family.draw_noise((batch_size, dim), locations.device, generator)
        return self.family(locations[source, rows], scales[source, rows]).sample(noise)

    def _num_parts(self, name: str, latents: Tensor) -> int:
        """In how many calls a decoder is given `latents`."""
        decoder = self.decoders[name]
        if latents.device.type != "cpu" or (decoder.training and has_batch_norm(decoder)):
            return 1
        size = math.prod(self.modalities[name].shape) * self.config.modalities[name].width
        return max(1, math.ceil(len(latents) * size / _DECODED_AT_A_TIME))

    def _network_precision(self, device: torch.device) -> torch.autocast:
        """Autocast for the networks alone; with fp32 it switches off whatever a launcher switched on."""
        return torch.autocast(device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def save_pretrained(
        self, folder: str | Path, clusters: tuple[ClusterHierarchy, ClusterRecord] | None = None
    ) -> None:
        """Write an export, see `cmvae.models.export.save_export`, whole or not at all.

        Args:
            folder: where to; an older export there is replaced.
            clusters: sets of clusters to choose from later, and how they were found; None writes none.
        """
        config = ExportConfig(model=self.config, modalities=self.modalities)
        save_export(Path(folder), config, self.state_dict(), clusters)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        device: str | torch.device = "cpu",
        autocast_dtype: torch.dtype | None = None,
        num_clusters: int | None = None,
    ) -> CMVAE:
        """Load an export that `save_pretrained` wrote, in evaluation mode.

        Args:
            folder: the export.
            device: where to.
            autocast_dtype: as of the class.
            num_clusters: have so many clusters instead of those that were selected; None keeps these.

        Raises:
            UserError: the folder is no export, is damaged, or its weights are not finite or do not fit its
                config; or it has no set of `num_clusters` clusters.
        """
        folder = Path(folder)
        export = read_export_config(folder, ExportConfig)
        model = cls(export.model, export.modalities, autocast_dtype)
        load_weights(model, folder)
        if num_clusters is not None:
            hierarchy, _ = load_clusters(folder)
            try:
                model.cluster_prior.take(hierarchy, num_clusters)
            except ValueError as error:
                raise UserError(f"{folder}: {error}. Choose another number") from error
        return channels_last(model.to(device)).eval()
