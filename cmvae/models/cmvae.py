"""CMVAE: encoders, decoders and the cluster prior. The loss is in `cmvae.models.objectives`.

Training and validation use parameters only through calls of submodules: under DeepSpeed ZeRO-3 a parameter is
empty outside the call of its module.
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
from cmvae.models.hub import find_export
from cmvae.models.likelihoods import likelihood_of
from cmvae.models.module_dict import ModuleDict
from cmvae.models.networks import network_family
from cmvae.models.networks.encoder import TwoTrunkEncoder
from cmvae.utils.errors import UserError

Module = TypeVar("Module", bound=nn.Module)

MAX_DECODED_SIZE = 2**23
"""Maximum number of values in the largest feature map of a decoder per call on a CPU. It equals 55 images of
the published PolyMNIST. Smaller calls are slower, larger ones only take more memory."""


def _full_precision(output: Tensor) -> Tensor:
    """Convert half precision to fp32, which densities and reductions need."""
    return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a module has batch norm, so that splitting a batch changes its output in training."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def channels_last(module: Module) -> Module:
    """Convert convolution weights to the memory format channels-last, that of images and feature maps."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


class Posterior(NamedTuple):
    """Posteriors given one modality: q(z|x_m), parameters (B, D_z), and q(w_m|x_m), parameters (B, D_w)."""

    shared: LocationScale
    private: LocationScale


def stack_shared_locations(posteriors: Mapping[str, Posterior]) -> Tensor:
    """Stack the locations of q(z|x_m), by which samples are clustered: (B, M, D_z)."""
    return torch.stack([posterior.shared.loc for posterior in posteriors.values()], dim=1)


class Latents(NamedTuple):
    """Latents of all modalities, as input of `CMVAE.decode`."""

    shared: Tensor
    """z, (B, D_z)."""
    private: dict[str, Tensor]
    """w_m by modality, (B, D_w)."""


class Assignment(NamedTuple):
    """Cluster assignments of a batch, among the active clusters."""

    cluster: Tensor
    """(B,) int64."""
    confidence: Tensor
    """(B,) With `assign_by: vote`, the mean responsibility of the cluster over the modalities; with `joint`,
    p(c | z) at the joint location."""
    responsibilities: Tensor
    """(B, M, C) p(c | z) at the posterior location of each modality."""


class ExportConfig(BaseModel):
    """`config.yaml` of an export: everything needed to build the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[3] = 3
    model: ModelConfig
    modalities: dict[ModalityName, AnyModality]


class ClusterPrior(nn.Module):
    """Mixture prior p(c) p(z|c) with learned weights π and means.

    Args:
        family: family of the components.
        num_clusters: C.
        dim: D.
        mean_range: means are initialised uniformly in [−mean_range, mean_range].
    """

    def __init__(self, family: type[LocationScale], num_clusters: int, dim: int, mean_range: float) -> None:
        super().__init__()
        self.family = family
        self.logits = nn.Parameter(torch.zeros(num_clusters))
        self.means = nn.Parameter(torch.empty(num_clusters, dim).uniform_(-mean_range, mean_range))
        # Fixed at the neutral value in training. `take` fits it to clusters that were found in z.
        self.register_buffer("scale", family.scale_from_raw(torch.zeros(dim)))
        # Clusters that the selection kept; all clusters in training.
        self.register_buffer("active", torch.ones(num_clusters, dtype=torch.bool))
        self.scale: Tensor
        self.active: Tensor

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the log-weights and log-densities of the clusters.

        Args:
            z: (..., D).

        Returns:
            `log_weights` (C,) and log p(z|c) (..., C).
        """
        return self.log_weights, self.family(self.means, self.scale).log_prob(z.unsqueeze(-2))

    @property
    def log_weights(self) -> Tensor:
        """Log π, (C,), normalised over the active clusters; −∞ for the others."""
        return self.logits.masked_fill(~self.active, -torch.inf).log_softmax(-1)

    @torch.no_grad()
    def take(self, hierarchy: ClusterHierarchy, num_clusters: int) -> None:
        """Activate the clusters of one set of a hierarchy, and only these.

        Args:
            hierarchy: sets of clusters, of at most as many clusters as this prior has.
            num_clusters: number of clusters of the set.

        Raises:
            ValueError: the hierarchy has no such set.
        """
        step, active = hierarchy.step(num_clusters), torch.from_numpy(hierarchy.active(num_clusters))
        self.active.zero_()[: len(active)] = active.to(self.active.device)
        if hierarchy.is_pruned:
            return  # The sets are subsets of this mixture.
        self.means[: len(active)] = torch.from_numpy(hierarchy.means[step]).to(self.means)
        # The weights of removed clusters are not used, but must be finite.
        shares = torch.from_numpy(hierarchy.shares[step]).to(self.logits)
        self.logits[: len(active)] = shares.clamp(min=torch.finfo(shares.dtype).tiny).log()
        variance = torch.full_like(self.scale, float(hierarchy.variance[step]))
        self.scale.copy_(self.family.scale_of(variance))

    def sample(self, clusters: Tensor, noise: Tensor) -> Tensor:
        """Sample from p(z|c).

        Args:
            clusters: c, (B,) int64.
            noise: standard noise of the family, (B, D).

        Returns:
            (B, D)
        """
        return self.family(self.means[clusters], self.scale).sample(noise)


