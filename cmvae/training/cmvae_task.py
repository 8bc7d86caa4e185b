"""Training a CMVAE."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import entr
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cmvae.clustering import clustering_metrics, find_cluster_means, responsibilities, vote
from cmvae.config import ClustersConfig, ObjectiveConfig
from cmvae.data.index import SplitName
from cmvae.distributed import gather, gather_with_gradient, rank_of_process
from cmvae.modalities import Modality
from cmvae.models.alignment import augment, contrast
from cmvae.models.cmvae import CMVAE, Posterior, has_batch_norm, stack_shared_locations
from cmvae.models.encoding import CLUSTER_SAMPLES, encode_split, find_clusters
from cmvae.models.objectives import (
    LogWeightTerms,
    cluster_log_prob,
    data_log_prob,
    dreg,
    iwae,
    log_weights,
    mean_over_sources,
    mixture_log_prob,
)
from cmvae.training.task import Preview, Task
from cmvae.utils.seeds import sample_generators

REFIT_SAMPLES = 2000
"""Number of train samples in which the clusters are refitted."""


@dataclass(frozen=True)
class LatentNoise:
    """Standard noise of one step; the objective is a deterministic function of it and the batch."""

    shared: Tensor
    """(M, K, B, D_z), for z ~ q(z|x_m)."""
    private: Tensor
    """(M, M, K, B, D_w), target by source: on the diagonal for w_m ~ q(w_m|x_m), elsewhere for w̃_n ~ r_n."""
    cross_shifts: tuple[int, ...]
    """Every target n is decoded from itself and from the sources (n + shift) mod M, so that with one shift
    each source is used once."""


def fill_missing(values: Tensor, mask: Tensor) -> Tensor:
    """Fill the missing values of a modality with those of the samples that have it, in turn.

    Only for batch norm, whose statistics are then of real data: nothing else counts what a sample lacks.

    Args:
        values: (B, ...).
        mask: (B,) bool, who has it; if nobody does, `values` come back as they are.
    """
    samples_with_it = mask.long().argsort(descending=True, stable=True)
    turn = (~mask).long().cumsum(0) - 1
    donors = samples_with_it[turn.clamp(min=0) % mask.sum().clamp(min=1)]
    own = torch.arange(len(mask), device=mask.device)
    return values[torch.where(mask | ~mask.any(), own, donors)]


class CMVAETask(Task):
    """The CMVAE and its objective.

    Args:
        model: the model to train.
        objective: bound, K and β, and the contrast between modalities.
        clusters: how many clusters the export has.
    """

    name = "cmvae"
    channels_last = True

    def __init__(
        self, model: CMVAE, objective: ObjectiveConfig, clusters: ClustersConfig | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.clusters = clusters or ClustersConfig()
        self.aligns = objective.alignment.weight > 0 and len(model.modality_names) > 1
        self.pretrain_steps = 0
        self.pretraining = False

    @property
    def progress_metric(self) -> str:  # type: ignore[override]
        """The bound; while the encoders of z are trained alone, their contrast."""
        return "alignment" if self.pretraining else "bound"

    def begin(self, total_steps: int) -> None:
        """See `Task.begin`."""
        length = self.objective.alignment.pretrain
        if self.aligns:
            self.pretrain_steps = length if isinstance(length, int) else round(length * total_steps)

    @property
    def modalities(self) -> Mapping[str, Modality]:
        """Modalities of the model."""
        return self.model.modalities

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Encoders and decoders."""
        return (*self.model.encoders.values(), *self.model.decoders.values())

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Precision of the model's networks."""
        return self.model.autocast_dtype

    @autocast_dtype.setter
    def autocast_dtype(self, dtype: torch.dtype | None) -> None:
        self.model.autocast_dtype = dtype

    def draw_noise(self, generators: Sequence[torch.Generator], seed: int) -> LatentNoise:
        """Noise of one step.

        Args:
            generators: one per sample.
            seed: of the choice that all samples share, the same on all ranks.
        """
        num_modalities, config = len(self.model.modality_names), self.model.config
        shape = (len(generators), num_modalities, self.objective.num_samples)
        draw, device = self.model.family.draw_noise, generators[0].device
        shared = draw((*shape, config.shared_dim), device, generators)
        private = draw((shape[0], num_modalities, *shape[1:], config.private_dim), device, generators)
        return LatentNoise(shared.movedim(0, 2), private.movedim(0, 3), self._draw_cross_shifts(seed))

    def _draw_cross_shifts(self, seed: int) -> tuple[int, ...]:
        num_modalities, cross_sources = len(self.model.modality_names), self.objective.cross_sources
        if cross_sources == "all" or not self.training:
            return tuple(range(1, num_modalities))
        shifts = np.random.default_rng(seed).permutation(num_modalities - 1)[:cross_sources]
        return tuple((1 + shifts).tolist())

    def forward(self, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Negative bound of a batch, and its terms.

        Args:
            batch: by modality data (B, *shape), `mask` (B, M), false where a sample lacks a modality, and
                `valid` (B,), false where a sample only pads the batch; where the data has groups `group` (B,)
                int64, on all ranks or on none, for the contrast. What a sample lacks is neither source
                nor target; its place in the batch goes through the networks all the same, so that all ranks
                call every module.

        Returns:
            The loss, a mean over valid samples in nats, and a report: by name (B,) per sample the terms of
            the bound (means over sources and samples; likelihoods before their weights), then the bound. In
            evaluation mode also `log_weights` (B, C), `log_density` (B, M, C) of the clusters and
            `shared_loc` (B, M, D_z), at the locations of the posteriors, and `present` (B, M).
        """
        mask = batch["mask"]
        inputs = {name: batch[name] for name in self.model.modality_names}
        if self.training:
            for place, (name, x) in enumerate(inputs.items()):
                if self.model.modalities[name].optional:
                    inputs[name] = fill_missing(x, mask[:, place])
        # A sample may have modalities, but none of this model's: it counts for nothing, and must stay finite.
        counted = mask.any(1)
        valid = batch["valid"] & counted
        present = (mask | ~counted[:, None]).T  # (M, B)
        generators = sample_generators(batch["_seed"], batch["_place"], valid.device)
        # A precision that a launcher enabled around this call is for networks, not for densities.
        with torch.autocast(valid.device.type, enabled=False):
            if self.training and self.pretraining:
                alignment = self._contrast(
                    inputs, None, mask & valid[:, None], batch.get("group"), generators
                )
                return _mean(alignment, valid), {"alignment": alignment.detach()}
            posteriors = self.model.encode(inputs)
            noise = self.draw_noise(generators, batch["_seed"])
            bound, report = self._bound(inputs, posteriors, present, noise)
            if not self.training:
                report |= {**self._cluster_report(posteriors), "present": mask}
            loss = -bound
            if self.aligns:
                alignment = self._contrast(
                    inputs, posteriors, mask & valid[:, None], batch.get("group"), generators
                )
                loss = loss + self.objective.alignment.weight * alignment
                report["alignment"] = alignment.detach()
        return _mean(loss, valid), report

    def _contrast(
        self,
        inputs: Mapping[str, Tensor],
        posteriors: Mapping[str, Posterior] | None,
        mask: Tensor,
        groups: Tensor | None,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """`cmvae.models.alignment.contrast` of a batch, (B,); in training among the samples of all ranks.

        Args:
            inputs: by modality data (B, *shape).
            posteriors: of `inputs`, if they are known; what is augmented is encoded again.
            mask: (B, M) bool, what counts.
            groups: (B,) int64, −1 for none; None where the data has no groups.
            generators: one per sample, for the augmentation.
        """
        settings, prior = self.objective.alignment, self.model.cluster_prior
        changed = settings.augment if self.training else {}
        known = {} if posteriors is None else {name: q.shared.loc for name, q in posteriors.items()}
        again = {
            name: augment(x, changed[name], generators) if name in changed else x
            for name, x in inputs.items()
            if name in changed or name not in known
        }
        locations = known | self.model.encode_shared(again)
        anchors = torch.stack([locations[name] for name in self.model.modality_names])
        present = mask.T
        candidates, candidate_present, first = anchors, present, 0
        if self.training:
            candidates = gather_with_gradient(anchors, dim=1)
            candidate_present = gather(present.float(), dim=1) > 0
            groups = None if groups is None else gather(groups, dim=0)
            first = len(mask) * rank_of_process()
        places = first + torch.arange(len(mask), device=mask.device)
        # Two encodings of one sample differ as two samples of its cluster do.
        variance = 2 * settings.temperature * self.model.family.variance_of(prior.scale)
        return contrast(anchors, present, candidates, candidate_present, places, variance, groups=groups)

    def _bound(
        self,
        inputs: Mapping[str, Tensor],
        posteriors: Mapping[str, Posterior],
        present: Tensor,
        noise: LatentNoise,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        sources = list(posteriors.values())
        shared = torch.stack([source.shared.sample(noise.shared[m]) for m, source in enumerate(sources)])
        private = torch.stack(
            [source.private.sample(noise.private[m, m]) for m, source in enumerate(sources)]
        )
        # DReG cuts the posteriors out of the denominators; the gradient comes back through the samples.
        cut = self.objective.name == "dreg"
        shared_posteriors = [source.shared.detach() if cut else source.shared for source in sources]
        private_posteriors = [source.private.detach() if cut else source.private for source in sources]

        terms = LogWeightTerms(
            log_likelihood={
                name: torch.where(
                    present[n], self._log_likelihood(n, inputs[name], shared, private, noise), 0
                )
                for n, name in enumerate(self.model.modality_names)
            },
            log_prior_shared=cluster_log_prob(*self.model.cluster_prior(shared)),
            log_prior_private=self.model.private_prior.log_prob(private),
            log_posterior_shared=mixture_log_prob(shared_posteriors, shared, present),
            log_posterior_private=torch.stack(
                [posterior.log_prob(private[m]) for m, posterior in enumerate(private_posteriors)]
            ),
        )
        modalities = self.model.config.modalities
        weights = {name: modality.likelihood.weight for name, modality in modalities.items()}
        log_w = log_weights(terms, weights, self.objective.beta)
        bound = dreg(log_w, [shared, private], present) if cut else iwae(log_w, present)
        return bound, {**_per_sample(terms, present), "bound": bound.detach()}

    def _log_likelihood(
        self, target: int, x: Tensor, shared: Tensor, private: Tensor, noise: LatentNoise
    ) -> Tensor:
        """Log p(x_n | z, w_n) of one target from every source, (M, K, B), decoded in one call.

        Of cross sources that were drawn from all, each counts for as many more; where nothing was decoded
        it is zero. Sums over the sources keep their expectation.
        """
        name, num_modalities = self.model.modality_names[target], len(private)
        cross = [(target + shift) % num_modalities for shift in noise.cross_shifts]
        sources = [target, *cross]
        privates = [private[target]]
        if cross:
            auxiliary = self.model.auxiliary_prior(name)
            privates += [auxiliary.sample(noise.private[target, source]) for source in cross]
        # Stacked one by one, as a GPU would wait for a list of indices from Python.
        latents = torch.stack([shared[source] for source in sources]), torch.stack(privates)
        decoded = dict(zip(sources, self._decode_in_parts(name, x, *latents), strict=True))
        for source in cross:
            decoded[source] = decoded[source] * ((num_modalities - 1) / len(cross))
        nothing = torch.zeros_like(decoded[target])
        return torch.stack([decoded.get(source, nothing) for source in range(num_modalities)])

    def _decode(self, name: str, x: Tensor, shared: Tensor, private: Tensor) -> Tensor:
        """Log p(x | z, w) of x (B, ...) under latents (..., B, D): (..., B)."""
        parameters = self.model.decode_parameters(shared, {name: private})[name]
        scale = self.model.config.modalities[name].likelihood.scale
        return data_log_prob(self.model.likelihoods[name], scale, x, parameters)

    def _decode_in_parts(self, name: str, x: Tensor, shared: Tensor, private: Tensor) -> Tensor:
        """Like `_decode`, with gradient checkpointing above `decoder_checkpoint_above` latents."""
        lead, part = shared.shape[:-1], self.objective.decoder_checkpoint_above
        total = lead.numel()
        if part is None or part >= total or has_batch_norm(self.model.decoders[name]):
            return self._decode(name, x, shared, private)
        shared, private = shared.flatten(0, -2), private.flatten(0, -2)

        def decode(rows: slice) -> Tensor:
            members = torch.arange(rows.start, rows.stop, device=x.device) % len(x)
            return self._decode(name, x[members], shared[rows], private[rows])

        # Last in, first out: the backward pass frees the kept maps before it recomputes others.
        kept = total - part
        again = [slice(first, min(first + part, kept)) for first in range(0, kept, part)]
        # Decoders draw no random numbers.
        decoded = [checkpoint(decode, rows, use_reentrant=False, preserve_rng_state=False) for rows in again]
        return torch.cat([*decoded, decode(slice(kept, total))]).view(lead)

    def _cluster_report(self, posteriors: Mapping[str, Posterior]) -> dict[str, Tensor]:
        shared_loc = stack_shared_locations(posteriors)
        log_cluster_weights, log_density = self.model.cluster_prior(shared_loc)
        return {
            "log_weights": log_cluster_weights.expand(len(shared_loc), -1),
            "log_density": log_density,
            "shared_loc": shared_loc,
        }

    def reinitialize(
        self, step: int, train_batches: Callable[[int], Iterable[Mapping[str, Any]]]
    ) -> Mapping[nn.Parameter, Tensor]:
        """New cluster means and uniform weights at the steps of the objective and after pretraining.

        The means are found among the posterior locations of every modality on its own, as the clusters see
        them.
        """
        self.pretraining = step < self.pretrain_steps
        if step not in self.objective.refit_clusters_at and (step != self.pretrain_steps or step == 0):
            return {}
        self.eval()
        split = encode_split(self.model, train_batches(REFIT_SAMPLES))
        self.train()
        prior = self.model.cluster_prior
        num_clusters = self.model.config.num_clusters
        means = find_cluster_means(split.shared_loc, split.present, num_clusters)
        device = self.model.private_scale.device
        return {
            prior.means: torch.from_numpy(means).to(device),
            prior.logits: torch.zeros(num_clusters, device=device),
        }

    def validation_metrics(self, records: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Means of the report, cluster occupancy, and agreement with the labels where there are any.

        Args:
            records: the report over the validation split, (N, ...) each, and `label` (N,), −1 for none.
        """
        metrics = {name: float(values.mean()) for name, values in records.items() if name in self.term_names}
        log_cluster_weights = records["log_weights"][0]
        active = np.ones_like(log_cluster_weights, dtype=bool)
        assignments = vote(
            responsibilities(records["log_density"], log_cluster_weights, active), records["present"]
        )
        occupancy = np.bincount(assignments, minlength=len(active)) / len(assignments)
        # Perplexity counts clusters as if all were equally full: it falls before a cluster is quite empty.
        metrics["clusters/occupied"] = float((occupancy > 0).sum())
        metrics["clusters/perplexity"] = float(np.exp(entr(occupancy).sum()))
        metrics["clusters/largest_share"] = float(occupancy.max())
        labelled = records["label"] >= 0
        if labelled.any():
            agreement = clustering_metrics(assignments[labelled], records["label"][labelled])
            metrics |= {f"clustering/{name}": value for name, value in agreement.items()}
        return metrics

    @property
    def term_names(self) -> tuple[str, ...]:
        """Names in the report that are terms of the objective, (B,) each."""
        likelihoods = [f"log_likelihood/{name}" for name in self.model.modality_names]
        terms = ("bound", *likelihoods, "log_prior/z", "log_prior/w", "log_posterior/z", "log_posterior/w")
        return (*terms, "alignment") if self.aligns else terms

    def export(
        self,
        folder: Path,
        state: Mapping[str, Tensor],
        batches: Callable[[SplitName, int | None], Iterable[Mapping[str, Any]]],
    ) -> None:
        """Find the clusters and write the model as an export; called on rank 0 alone.

        They are found by a whole model in fp32, as everything that starts from the export will see it,
        whatever precision and distribution the training had.

        Args:
            folder: where to.
            state: the whole state of this task, gathered if it was spread over ranks.
            batches: reads the first N samples of a split, or with None all of it.
        """
        model = CMVAE(self.model.config, self.model.modalities)
        model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
        model.to(self.model.private_scale.device).eval()
        train, validation = (
            encode_split(model, part)
            for part in (batches("train", CLUSTER_SAMPLES), batches("validation", None))
        )
        hierarchy, record = find_clusters(model, train, validation, self.objective.beta, self.clusters)
        model.cluster_prior.take(hierarchy, record.num_clusters)
        model.save_pretrained(folder, (hierarchy, record))

    def show(self, batch: Mapping[str, Any], num_samples: int, generator: torch.Generator) -> Preview:
        """Inputs, reconstructions and cross-modal generations of the first samples of a batch."""
        # matplotlib is imported when something is drawn.
        from cmvae.visualize.previews import generate_cross_modal

        inputs = {name: batch[name][:num_samples] for name in self.model.modality_names}
        mask = batch["mask"][:num_samples]
        made = generate_cross_modal(self.model, inputs, mask, generator)
        return Preview({"cross_modal": made.draw}, {"cross_modal": made.write})


def _mean(values: Tensor, valid: Tensor) -> Tensor:
    """Over the valid samples of a batch; (B,) both."""
    return (values * valid).sum() / valid.sum().clamp(min=1)


def _per_sample(terms: LogWeightTerms, present: Tensor) -> dict[str, Tensor]:
    """Every term as (B,), averaged over samples and the sources that are `present` (M, B)."""
    named = {f"log_likelihood/{name}": term for name, term in terms.log_likelihood.items()}
    named |= {
        "log_prior/z": terms.log_prior_shared,
        "log_prior/w": terms.log_prior_private,
        "log_posterior/z": terms.log_posterior_shared,
        "log_posterior/w": terms.log_posterior_private,
    }
    return {name: mean_over_sources(term.detach().mean(1), present) for name, term in named.items()}
