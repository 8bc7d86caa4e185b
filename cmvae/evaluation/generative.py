"""Metrics of what a model generates: coherence, Fréchet distances, precision and recall, from one pass.

`cmvae.evaluation.sampling` generates the samples, `cmvae.evaluation.feature_networks` classifies them and
extracts their features. Coherence takes the classes of images and texts; distances take features of images. A
modality without a network is a source only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor

from cmvae.clustering import FloatArray
from cmvae.evaluation.coherence import (
    Sources,
    coherence_matrix,
    conditional_coherence,
    unconditional_coherence,
)
from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.feature_networks import FeatureNetworks, load_feature_networks
from cmvae.evaluation.fidelity import NUM_NEIGHBOURS, fidelity
from cmvae.evaluation.frechet import FrechetDistance, refusal, warn_if_few
from cmvae.evaluation.report import REFINED, RELEASED, GroupResult
from cmvae.evaluation.sampling import SampleGenerator, encode_sources, samples_with
from cmvae.utils.errors import UserError
from cmvae.utils.progress import progress_bar
from cmvae.visualize import plots

_DISTANCE_NAMES = {"classifier": "frechet/classifier", "inception": "fid"}
"""Feature space → name of the Fréchet distance in it."""


def evaluate_generative(context: EvaluationContext, wanted: Collection[str]) -> GroupResult:
    """Compute coherence, Fréchet distances, and precision and recall from one pass of generated samples.

    Args:
        context: model, data and settings.
        wanted: some of `coherence`, `frechet` and `fidelity`.

    Returns:
        `coherence/{conditional,unconditional}`, `coherence/matrix/SOURCE/TARGET`,
        `coherence/conditional_by_sources/S`; `frechet/classifier/KIND`, `fid/KIND` and
        `fidelity/classifier/{precision,recall,density,coverage}/KIND`, where KIND is `unconditional` (mean
        over modalities), `conditional` (mean over all pairs, self included) or `conditional_cross` (without
        self). Metrics that are not available are left out with the reason. With a refiner, the same metrics
        after refinement are named `refined/…`, except those from several sources.

    Raises:
        UserError: a shard is damaged, or the model generates values that are not finite.
    """
    networks, left_out = load_feature_networks(context, wanted)
    result = GroupResult(left_out=left_out)
    if not networks.classified and networks.inception is None:
        return result
    reference = read_reference(context, networks, wanted, context.settings.num_conditional)
    result.left_out |= reference.left_out
    result.protocol |= _describe(context, reference)
    result.add(measure_generated(context, reference))
    return result


@dataclass(frozen=True)
class Reference:
    """A split of real samples, encoded and with features, which generated samples are compared with."""

    networks: FeatureNetworks
    """The networks of the features."""
    extracted: Mapping[str, np.ndarray]
    """`label` (N,), and what `encode_sources` and `FeatureNetworks.extract_features` return. Where
    `has/MODALITY` is False, the other values of the modality are meaningless."""
    comparisons: Sequence[_Comparison]
    """One per feature space."""
    coherent: bool
    """Whether coherence is requested and available."""
    left_out: Mapping[str, str]
    """See `GroupResult.left_out`."""

    @property
    def sources(self) -> Sources:
        """Modalities that at least one sample has."""
        return _sources(self.extracted)

    @property
    def num_samples(self) -> int:
        """N."""
        return len(self.extracted["label"])


def read_reference(
    context: EvaluationContext,
    networks: FeatureNetworks,
    wanted: Collection[str],
    num_samples: int | None = None,
) -> Reference:
    """Read the split that is evaluated, once for any number of `measure_generated`.

    Args:
        context: model, data and settings.
        networks: the networks of the features.
        wanted: some of `coherence`, `frechet` and `fidelity`.
        num_samples: read only the first samples of the split; None reads all.

    Raises:
        UserError: a shard is damaged.
    """
    real = _extract_split(context, networks, context.settings.split, num_samples)
    comparisons, left_out = _compare_with(context, real, networks, wanted)
    coherent = "coherence" in wanted and bool(networks.classified)
    if coherent and len(context.model.modality_names) < 2:
        coherent = False
        left_out["coherence"] = "takes at least two modalities"
    elif coherent and (
        unlabelled := [n for n in _sources(real) if real["label"][real[f"has/{n}"]].max() < 0]
    ):
        coherent = False
        left_out["coherence"] = f"no labelled sample of the split has {', '.join(unlabelled)}"
    elif coherent and len(networks.classified) < 2:
        left_out["coherence/unconditional"] = "takes at least two modalities with a classifier"
    return Reference(networks, real, comparisons, coherent, left_out)


def _sources(real: Mapping[str, np.ndarray]) -> Sources:
    """Modalities that at least one sample has."""
    return tuple(key.removeprefix("has/") for key in real if key.startswith("has/") and real[key].any())


def measure_floor(context: EvaluationContext, reference: Reference, split: str) -> dict[str, float]:
    """Distances of other real images to the reference, by the names of the distances of generated images.

    As many generated images cannot be expected to be closer than these.

    Args:
        context: model, data and settings.
        reference: the images to compare with.
        split: split of the other images; as many of its first samples as the reference has, or all.

    Raises:
        UserError: the data has no such split, or too few samples in it, or a shard is damaged.
    """
    extracted = _extract_split(context, reference.networks, split, reference.num_samples)
    for comparison in reference.comparisons:
        for features in _features(extracted, comparison.space).values():
            reason = refusal(*features.shape)
            if reason is not None:
                raise UserError(f"{context.shards}: split {split}: {reason}")
    tally = _Tally(reference.comparisons)
    tally.add_real(extracted)
    return tally.distances()


def measure_generated(
    context: EvaluationContext, reference: Reference, *, max_sources: int | None = None
) -> GroupResult:
    """Generate once and measure the samples as they are and, with a refiner, refined.

    Args:
        context: model, settings and optionally a refiner.
        reference: the real samples to generate from and to compare with.
        max_sources: largest number of modalities to generate from at once. More than one matters to coherence
            only; 0 generates unconditionally only; None is as many as the metrics take.

    Returns:
        Metrics and figures, see `evaluate_generative`.

    Raises:
        UserError: the model generates values that are not finite.
    """
    result = GroupResult()
    comparisons, coherent = reference.comparisons, reference.coherent
    if not comparisons and not coherent:
        return result
    networks, real = reference.networks, reference.extracted
    targets = networks.targets
    tallies = {"": _Tally(comparisons)}
    if context.dcmvae is not None:
        tallies[REFINED] = _Tally(comparisons)
    if context.settings.protocol == "released":
        tallies[RELEASED] = _Tally(comparisons)
    extract = networks.extract_features if comparisons else networks.classify
    names = reference.sources
    largest = max(1, len(names) - 1) if coherent else 1
    source_sets = {
        sources: samples_with(real, sources)
        for sources in _source_sets(names, largest if max_sources is None else min(largest, max_sources))
    }
    with progress_bar(
        total=context.settings.num_generated
        + sum(map(len, source_sets.values()))
        + (RELEASED in tallies) * sum(len(samples_with(real, [name])) for name in names),
        desc="generate",
        unit=" samples",
        disable=not context.accelerator.is_main_process,
        leave=False,
    ) as progress:
        generator = SampleGenerator(context, progress)
        extracted = generator.unconditional(targets, extract)
        for version, tally in tallies.items():
            tally.add_unconditional(_of_version(extracted, version))
        for sources, rows in source_sets.items():
            single = len(sources) == 1
            outside = [name for name in networks.classified if name not in sources]
            if len(rows) == 0 or not (single or outside):
                continue
            # Several sources serve coherence only, and their sets are many: they are not refined.
            extracted = generator.conditional(
                real,
                sources,
                targets if single else outside,
                extract if single else networks.classify,
                refine=single,
            )
            own = {}
            if single and RELEASED in tallies and sources[0] in targets:
                reconstructed = generator.conditional(
                    real, sources, sources, extract, refine=False, reconstruct=True
                )
                own = {f"{RELEASED}{key}": values for key, values in reconstructed.items()}
            for version, tally in tallies.items():
                if single or version != REFINED:
                    made = _of_version(extracted | own, version)
                    tally.add_conditional(made, sources, real["label"][rows])

    for version, tally in tallies.items():
        result.metrics |= {
            f"{version}{name}": value
            for name, value in tally.distances().items()
            # The released code has no such metrics.
            if version != RELEASED or not name.startswith("fidelity/")
        }
        if coherent:
            metrics = tally.coherence()
            result.metrics |= {f"{version}{name}": value for name, value in metrics.items()}
        if coherent and source_sets:
            shares = coherence_matrix(metrics, names, networks.classified)
            draw = partial(plots.coherence_matrix, shares, names, networks.classified)
            result.draw(f"{version.replace('/', '_')}coherence_matrix", draw)
    return result


class _Tally:
    """Metrics of one version of the generated samples: as they are, or refined."""

    def __init__(self, comparisons: Sequence[_Comparison]) -> None:
        self._comparisons = comparisons
        self._compared: dict[str, list[float]] = {}
        self._classes: dict[Sources, dict[str, np.ndarray]] = {}
        self._labels: dict[Sources, np.ndarray] = {}
        self._joint: dict[str, np.ndarray] = {}

    def add_unconditional(self, extracted: Mapping[str, np.ndarray]) -> None:
        """Add joint samples."""
        _check_finite(extracted, "unconditionally")
        self._compare(extracted, lambda modality: ("unconditional",))
        self._joint = _classes(extracted)

    def add_real(self, extracted: Mapping[str, np.ndarray]) -> None:
        """Add real images, to every kind of distance."""
        self._compare(extracted, lambda modality: ("unconditional",))
        self._compare(extracted, lambda modality: ("conditional", "conditional_cross"))

    def add_conditional(
        self, extracted: Mapping[str, np.ndarray], sources: Sources, labels: np.ndarray
    ) -> None:
        """Add what was generated from the sources of n samples with `labels` (n,), −1 for none."""
        _check_finite(extracted, f"from {', '.join(sources)}")
        if len(sources) == 1:
            own, cross = ("conditional",), ("conditional", "conditional_cross")
            self._compare(extracted, lambda modality: own if modality == sources[0] else cross)
        labelled = labels >= 0
        if labelled.any():
            self._classes[sources] = {name: found[labelled] for name, found in _classes(extracted).items()}
            self._labels[sources] = labels[labelled]

    def _compare(
        self, extracted: Mapping[str, np.ndarray], kinds_of: Callable[[str], tuple[str, ...]]
    ) -> None:
        """Compare the features of each modality with real ones, for the kinds that `kinds_of` gives it."""
        for comparison in self._comparisons:
            for modality, features in _features(extracted, comparison.space).items():
                kinds = kinds_of(modality)
                for name, value in comparison.compare(modality, features, kinds[0]).items():
                    for kind in kinds:
                        self._compared.setdefault(f"{name}/{kind}", []).append(value)

    def distances(self) -> dict[str, float]:
        """Means of distances, precision, recall and so on, by metric."""
        return {name: float(np.mean(values)) for name, values in self._compared.items()}

    def coherence(self) -> dict[str, float]:
        """Coherence metrics by name."""
        metrics = conditional_coherence(self._classes, self._labels)
        if len(self._joint) > 1:
            metrics["coherence/unconditional"] = unconditional_coherence(self._joint)
        return metrics


class _Comparison:
    """Comparison of generated with real images in one feature space.

    Args:
        space: `classifier` or `inception`.
        real: modality → features (N, F).
        distances: kinds of samples (`unconditional`, `conditional`) to compute Fréchet distances of.
        fidelities: kinds to compute precision, recall, density and coverage of.
    """

    def __init__(
        self, space: str, real: Mapping[str, FloatArray], distances: Sequence[str], fidelities: Sequence[str]
    ) -> None:
        self.space = space
        self.distances, self.fidelities = distances, fidelities
        self._references = {name: FrechetDistance(features) for name, features in real.items() if distances}
        self._real = real if fidelities else {}

    def compare(self, modality: str, features: FloatArray, kind: str) -> dict[str, float]:
        """Compare generated features (n, F) of a modality: metric without its kind → value."""
        values = {}
        if kind in self.distances:
            values[_DISTANCE_NAMES[self.space]] = self._references[modality].to(features)
        if kind in self.fidelities:
            # The four metrics depend on the sizes of both sets, so the sets are cut to equal size.
            size = min(len(features), len(self._real[modality]))
            found = fidelity(self._real[modality][:size], features[:size])
            values |= {f"fidelity/{self.space}/{name}": value for name, value in found.items()}
        return values


def _compare_with(
    context: EvaluationContext,
    real: Mapping[str, np.ndarray],
    networks: FeatureNetworks,
    wanted: Collection[str],
) -> tuple[list[_Comparison], dict[str, str]]:
    """The comparisons that there are enough samples for, and the reasons for the metrics left out."""
    left_out: dict[str, str] = {}
    comparisons = []
    for space in ("classifier", "inception"):
        features = _features(real, space)
        if not features:
            continue
        num_features = next(iter(features.values())).shape[1]
        num_real = min(map(len, features.values()))
        num_samples = {
            "unconditional": min(num_real, context.settings.num_generated),
            "conditional": min(num_real, *(int(real[f"has/{name}"].sum()) for name in _sources(real))),
        }
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
                        f"{size} samples are too few for {NUM_NEIGHBOURS} nearest neighbours"
                    )
                else:
                    fidelities.append(kind)
        if distances or fidelities:
            comparisons.append(_Comparison(space, features, distances, fidelities))
    return comparisons, left_out


def _extract_split(
    context: EvaluationContext, networks: FeatureNetworks, split: str, num_samples: int | None
) -> dict[str, np.ndarray]:
    """`Reference.extracted` of a split, or of its first samples."""

    def compute(batch: Mapping[str, Any]) -> dict[str, Tensor]:
        extracted = networks.extract_features({name: batch[name] for name in networks.targets})
        released = context.settings.protocol == "released"
        return encode_sources(context.model, batch, with_private=released) | extracted

    return context.collect(context.batches(split, num_samples), compute)


def _of_version(extracted: Mapping[str, np.ndarray], version: str) -> dict[str, np.ndarray]:
    """The values of one version of the generated samples, with the version removed from their names.

    The released protocol replaces only self-reconstructions, so it has the plain values of all others.
    """
    plain = {key: x for key, x in extracted.items() if not key.startswith((REFINED, RELEASED))}
    named = {
        key.removeprefix(version): x for key, x in extracted.items() if version and key.startswith(version)
    }
    return named if version == REFINED else plain | named


def _features(extracted: Mapping[str, np.ndarray], space: str) -> dict[str, np.ndarray]:
    """Features (n, F) by modality, for the n samples that have it; generated samples have all."""
    features = {}
    for key, values in extracted.items():
        if key.startswith(f"{space}/"):
            name = key.removeprefix(f"{space}/")
            features[name] = values[extracted[f"has/{name}"]] if f"has/{name}" in extracted else values
    return features


def _classes(extracted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Classes (N,) by modality, of the modalities that have a classifier."""
    return {key.removeprefix("class/"): x for key, x in extracted.items() if key.startswith("class/")}


