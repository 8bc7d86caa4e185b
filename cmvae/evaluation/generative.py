"""What a model generates, read once for coherence, Fréchet distances, and precision and recall.

The protocol. Conditional, for every sample of the split and every source: z ~ q(z|x_source), w ~ p(w) for
every target, also where the target is the source; of several sources each sample's z comes from one of them,
drawn uniformly, which is the mixture that is the joint posterior. Unconditional: c ~ π over the selected
clusters, z ~ p(z|c), w ~ p(w). Images are the decoders' means. Every sample has its own noise, so that no
figure depends on the size of the batches or the number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from einops import rearrange
from torch import Tensor, nn
from tqdm import tqdm

from cmvae.clustering import FloatArray
from cmvae.errors import UserError
from cmvae.evaluation import figures
from cmvae.evaluation.classifiers import ImageClassifier, load_classifiers
from cmvae.evaluation.coherence import (
    Sources,
    coherence_matrix,
    conditional_coherence,
    unconditional_coherence,
)
from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.fidelity import NUM_NEIGHBOURS, fidelity
from cmvae.evaluation.frechet import (
    INCEPTION_FEATURES,
    FrechetDistance,
    load_inception,
    refusal,
    to_bytes,
    warn_if_few,
)
from cmvae.evaluation.result import REFINED, GroupResult
from cmvae.model import Latents
from cmvae.progress import progress_bar

Loaded = TypeVar("Loaded")
Reader = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]

_DISTANCE_NAMES = {"classifier": "frechet/classifier", "inception": "fid"}
"""Feature space to the name of the Fréchet distance in it."""


@dataclass(frozen=True)
class Networks:
    """What reads images: classifiers by modality, and Inception-v3; empty or None where there are none."""

    classifiers: Mapping[str, ImageClassifier]
    inception: nn.Module | None

    def classify(self, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`class/MODALITY` (B,) int64 and `finite/MODALITY` (B,) bool of images (B, C, H, W) by modality."""
        readings = {}
        for name, x in images.items():
            readings[f"finite/{name}"] = _is_finite(x)
            readings[f"class/{name}"], _ = self.classifiers[name].read(x)
        return readings

    def read(self, images: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Also `classifier/…` (B, 32) and `inception/…` (B, 2048); all as far as there are networks."""
        readings = {}
        for name, x in images.items():
            readings[f"finite/{name}"] = _is_finite(x)
            if self.classifiers:
                readings[f"class/{name}"], readings[f"classifier/{name}"] = self.classifiers[name].read(x)
            if self.inception is not None:
                readings[f"inception/{name}"] = self.inception(to_bytes(x))
        return readings


def evaluate_generative(context: EvaluationContext, wanted: Collection[str]) -> GroupResult:
    """Coherence, Fréchet distances, and precision and recall of a model, from one pass of generations.

    Args:
        context: model, data and settings.
        wanted: of `coherence`, `frechet` and `fidelity`.

    Returns:
        `coherence/{conditional,unconditional}`, `coherence/matrix/SOURCE/TARGET`,
        `coherence/conditional_by_sources/S`; `frechet/classifier/KIND`, `fid/KIND` and
        `fidelity/classifier/{precision,recall,density,coverage}/KIND`, where KIND is `unconditional` (mean
        over modalities), `conditional` (over all pairs, self included) or `conditional_cross` (without self).
        What cannot be had is left out with its reason. With a refiner all of it again below `refined/`, but
        for generations from several sources.

    Raises:
        UserError: a shard is damaged, or the model generates values that are not finite.
    """
    networks, left_out = _load_networks(context, wanted)
    result = GroupResult(left_out=left_out)
    if not networks.classifiers and networks.inception is None:
        return result
    reference = read_reference(context, networks, wanted)
    result.left_out |= reference.left_out
    result.protocol |= _describe(context, networks, reference.num_samples)
    result.add(measure_generations(context, reference))
    return result


@dataclass(frozen=True)
class Reference:
    """The real images of a split as networks read them; generations from them are compared with them."""

    networks: Networks
    readings: Mapping[str, np.ndarray]
    """`label` (N,), `loc/…` and `scale/…` (N, D_z) of q(z|x_m), and the readings of the images."""
    comparisons: Sequence[_Comparison]
    coherent: bool
    """Whether coherence is wanted and can be had."""
    left_out: Mapping[str, str]
    """As of `GroupResult`."""

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.readings["label"])


def read_reference(
    context: EvaluationContext,
    networks: Networks,
    wanted: Collection[str],
    num_samples: int | None = None,
) -> Reference:
    """Read a split once, for any number of measurements of what is generated from it.

    Args:
        context: model, data and settings.
        networks: what reads images.
        wanted: of `coherence`, `frechet` and `fidelity`.
        num_samples: only the first so many samples of the split; None is all.

    Raises:
        UserError: a shard is damaged.
    """
    real = _read_split(context, networks, context.settings.split, num_samples)
    comparisons, left_out = _compare_with(context, real, networks, wanted)
    coherent = "coherence" in wanted and bool(networks.classifiers)
    if coherent and len(context.model.modality_names) < 2:
        coherent = False
        left_out["coherence"] = "takes at least two modalities"
    return Reference(networks, real, comparisons, coherent, left_out)


def measure_floor(context: EvaluationContext, reference: Reference, split: str) -> dict[str, float]:
    """The distances of other real images, by the names that distances of generations have.

    So far apart are two sets of real images: of equally many generations less cannot be asked.

    Args:
        context: model, data and settings.
        reference: what they are compared with.
        split: where the others come from, its first samples, as many as the reference has if there are.

    Raises:
        UserError: the data has no such split, or one too small, or a shard is damaged.
    """
    readings = _read_split(context, reference.networks, split, reference.num_samples)
    for comparison in reference.comparisons:
        num_samples, num_features = readings[f"{comparison.space}/{context.model.modality_names[0]}"].shape
        reason = refusal(num_samples, num_features)
        if reason is not None:
            raise UserError(f"{context.shards}: split {split}: {reason}")
    tally = _Tally(reference.comparisons)
    tally.add_real(readings)
    return tally.distances()


def measure_generations(
    context: EvaluationContext, reference: Reference, *, several_sources: bool = True
) -> GroupResult:
    """One pass of generations, as they are and, with a refiner, refined.

    Args:
        context: model, settings and perhaps a refiner.
        reference: what is generated from and compared with.
        several_sources: also generate from several sources, of which only coherence knows.

    Returns:
        Metrics and figures, as of `evaluate_generative`.

    Raises:
        UserError: the model generates values that are not finite.
    """
    result = GroupResult()
    comparisons, coherent = reference.comparisons, reference.coherent
    if not comparisons and not coherent:
        return result
    networks, real = reference.networks, reference.readings
    names = context.model.modality_names
    # Generations as they are, and refined.
    tallies = {"": _Tally(comparisons)}
    if context.refiner is not None:
        tallies[REFINED] = _Tally(comparisons)
    read = networks.read if comparisons else networks.classify
    source_sets = _source_sets(names, len(names) - 1 if coherent and several_sources else 1)
    with progress_bar(
        total=context.settings.num_generated + len(source_sets) * reference.num_samples,
        desc="generate",
        unit=" samples",
        disable=not context.accelerator.is_main_process,
        leave=False,
    ) as progress:
        generator = _Generator(context, progress)
        readings = generator.unconditional(read)
        for version, tally in tallies.items():
            tally.add_unconditional(_of_version(readings, version))
        for sources in source_sets:
            single = len(sources) == 1
            targets = names if single else [name for name in names if name not in sources]
            # Several sources are for coherence only, and their number grows fast: they are not refined.
            readings = generator.conditional(
                real, sources, targets, read if single else networks.classify, refine=single
            )
            for version, tally in tallies.items():
                if single or version != REFINED:
                    tally.add_conditional(_of_version(readings, version), sources)

    for version, tally in tallies.items():
        result.metrics |= {f"{version}{name}": value for name, value in tally.distances().items()}
        if coherent:
            metrics = tally.coherence(real["label"])
            result.metrics |= {f"{version}{name}": value for name, value in metrics.items()}
            matrix = figures.coherence_matrix(coherence_matrix(metrics, names), names)
            result.figures[f"{version.replace('/', '_')}coherence_matrix"] = matrix
    return result


class _Tally:
    """What comes of one version of the generations: as they are, or refined."""

    def __init__(self, comparisons: Sequence[_Comparison]) -> None:
        self._comparisons = comparisons
        self._compared: dict[str, list[float]] = {}
        self._classes: dict[Sources, dict[str, np.ndarray]] = {}
        self._joint: dict[str, np.ndarray] = {}

    def add_unconditional(self, readings: Mapping[str, np.ndarray]) -> None:
        """Take in the readings of joint generations."""
        _check_finite(readings, "unconditionally")
        for comparison in self._comparisons:
            comparison.add(readings, ("unconditional",), self._compared)
        self._joint = _classes(readings)

    def add_real(self, readings: Mapping[str, np.ndarray]) -> None:
        """Take in the readings of real images, for the distances of every kind of generations."""
        for comparison in self._comparisons:
            comparison.add(readings, ("unconditional",), self._compared)
            comparison.add(readings, ("conditional", "conditional_cross"), self._compared)

    def add_conditional(self, readings: Mapping[str, np.ndarray], sources: Sources) -> None:
        """Take in the readings of what was generated from some modalities."""
        _check_finite(readings, f"from {', '.join(sources)}")
        if len(sources) == 1:
            for comparison in self._comparisons:
                comparison.add_conditional(readings, sources[0], self._compared)
        self._classes[sources] = _classes(readings)

    def distances(self) -> dict[str, float]:
        """Every comparison's mean."""
        return {name: float(np.mean(values)) for name, values in self._compared.items()}

    def coherence(self, labels: np.ndarray) -> dict[str, float]:
        """Every kind of coherence."""
        metrics = conditional_coherence(self._classes, labels)
        metrics["coherence/unconditional"] = unconditional_coherence(self._joint)
        return metrics


class _Comparison:
    """Generated with real images in one feature space.

    Args:
        space: `classifier` or `inception`.
        real: `SPACE/MODALITY` to features (N, F).
        distances: kinds of generations whose Fréchet distance is wanted.
        fidelities: whether precision, recall, density and coverage are.
    """

    def __init__(
        self, space: str, real: Mapping[str, FloatArray], distances: Sequence[str], fidelities: Sequence[str]
    ) -> None:
        self.space = space
        self.distances, self.fidelities = distances, fidelities
        features = {key: values for key, values in real.items() if key.startswith(f"{space}/")}
        self._references = {key: FrechetDistance(values) for key, values in features.items() if distances}
        self._real = features if fidelities else {}

    def add_conditional(
        self, generated: Mapping[str, np.ndarray], source: str, compared: dict[str, list[float]]
    ) -> None:
        """Compare what was generated from one source, self and cross."""
        own = f"{self.space}/{source}"
        self.add({own: generated[own]}, ("conditional",), compared)
        others = {key: values for key, values in generated.items() if key != own}
        self.add(others, ("conditional", "conditional_cross"), compared)

    def add(
        self, generated: Mapping[str, np.ndarray], kinds: Sequence[str], compared: dict[str, list[float]]
    ) -> None:
        """Append to `compared`, by metric, the values of every modality's generations (N', F)."""
        for key, features in generated.items():
            if not key.startswith(f"{self.space}/"):
                continue
            if kinds[0] in self.distances:
                distance = self._references[key].to(features)
                for kind in kinds:
                    compared.setdefault(f"{_DISTANCE_NAMES[self.space]}/{kind}", []).append(distance)
            if kinds[0] in self.fidelities:
                # The four depend on the sizes of both sets, hence equal ones.
                size = min(len(features), len(self._real[key]))
                for name, value in fidelity(self._real[key][:size], features[:size]).items():
                    for kind in kinds:
                        compared.setdefault(f"fidelity/{self.space}/{name}/{kind}", []).append(value)


def _compare_with(
    context: EvaluationContext,
    real: Mapping[str, np.ndarray],
    networks: Networks,
    wanted: Collection[str],
) -> tuple[list[_Comparison], dict[str, str]]:
    """The comparisons that there are networks and samples enough for; the others with the reason."""
    left_out: dict[str, str] = {}
    num_real = len(real["label"])
    num_samples = {
        "unconditional": min(num_real, context.settings.num_generated),
        "conditional": num_real,
    }
    comparisons = []
    for space, there in (
        ("classifier", bool(networks.classifiers)),
        ("inception", networks.inception is not None),
    ):
        if not there:
            continue
        num_features = real[f"{space}/{context.model.modality_names[0]}"].shape[1]
        distances, fidelities = [], []
        for kind, size in num_samples.items():
            name = f"{_DISTANCE_NAMES[space]}/{kind}"
            if "frechet" in wanted:
                reason = refusal(size, num_features)
                if reason is not None:
                    left_out[name] = reason
                else:
                    distances.append(kind)
                    if context.accelerator.is_main_process:
                        warn_if_few(name, size, num_features)
            if "fidelity" in wanted and space == "classifier":
                if size <= NUM_NEIGHBOURS:
                    left_out[f"fidelity/{space}/{kind}"] = (
                        f"{size} samples, and each is asked for its {NUM_NEIGHBOURS}th nearest neighbour"
                    )
                else:
                    fidelities.append(kind)
        if distances or fidelities:
            comparisons.append(_Comparison(space, real, distances, fidelities))
    return comparisons, left_out


def _load_networks(context: EvaluationContext, wanted: Collection[str]) -> tuple[Networks, dict[str, str]]:
    """The networks that the wanted metrics take, and the metrics that must do without, with the reason."""
    left_out: dict[str, str] = {}
    classifiers, reason = _on_all_ranks(
        context,
        lambda: load_classifiers(context.shards, context.index, context.model.modality_names, context.device),
    )
    if reason is not None:
        taken = {"coherence": "coherence", "frechet": "frechet/classifier", "fidelity": "fidelity/classifier"}
        left_out |= {taken[group]: reason for group in sorted(wanted)}
    inception = None
    if "frechet" in wanted:
        # Asked first: with too few images nothing needs to be fetched over a network.
        num_real = context.index.split(context.settings.split, context.shards).num_samples
        reason = refusal(num_real, INCEPTION_FEATURES)
        if reason is None:
            inception, reason = _on_all_ranks(
                context, lambda: load_inception(context.settings.inception_weights, context.device)
            )
        if reason is not None:
            left_out["fid"] = reason
    return Networks(classifiers or {}, inception), left_out


def _on_all_ranks(context: EvaluationContext, load: Callable[[], Loaded]) -> tuple[Loaded | None, str | None]:
    """What `load` returns if it does on every rank, else the first rank's reason: all go the same way.

    The first rank goes first, so that what is fetched from a network is fetched once.
    """
    loaded, reason = None, None
    with context.accelerator.main_process_first():
        try:
            loaded = load()
        except UserError as error:
            reason = str(error)
    reasons = [reason for reason in gather_object([reason]) if reason is not None]
    return (None, reasons[0]) if reasons else (loaded, None)


def _read_split(
    context: EvaluationContext, networks: Networks, split: str | None = None, num_samples: int | None = None
) -> dict[str, np.ndarray]:
    """The readings of a `Reference`, of the settings' split unless another one is given."""
    names = context.model.modality_names

    def compute(batch: Mapping[str, Any]) -> dict[str, Tensor]:
        images = {name: batch[name] for name in names}
        encoded = {"label": batch["label"]}
        for name, posterior in context.model.encode(images).items():
            encoded[f"loc/{name}"], encoded[f"scale/{name}"] = posterior.shared.loc, posterior.shared.scale
        return encoded | networks.read(images)

    return context.collect(context.batches(split or context.settings.split, num_samples), compute)


class _Generator:
    """Generates on all ranks and reads what it made, as it is and refined."""

    def __init__(self, context: EvaluationContext, progress: tqdm) -> None:
        self._context, self._progress = context, progress

    def conditional(
        self,
        split: Mapping[str, np.ndarray],
        sources: Sources,
        targets: Sequence[str],
        read: Reader,
        refine: bool,
    ) -> dict[str, np.ndarray]:
        """Readings of what is generated from every sample of the split, from the mixture of the sources."""
        context = self._context
        stream = f"conditional/{'+'.join(sources)}"
        loc, scale = (
            torch.from_numpy(np.stack([split[f"{part}/{source}"] for source in sources], axis=1))
            for part in ("loc", "scale")
        )  # (N, S, D_z)

        def compute(batch: Mapping[str, Any]) -> dict[str, Tensor]:
            rows = batch["position"].cpu()
            component = (context.draw_uniform(f"{stream}/source", rows) * len(sources)).long()
            shared_noise, private = _draw_latents(context, stream, rows)
            posterior = context.model.family(
                loc[rows, component].to(context.device), scale[rows, component].to(context.device)
            )
            latents = Latents(posterior.sample(shared_noise), {name: private[name] for name in targets})
            return self._read(latents, stream, rows, read, refine)

        return self._collect(len(split["label"]), compute)

    def unconditional(self, read: Reader) -> dict[str, np.ndarray]:
        """Readings of `num_generated` joint generations."""
        context = self._context
        prior = context.model.cluster_prior
        cumulative = prior.log_weights.double().exp().cpu().cumsum(0)
        cumulative /= cumulative[-1].clone()

        def compute(batch: Mapping[str, Any]) -> dict[str, Tensor]:
            rows = batch["position"].cpu()
            uniform = context.draw_uniform("unconditional/cluster", rows)
            clusters = torch.searchsorted(cumulative, uniform, right=True).to(context.device)
            shared_noise, private = _draw_latents(context, "unconditional", rows)
            latents = Latents(prior.sample(clusters, shared_noise), private)
            return self._read(latents, "unconditional", rows, read, refine=True)

        return self._collect(context.settings.num_generated, compute)

    def _read(
        self, latents: Latents, stream: str, positions: Tensor, read: Reader, refine: bool
    ) -> dict[str, Tensor]:
        context = self._context
        images = context.model.decode(latents.shared, latents.private)
        readings = read(images)
        if refine and context.refiner is not None:
            seeds = context.draw_seeds(f"{stream}/refine", positions)
            refined = context.refiner.refine(images, latents.shared, seeds=seeds)
            readings |= {f"{REFINED}{key}": value for key, value in read(refined).items()}
        return readings

    def _collect(
        self, num_samples: int, compute: Callable[[Mapping[str, Any]], Mapping[str, Tensor]]
    ) -> dict[str, np.ndarray]:
        def count(batch: Mapping[str, Any]) -> Mapping[str, Tensor]:
            computed = compute(batch)
            # All ranks have equally much to do.
            self._progress.update(int(batch["valid"].sum()) * self._context.accelerator.num_processes)
            return computed

        return self._context.collect(self._context.positions(num_samples), count)


def _of_version(readings: Mapping[str, np.ndarray], version: str) -> dict[str, np.ndarray]:
    """The readings of one version of the generations, their names without it."""
    refined = {key: values for key, values in readings.items() if key.startswith(REFINED)}
    if version == REFINED:
        return {key.removeprefix(REFINED): values for key, values in refined.items()}
    return {key: values for key, values in readings.items() if key not in refined}


def _classes(readings: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Classes (N,) by modality, as far as there are classifiers."""
    return {key.removeprefix("class/"): x for key, x in readings.items() if key.startswith("class/")}


def _draw_latents(
    context: EvaluationContext, stream: str, positions: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Noise of z (B, D_z), and w ~ p(w) (B, D_w) of every modality."""
    model = context.model
    names, config = model.modality_names, model.config
    size = config.shared_dim + len(names) * config.private_dim
    # One draw a sample: most of its cost is in seeding.
    noise = context.draw_noise(f"{stream}/latents", positions, (size,))
    shared, private = noise.split([config.shared_dim, size - config.shared_dim], dim=1)
    w = model.private_prior.sample(rearrange(private, "b (m d) -> m b d", m=len(names)))
    return shared, dict(zip(names, w, strict=True))


def _source_sets(modalities: Sequence[str], largest: int) -> list[Sources]:
    """All sets of one to `largest` modalities, but one at least."""
    sizes = range(1, max(1, largest) + 1)
    return [sources for size in sizes for sources in combinations(modalities, size)]


def _describe(context: EvaluationContext, networks: Networks, num_real: int) -> dict[str, Any]:
    """The protocol, in parameters."""
    settings = context.settings
    described: dict[str, Any] = {
        "generative.seed": settings.seed,
        "generative.split": settings.split,
        "generative.num_samples": num_real,
        "generative.num_generated": settings.num_generated,
        "generative.shared_latent": "sampled from q(z|x) of the source, or from p(z|c), c from p(c)",
        "generative.private_latent": "sampled from p(w), also where the target is the source",
        "generative.image": "mean of the decoder",
        "fidelity.neighbours": NUM_NEIGHBOURS,
        "fidelity.num_samples.unconditional": min(num_real, settings.num_generated),
    }
    if context.refiner is not None:
        sampler = context.refiner.config.sampler
        described |= {f"refined.sampler.{key}": value for key, value in sampler.model_dump().items()}
        described["refined.seed"] = settings.seed
    for name in networks.classifiers:
        described[f"classifier.accuracy.{name}"] = context.index.classifiers[name].accuracy
    return described


def _is_finite(images: Tensor) -> Tensor:
    return images.isfinite().flatten(1).all(dim=1)


def _check_finite(readings: Mapping[str, np.ndarray], how: str) -> None:
    """Refuse what is no image: the argmax of NaN would be a class like any other."""
    for key, values in readings.items():
        kind, modality = key.split("/")
        if kind == "finite" and not values.all():
            raise UserError(
                f"{np.sum(~values)} of the {len(values)} images of {modality} that the model generates {how} "
                "hold values that are not finite, so its training diverged. Train again with a smaller "
                "optimizer.learning_rate"
            )