class AuxiliaryPrior(nn.Module):
    """Auxiliary prior r_m(w_m) of MMVAE+, with mean 0 and a learned scale.

    Modality m is decoded with a sample of it where z comes from another modality.
    """

    def __init__(self, family: type[LocationScale], dim: int) -> None:
        super().__init__()
        self.family = family
        self.raw_scale = nn.Parameter(torch.zeros(dim))

    def forward(self) -> Tensor:
        """Return the scales, (D,)."""
        return self.family.scale_from_raw(self.raw_scale)


class CMVAE(nn.Module):
    """Clustering multimodal VAE (Palumbo et al., ICLR 2024): encoders, decoders and priors.

    Args:
        config: sizes, family and networks.
        modalities: modalities by name; at least those in `config`.
        autocast_dtype: precision of the networks; None is fp32. Densities are always fp32.

    Raises:
        UserError: a network does not exist or does not fit its modality.
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
        self._map_sizes: dict[str, float] = {}
        self.encoders = ModuleDict()
        self.decoders = ModuleDict()
        for name, modality_config in config.modalities.items():
            modality = self.modalities[name]
            networks = network_family(modality_config.network or modality.network, modality, name)
            sizes = (modality, modality_config.width, config.shared_dim, config.private_dim)
            self._map_sizes[name] = networks.decoder_map_size
            self.encoders[name] = networks.encoder(*sizes)
            self.decoders[name] = networks.decoder(*sizes)
        self.likelihoods = {
            name: likelihood_of(modality_config.likelihood, self.modalities[name])
            for name, modality_config in config.modalities.items()
        }
        self.cluster_prior = ClusterPrior(
            self.family, config.num_clusters, config.shared_dim, config.cluster_mean_range
        )
        # With one modality, r would be an unused parameter.
        learned = config.auxiliary_prior == "learned" and len(config.modalities) > 1
        self.auxiliary_priors = ModuleDict(
            {name: AuxiliaryPrior(self.family, config.private_dim) for name in config.modalities}
            if learned
            else {}
        )
        private_raw = torch.zeros(config.private_dim)
        self.register_buffer("private_scale", self.family.scale_from_raw(private_raw), persistent=False)
        self.private_scale: Tensor

    @property
    def modality_names(self) -> tuple[str, ...]:
        """Names of the modalities, in the order of every M axis."""
        return tuple(self.config.modalities)

    @property
    def private_prior(self) -> LocationScale:
        """Prior p(w_m), the same fixed density for every modality; parameters (D_w,)."""
        return self.family(torch.zeros_like(self.private_scale), self.private_scale)

    def auxiliary_prior(self, modality: str) -> LocationScale:
        """Auxiliary prior r_m(w_m), parameters (D_w,); p(w_m) where the config holds it fixed."""
        if modality not in self.auxiliary_priors:
            return self.private_prior
        scale = self.auxiliary_priors[modality]()
        return self.family(torch.zeros_like(scale), scale)

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Posterior]:
        """Compute the posteriors given each modality.

        Args:
            inputs: data (B, *shape) by modality, see `cmvae.modalities`; images are in [0, 1].

        Returns:
            Posteriors by modality, in the order of `inputs`.
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
        """Compute only the locations of q(z|x_m), without the trunk of w.

        Args:
            inputs: see `encode`.

        Returns:
            (B, D_z) by modality.
        """
        locations = {}
        for name, x in inputs.items():
            with self._network_precision(x.device):
                locations[name] = _full_precision(cast(TwoTrunkEncoder, self.encoders[name]).encode_shared(x))
        return locations

    def decode(self, shared: Tensor, private: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Decode to the mean of p(x_m | z, w_m); to the mode, if values are categories.

        Args:
            shared: z, (..., D_z).
            private: w_m by modality, (..., D_w) with the same leading axes as z.

        Returns:
            Data (..., *shape) for every modality in `private`; images are (..., C, H, W) in fp32.
        """
        decoded = self.decode_parameters(shared, private)
        return {name: self.likelihoods[name].to_data(parameters) for name, parameters in decoded.items()}

    def decode_parameters(self, shared: Tensor, private: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Decode to the parameters of p(x_m | z, w_m).

        Each decoder is called once, or on a CPU in parts whose feature maps stay small.

        Args:
            shared: z, (..., D_z).
            private: w_m by modality, (..., D_w) with the same leading axes as z.

        Returns:
            Locations or logits (..., *parameter_shape), fp32, for every modality in `private`; see
            `cmvae.models.likelihoods`.
        """
        lead = shared.shape[:-1]
        decoded = {}
        for name, w in private.items():
            latents = torch.cat([shared, w], dim=-1).flatten(0, -2)
            with self._network_precision(shared.device):
                parts = [self.decoders[name](part) for part in latents.chunk(self._num_parts(name, latents))]
            parameters = parts[0] if len(parts) == 1 else torch.cat(parts)
            decoded[name] = _full_precision(parameters).unflatten(0, lead)
        return decoded

    @torch.no_grad()
    def assign(self, inputs: Mapping[str, Tensor], mask: Tensor | None = None) -> Assignment:
        """Assign a batch to clusters from one or several modalities, as `config.assign_by` says.

        Args:
            inputs: data (B, *shape) by modality; images are in [0, 1].
            mask: (B, number of inputs) bool, False where a sample lacks a modality; None if all are present.
        """
        shared_loc = stack_shared_locations(self.encode(inputs)).cpu().numpy()
        present = np.ones(shared_loc.shape[:2], dtype=bool) if mask is None else mask.cpu().numpy()
        return self.assign_locations(shared_loc, present)

    def assign_locations(self, shared_loc: np.ndarray, present: np.ndarray) -> Assignment:
        """Assign encoded samples to clusters, as `config.assign_by` says.

        Args:
            shared_loc: (N, M, D_z) locations of q(z|x_m).
            present: (N, M) bool, the modalities that a sample has, at least one per sample.
        """
        probabilities = self.cluster_probabilities(shared_loc)
        if self.config.assign_by == "joint":
            clusters, certainty = self.assign_jointly(shared_loc, present)
        else:
            clusters = vote(probabilities, present)
            certainty = confidence(probabilities, clusters, present)
        return Assignment(
            torch.from_numpy(clusters), torch.from_numpy(certainty), torch.from_numpy(probabilities)
        )

    def assign_jointly(self, shared_loc: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Assign samples to clusters at the joint locations, see `cmvae.clustering.joint_location`.

        Args:
            shared_loc: (N, M, D_z) locations of q(z|x_m).
            present: (N, M) bool, the modalities that a sample has. The cluster of a sample without any is
                arbitrary.

        Returns:
            Clusters (N,) and their probabilities p(c | z), (N,).
        """
        present = present | ~present.any(axis=1, keepdims=True)
        probabilities = self.cluster_probabilities(joint_location(shared_loc, present))
        return probabilities.argmax(axis=1), probabilities.max(axis=1)

    def cluster_probabilities(self, locations: np.ndarray) -> np.ndarray:
        """Compute p(c | z), (..., C), at `locations` (..., D_z); zero for clusters that are not active."""
        active = self.cluster_prior.active.cpu().numpy()
        log_weights = np.where(active, self.cluster_prior.log_weights.detach().cpu().numpy(), 0)
        log_density = self.log_density(locations)
        flat = log_density.reshape(-1, 1, log_density.shape[-1])
        return responsibilities(flat, log_weights, active).reshape(log_density.shape)

    @torch.no_grad()
    def log_density(self, locations: np.ndarray) -> np.ndarray:
        """Compute log p(z|c), (..., C), at `locations` (..., D_z)."""
        z = torch.from_numpy(locations).to(self.private_scale.device)
        density: np.ndarray = self.cluster_prior(z)[1].cpu().numpy()
        return density

    @torch.no_grad()
    def reconstruct(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Decode each modality from its own posterior locations; data (B, *shape) by modality."""
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
        """Generate every modality: unconditionally, from one cluster, or given other modalities.

        z is sampled from p(z), from p(z|c), or from the mixture of q(z|x_m) over the given modalities. w is
        always sampled from p(w), as in the paper and its evaluation protocols.

        Args:
            num_samples: number of samples; only without `given`.
            given: data (B, *shape) by modality to condition on; images are in [0, 1].
            mask: (B, number of given modalities) bool, False where a sample lacks a modality. Each sample
                must have at least one. None if all are present.
            cluster: index of a cluster; only without `given`.
            generator: random number generator on the model's device; None uses the default one of torch.

        Returns:
            Data (num_samples or B, *shape) by modality. `modalities[name].to_text` and
            `modalities[name].to_stored` convert it to text and to the units of the data set.

        Raises:
            ValueError: neither or both of `num_samples` and `given` are set, or `cluster` and `given`.
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
        """Sample the latents that `generate` decodes; see there for arguments and errors."""
        if given is not None and num_samples is None and cluster is None:
            shared = self._sample_posterior(given, mask, generator)
        elif num_samples is not None and given is None:
            shared = self._sample_prior(num_samples, cluster, generator)
        else:
            raise ValueError("set either num_samples (optionally with cluster) or given, not both")
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
        """Number of calls in which a decoder decodes `latents`."""
        decoder = self.decoders[name]
        if latents.device.type != "cpu" or (decoder.training and has_batch_norm(decoder)):
            return 1
        size = math.prod(self.modalities[name].shape) * self.config.modalities[name].width
        return max(1, math.ceil(len(latents) * size * self._map_sizes[name] / MAX_DECODED_SIZE))

    def _network_precision(self, device: torch.device) -> torch.autocast:
        """Autocast for the networks only; with fp32 it disables an autocast that a launcher enabled."""
        return torch.autocast(device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def save_pretrained(
        self, folder: str | Path, clusters: tuple[ClusterHierarchy, ClusterRecord] | None = None
    ) -> None:
        """Write an export atomically, see `cmvae.models.export.save_export`.

        Args:
            folder: folder of the export; an older export there is replaced.
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
            folder: folder of the export, or `user/name` of a model on the Hugging Face Hub.
            device: device of the model.
            autocast_dtype: precision of the networks; None is fp32.
            num_clusters: number of clusters; None is the number that was selected.

        Raises:
            UserError: the folder is not an export or is damaged, the weights are not finite or do not fit the
                config, or there is no set of `num_clusters` clusters.
        """
        folder = find_export(folder)
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