def _source_sets(modalities: Sequence[str], largest: int) -> list[Sources]:
    """All sets of one to `largest` modalities."""
    sizes = range(1, largest + 1)
    return [sources for size in sizes for sources in combinations(modalities, size)]


def _describe(context: EvaluationContext, reference: Reference) -> dict[str, Any]:
    """The protocol as parameters."""
    settings, networks, num_real = context.settings, reference.networks, reference.num_samples
    described: dict[str, Any] = {
        "generative.seed": settings.seed,
        "generative.split": settings.split,
        "generative.num_samples": num_real,
        "generative.num_generated": settings.num_generated,
        "generative.shared_latent": "sampled from q(z|x) of the source, or from p(z|c), c from p(c)",
        "generative.private_latent": "sampled from p(w), also where the target is the source",
        "generative.image": "mean of the decoder",
        "generative.text": "most probable words of the decoder",
        "fidelity.neighbours": NUM_NEIGHBOURS,
        "fidelity.num_samples.unconditional": min(num_real, settings.num_generated),
    }
    if context.dcmvae is not None:
        sampler = context.dcmvae.refiner.config.sampler
        described |= {f"refined.sampler.{key}": value for key, value in sampler.model_dump().items()}
        described["refined.seed"] = settings.seed
    for name in context.model.modality_names:
        described[f"generative.num_samples.{name}"] = int(reference.extracted[f"has/{name}"].sum())
    for name in networks.classifiers:
        described[f"classifier.accuracy.{name}"] = context.index.classifiers[name].accuracy
    for name, classifier in networks.texts.items():
        described[f"classifier.accuracy.{name}"] = classifier.accuracy
    return described


def _check_finite(extracted: Mapping[str, np.ndarray], how: str) -> None:
    """Raise if a generated value is not finite: the argmax of NaN would pass for a class."""
    for key, values in extracted.items():
        kind, modality = key.split("/")
        if kind == "finite" and not values.all():
            raise UserError(
                f"{np.sum(~values)} of the {len(values)} values of {modality} that the model generates {how} "
                "are not finite, so its training diverged. Train again with a smaller optimizer.learning_rate"
            )
