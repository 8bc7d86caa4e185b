"""Networks that classify what a model generates and extract features from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from accelerate.utils import gather_object
from torch import Tensor, nn

from cmvae.evaluation.classifiers import ImageClassifier, load_classifiers
from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.frechet import INCEPTION_FEATURES, load_inception, refusal, to_bytes
from cmvae.evaluation.text import TextClassifier, train_text_classifier
from cmvae.utils.errors import UserError

Loaded = TypeVar("Loaded")


@dataclass(frozen=True)
class FeatureNetworks:
    """The networks of an evaluation; empty or None where not available."""

    images: Sequence[str]
    """Image modalities, which Inception takes."""
    classifiers: Mapping[str, ImageClassifier]
    """Image modality → classifier."""
    inception: nn.Module | None
    """Inception-v3 of the FID, see `load_inception`."""
    texts: Mapping[str, TextClassifier] = field(default_factory=dict)
    """Text modality → classifier."""

    @property
    def classified(self) -> tuple[str, ...]:
        """Modalities that have a classifier, images first."""
        return (*self.classifiers, *self.texts)

    @property
    def targets(self) -> tuple[str, ...]:
        """Modalities that any network takes."""
        return tuple(dict.fromkeys((*self.classified, *(self.images if self.inception is not None else ()))))

    def classify(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Classify data (B, *shape) by modality.

        Returns:
            `class/MODALITY` (B,) int64 of `classified`, and `finite/MODALITY` (B,) bool of every modality.
        """
        extracted = replace(self, inception=None).extract_features(values)
        return {key: x for key, x in extracted.items() if not key.startswith("classifier/")}

    def extract_features(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Classify data (B, *shape) by modality, and extract the features of its images.

        Returns:
            What `classify` returns, and `classifier/MODALITY` (B, 32) and `inception/MODALITY` (B, 2048)
            where the network is available.
        """
        extracted = {}
        for name, x in values.items():
            extracted[f"finite/{name}"] = x.isfinite().flatten(1).all(dim=1)
            if name in self.classifiers:
                classes, features = self.classifiers[name].classify(x)
                extracted[f"class/{name}"], extracted[f"classifier/{name}"] = classes, features
            elif name in self.texts:
                extracted[f"class/{name}"] = self.texts[name].classify(x)
            if name in self.images and self.inception is not None:
                extracted[f"inception/{name}"] = self.inception(to_bytes(x))
        return extracted


def load_feature_networks(
    context: EvaluationContext, wanted: Collection[str]
) -> tuple[FeatureNetworks, dict[str, str]]:
    """Load the networks that metrics need.

    Args:
        context: model, data and settings.
        wanted: some of `coherence`, `frechet` and `fidelity`.

    Returns:
        The networks, and the metrics that cannot be computed, with the reason; the same on every rank.
    """
    left_out: dict[str, str] = {}
    images = context.measured_by("generative")
    classifiers, inception = None, None
    if images:
        classifiers, reason = _load_on_all_ranks(
            context, lambda: load_classifiers(context.shards, context.index, images, context.device)
        )
        if reason is not None:
            metrics = {
                "coherence": "coherence",
                "frechet": "frechet/classifier",
                "fidelity": "fidelity/classifier",
            }
            left_out |= {metrics[group]: reason for group in sorted(wanted)}
    else:
        left_out |= dict.fromkeys(sorted(wanted), "the model has no images")
    texts: dict[str, TextClassifier] = {}
    if "coherence" in wanted:
        texts, reasons = _train_text_classifiers(context)
        left_out |= {f"coherence/{name}": reason for name, reason in reasons.items()}
        if texts and "coherence" in left_out:
            # Text alone has coherence, so the reason applies to images only.
            left_out |= dict.fromkeys([f"coherence/{name}" for name in images], left_out.pop("coherence"))
    if images and "frechet" in wanted:
        # Checked first, so that nothing is downloaded in vain.
        num_real = context.index.split(context.settings.split, context.shards).num_samples
        reason = refusal(min(num_real, context.settings.num_conditional or num_real), INCEPTION_FEATURES)
        if reason is None:
            inception, reason = _load_on_all_ranks(
                context, lambda: load_inception(context.settings.inception_weights, context.device)
            )
        if reason is not None:
            left_out["fid"] = reason
    for name, modality in context.model.modalities.items():
        if images and name not in images:
            reason = f"{modality.kind} modality: distances are between images"
            left_out |= {f"{group}/{name}": reason for group in sorted(set(wanted) - {"coherence"})}
        if "coherence" in wanted and name not in (*images, *context.measured_by("text")):
            left_out[f"coherence/{name}"] = f"{modality.kind} modality without a classifier: a source only"
    return FeatureNetworks(images, classifiers or {}, inception, texts), left_out


def _train_text_classifiers(context: EvaluationContext) -> tuple[dict[str, TextClassifier], dict[str, str]]:
    """The text classifiers, and the reasons where there is none, by modality; the same on every rank."""
    classifiers, reasons = {}, {}
    for name in context.measured_by("text"):
        try:
            classifiers[name] = train_text_classifier(context, name)
        except UserError as error:
            reasons[name] = str(error)
    return classifiers, reasons


def _load_on_all_ranks(
    context: EvaluationContext, load: Callable[[], Loaded]
) -> tuple[Loaded | None, str | None]:
    """The result of `load` if it succeeds on every rank, else the error of the first rank that failed.

    Rank 0 goes first, so that a download happens once.
    """
    loaded, reason = None, None
    with context.accelerator.main_process_first():
        try:
            loaded = load()
        except UserError as error:
            reason = str(error)
    reasons = [reason for reason in gather_object([reason]) if reason is not None]
    return (None, reasons[0]) if reasons else (loaded, None)
