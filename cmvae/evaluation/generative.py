"""What a model generates, read once for coherence, Fréchet distances, and precision and recall.

How it is generated is told by `cmvae.evaluation.sampling`. Images are read by classifiers and Inception,
text by a classifier of words; both say a class, which is all that coherence asks for, so that it knows the
pairs of images and text, too. Distances are between images. Modalities that nothing reads are sources only.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, TypeVar

import numpy as np
from accelerate.utils import gather_object
from torch import Tensor, nn

from cmvae.clustering import FloatArray
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
from cmvae.evaluation.sampling import Generations, encode_sources, having
from cmvae.evaluation.text import TextClassifier, train_text_classifier
from cmvae.utils.errors import UserError
from cmvae.utils.progress import progress_bar
from cmvae.visualize import figures

Loaded = TypeVar("Loaded")

_DISTANCE_NAMES = {"classifier": "frechet/classifier", "inception": "fid"}
"""Feature space to the name of the Fréchet distance in it."""


@dataclass(frozen=True)
class Networks:
    """What reads what was generated; empty or None where there are none."""

    images: Sequence[str]
    """The modalities that Inception can read."""
    classifiers: Mapping[str, ImageClassifier]
    """Of images, by modality."""
    inception: nn.Module | None
    texts: Mapping[str, TextClassifier] = field(default_factory=dict)
    """Of text, by modality."""

    @property
    def classified(self) -> tuple[str, ...]:
        """The modalities whose class can be read: images first."""
        return (*self.classifiers, *self.texts)

    @property
    def targets(self) -> tuple[str, ...]:
        """The modalities that something reads."""
        return tuple(dict.fromkeys((*self.classified, *(self.images if self.inception is not None else ()))))

    def classify(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`class/MODALITY` (B,) int64 and `finite/MODALITY` (B,) bool of data (B, *shape) by modality."""
        readings = {}
        for name, x in values.items():
            readings[f"finite/{name}"] = _is_finite(x)
            if name in self.classifiers:
                readings[f"class/{name}"], _ = self.classifiers[name].read(x)
            elif name in self.texts:
                readings[f"class/{name}"] = self.texts[name].read(x)
        return readings

    def read(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Also `classifier/…` (B, 32) and `inception/…` (B, 2048); all as far as there are networks."""
        readings = self.classify({name: x for name, x in values.items() if name not in self.classifiers})
        for name, x in values.items():
            if name in self.classifiers:
                readings[f"finite/{name}"] = _is_finite(x)
                readings[f"class/{name}"], readings[f"classifier/{name}"] = self.classifiers[name].read(x)
            if name in self.images and self.inception is not None:
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
    if not networks.classified and networks.inception is None:
        return result
    reference = read_reference(context, networks, wanted)
    result.left_out |= reference.left_out
    result.protocol |= _describe(context, reference)
    result.add(measure_generations(context, reference))
    return result


@dataclass(frozen=True)
class Reference:
    """A split as networks read it; generations from it are compared with it."""

    networks: Networks
    readings: Mapping[str, np.ndarray]
    """`label` (N,), `loc/…`, `scale/…` and `has/…` of `encode_sources`, and what the networks read; of what a
    sample lacks all but `has/…` means nothing."""
    comparisons: Sequence[_Comparison]
    coherent: bool
    """Whether coherence is wanted and can be had."""
    left_out: Mapping[str, str]
    """As of `GroupResult`."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The modalities that some sample has."""
        return tuple(
            key.removeprefix("has/")
            for key, there in self.readings.items()
            if key.startswith("has/") and there.any()
        )

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
    coherent = "coherence" in wanted and bool(networks.classified)
    if coherent and len(context.model.modality_names) < 2:
        coherent = False
        left_out["coherence"] = "takes at least two modalities"
    elif coherent and len(networks.classified) < 2:
        left_out["coherence/unconditional"] = "takes two modalities whose class can be read"
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
        for features in _features(readings, comparison.space).values():
            reason = refusal(*features.shape)
            if reason is not None:
                raise UserError(f"{context.shards}: split {split}: {reason}")
    tally = _Tally(reference.comparisons)
    tally.add_real(readings)
    return tally.distances()


def measure_generations(
    context: EvaluationContext, reference: Reference, *, max_sources: int | None = None
) -> GroupResult:
    """One pass of generations, as they are and, with a refiner, refined.

    Args:
        context: model, settings and perhaps a refiner.
        reference: what is generated from and compared with.
        max_sources: generate from at most so many modalities at once; of several only coherence knows, and 0
            leaves the unconditional generations. None is all that the metrics take.

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
    targets = networks.targets
    # Generations as they are, and refined.
    tallies = {"": _Tally(comparisons)}
    if context.dcmvae is not None:
        tallies[REFINED] = _Tally(comparisons)
    read = networks.read if comparisons else networks.classify
    names = reference.sources
    largest = max(1, len(names) - 1) if coherent else 1
    source_sets = {
        sources: having(real, sources)
        for sources in _source_sets(names, largest if max_sources is None else min(largest, max_sources))
    }
    with progress_bar(
        total=context.settings.num_generated + sum(map(len, source_sets.values())),
        desc="generate",
        unit=" samples",
        disable=not context.accelerator.is_main_process,
        leave=False,
    ) as progress:
        generations = Generations(context, progress)
        readings = generations.unconditional(targets, read)
        for version, tally in tallies.items():
            tally.add_unconditional(_of_version(readings, version))
        for sources, rows in source_sets.items():
            single = len(sources) == 1
            outside = [name for name in networks.classified if name not in sources]
            if len(rows) == 0 or not (single or outside):
                continue
            # Several sources are for coherence only, and their number grows fast: they are not refined.
            readings = generations.conditional(
                real,
                sources,
                targets if single else outside,
                read if single else networks.classify,
                refine=single,
            )
            for version, tally in tallies.items():
                if single or version != REFINED:
                    tally.add_conditional(_of_version(readings, version), sources, real["label"][rows])

    for version, tally in tallies.items():
        result.metrics |= {f"{version}{name}": value for name, value in tally.distances().items()}
        if coherent:
            metrics = tally.coherence()
            result.metrics |= {f"{version}{name}": value for name, value in metrics.items()}
        if coherent and source_sets:
            shares = coherence_matrix(metrics, names, networks.classified)
            matrix = figures.coherence_matrix(shares, names, networks.classified)
            result.figures[f"{version.replace('/', '_')}coherence_matrix"] = matrix
    return result


class _Tally:
    """What comes of one version of the generations: as they are, or refined."""

    def __init__(self, comparisons: Sequence[_Comparison]) -> None:
        self._comparisons = comparisons
        self._compared: dict[str, list[float]] = {}
        self._classes: dict[Sources, dict[str, np.ndarray]] = {}
        self._labels: dict[Sources, np.ndarray] = {}
        self._joint: dict[str, np.ndarray] = {}

    def add_unconditional(self, readings: Mapping[str, np.ndarray]) -> None:
        """Take in the readings of joint generations."""
        _check_finite(readings, "unconditionally")
        for comparison in self._comparisons:
            comparison.add(_features(readings, comparison.space), ("unconditional",), self._compared)
        self._joint = _classes(readings)

    def add_real(self, readings: Mapping[str, np.ndarray]) -> None:
        """Take in the readings of real images, for the distances of every kind of generations."""
        for comparison in self._comparisons:
            features = _features(readings, comparison.space)
            comparison.add(features, ("unconditional",), self._compared)
            comparison.add(features, ("conditional", "conditional_cross"), self._compared)

    def add_conditional(
        self, readings: Mapping[str, np.ndarray], sources: Sources, labels: np.ndarray
    ) -> None:
        """Take in the readings of what was generated from some modalities of n samples with `labels` (n,)."""
        _check_finite(readings, f"from {', '.join(sources)}")
        if len(sources) == 1:
            for comparison in self._comparisons:
                features = _features(readings, comparison.space)
                comparison.add_conditional(features, sources[0], self._compared)
        self._classes[sources], self._labels[sources] = _classes(readings), labels

    def distances(self) -> dict[str, float]:
        """Every comparison's mean."""
        return {name: float(np.mean(values)) for name, values in self._compared.items()}

    def coherence(self) -> dict[str, float]:
        """Every kind of coherence."""
        metrics = conditional_coherence(self._classes, self._labels)
        if len(self._joint) > 1:
            metrics["coherence/unconditional"] = unconditional_coherence(self._joint)
        return metrics


class _Comparison:
    """Generated with real images in one feature space.

    Args:
        space: `classifier` or `inception`.
        real: modality → features (N, F).
        distances: kinds of generations whose Fréchet distance is wanted.
        fidelities: whether precision, recall, density and coverage are.
    """

    def __init__(
        self, space: str, real: Mapping[str, FloatArray], distances: Sequence[str], fidelities: Sequence[str]
    ) -> None:
        self.space = space
        self.distances, self.fidelities = distances, fidelities
        self._references = {name: FrechetDistance(features) for name, features in real.items() if distances}
        self._real = real if fidelities else {}

    def add_conditional(
        self, generated: Mapping[str, np.ndarray], source: str, compared: dict[str, list[float]]
    ) -> None:
        """Compare what was generated from one source, self and cross."""
        own = {name: features for name, features in generated.items() if name == source}
        others = {name: features for name, features in generated.items() if name != source}
        self.add(own, ("conditional",), compared)
        self.add(others, ("conditional", "conditional_cross"), compared)

    def add(
        self, generated: Mapping[str, np.ndarray], kinds: Sequence[str], compared: dict[str, list[float]]
    ) -> None:
        """Append to `compared`, by metric, the values of every modality's generations (N', F)."""
        for modality, features in generated.items():
            if kinds[0] in self.distances:
                distance = self._references[modality].to(features)
                for kind in kinds:
                    compared.setdefault(f"{_DISTANCE_NAMES[self.space]}/{kind}", []).append(distance)
            if kinds[0] in self.fidelities:
                # The four depend on the sizes of both sets, hence equal ones.
                size = min(len(features), len(self._real[modality]))
                for name, value in fidelity(self._real[modality][:size], features[:size]).items():
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
    sources = [key for key in real if key.startswith("has/") and real[key].any()]
    comparisons = []
    for space in ("classifier", "inception"):
        features = _features(real, space)
        if not features:
            continue
        num_features = next(iter(features.values())).shape[1]
        num_real = min(map(len, features.values()))
        num_samples = {
            "unconditional": min(num_real, context.settings.num_generated),
            "conditional": min(num_real, *(int(real[key].sum()) for key in sources)),
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
                        f"{size} samples, and each is asked for its {NUM_NEIGHBOURS}th nearest neighbour"
                    )
                else:
                    fidelities.append(kind)
        if distances or fidelities:
            comparisons.append(_Comparison(space, features, distances, fidelities))
    return comparisons, left_out


def _load_networks(context: EvaluationContext, wanted: Collection[str]) -> tuple[Networks, dict[str, str]]:
    """The networks that the wanted metrics take, and the metrics that must do without, with the reason."""
    left_out: dict[str, str] = {}
    images = context.measured_by("generative")
    classifiers, inception = None, None
    if images:
        classifiers, reason = _on_all_ranks(
            context, lambda: load_classifiers(context.shards, context.index, images, context.device)
        )
        if reason is not None:
            taken = {
                "coherence": "coherence",
                "frechet": "frechet/classifier",
                "fidelity": "fidelity/classifier",
            }
            left_out |= {taken[group]: reason for group in sorted(wanted)}
    else:
        left_out |= dict.fromkeys(sorted(wanted), "the model has no images")
    texts: dict[str, TextClassifier] = {}
    if "coherence" in wanted:
        texts, reasons = _train_text_classifiers(context)
        left_out |= {f"coherence/{name}": reason for name, reason in reasons.items()}
        if texts and "coherence" in left_out:
            # Text alone can be read: what was said of all of coherence is true of images.
            left_out |= dict.fromkeys([f"coherence/{name}" for name in images], left_out.pop("coherence"))
    if images and "frechet" in wanted:
        # Asked first: with too few images nothing needs to be fetched over a network.
        num_real = context.index.split(context.settings.split, context.shards).num_samples
        reason = refusal(num_real, INCEPTION_FEATURES)
        if reason is None:
            inception, reason = _on_all_ranks(
                context, lambda: load_inception(context.settings.inception_weights, context.device)
            )
        if reason is not None:
            left_out["fid"] = reason
    for name, modality in context.model.modalities.items():
        if images and name not in images:
            reason = f"of kind {modality.kind}: distances are between images"
            left_out |= {f"{group}/{name}": reason for group in sorted(set(wanted) - {"coherence"})}
        if "coherence" in wanted and name not in (*images, *context.measured_by("text")):
            left_out[f"coherence/{name}"] = (
                f"of kind {modality.kind}, whose class nothing reads: a source only"
            )
    return Networks(images, classifiers or {}, inception, texts), left_out


def _train_text_classifiers(context: EvaluationContext) -> tuple[dict[str, TextClassifier], dict[str, str]]:
    """What reads the class of texts, by modality, and the reasons where there is none; alike on all ranks."""
    classifiers, reasons = {}, {}
    for name in context.measured_by("text"):
        try:
            classifiers[name] = train_text_classifier(context, name)
        except UserError as error:
            reasons[name] = str(error)
    return classifiers, reasons


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

    def compute(batch: Mapping[str, Any]) -> dict[str, Tensor]:
        readings = networks.read({name: batch[name] for name in networks.targets})
        return encode_sources(context.model, batch) | readings

    return context.collect(context.batches(split or context.settings.split, num_samples), compute)


def _of_version(readings: Mapping[str, np.ndarray], version: str) -> dict[str, np.ndarray]:
    """The readings of one version of the generations, their names without it."""
    refined = {key: values for key, values in readings.items() if key.startswith(REFINED)}
    if version == REFINED:
        return {key.removeprefix(REFINED): values for key, values in refined.items()}
    return {key: values for key, values in readings.items() if key not in refined}


def _features(readings: Mapping[str, np.ndarray], space: str) -> dict[str, np.ndarray]:
    """Features (n, F) by modality, of the n samples that have it; what was generated, all have."""
    features = {}
    for key, values in readings.items():
        if key.startswith(f"{space}/"):
            name = key.removeprefix(f"{space}/")
            features[name] = values[readings[f"has/{name}"]] if f"has/{name}" in readings else values
    return features


def _classes(readings: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Classes (N,) by modality, as far as there are classifiers."""
    return {key.removeprefix("class/"): x for key, x in readings.items() if key.startswith("class/")}


def _source_sets(modalities: Sequence[str], largest: int) -> list[Sources]:
    """All sets of one to `largest` modalities."""
    sizes = range(1, largest + 1)
    return [sources for size in sizes for sources in combinations(modalities, size)]


def _describe(context: EvaluationContext, reference: Reference) -> dict[str, Any]:
    """The protocol, in parameters."""
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
        described[f"generative.num_samples.{name}"] = int(reference.readings[f"has/{name}"].sum())
    for name in networks.classifiers:
        described[f"classifier.accuracy.{name}"] = context.index.classifiers[name].accuracy
    for name, classifier in networks.texts.items():
        described[f"classifier.accuracy.{name}"] = classifier.accuracy
    return described


def _is_finite(values: Tensor) -> Tensor:
    return values.isfinite().flatten(1).all(dim=1)


def _check_finite(readings: Mapping[str, np.ndarray], how: str) -> None:
    """Refuse what is no image: the argmax of NaN would be a class like any other."""
    for key, values in readings.items():
        kind, modality = key.split("/")
        if kind == "finite" and not values.all():
            raise UserError(
                f"{np.sum(~values)} of the {len(values)} values of {modality} that the model generates {how} "
                "hold values that are not finite, so its training diverged. Train again with a smaller "
                "optimizer.learning_rate"
            )
