"""Baselines: k-means on each modality without a model, which a model's clusters should exceed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from torch import Tensor

from cmvae.clustering import clustering_metrics
from cmvae.data.index import ShardIndex
from cmvae.data.remote import Location
from cmvae.evaluation.classifiers import read_labelled
from cmvae.modalities import Modality
from cmvae.utils.errors import UserError

METRICS = ("acc", "nmi", "ari")
PRINCIPAL_COMPONENTS = 50
"""Number of principal components of pixels, at most."""
# Kind of modality → name of its plain features.
_NAMES = {"image": "pixels", "text": "TF-IDF of words", "categorical": "one-hot"}
_STARTS = 10


@dataclass(frozen=True)
class Baseline:
    """Results of k-means on one kind of features."""

    modality: str
    features: str
    num_samples: int
    """Number of labelled samples that have the modality, in the split that is evaluated."""
    metrics: dict[str, list[float]]
    """Metric → one value per seed."""


class Features(NamedTuple):
    """The same features of two sets of rows; numpy arrays or scipy.sparse matrices."""

    fitted: Any
    """(N, D), the rows that a method is fitted on."""
    placed: Any
    """(M, D), the rows that it assigns to clusters."""


def evaluate_baselines(
    location: Location, split: str, seeds: int, num_clusters: int | None = None
) -> Iterator[Baseline]:
    """Fit k-means on the train split of each modality, and compare clusters of another split with its labels.

    The features are those of `plain_features`, and for images also `principal_components`.

    Args:
        location: packed data, a folder or a URL.
        split: split that is evaluated.
        seeds: number of fits, with the seeds 0 to `seeds` − 1.
        num_clusters: number of clusters; None is the number of classes.

    Raises:
        UserError: the data has no labels, or a split is missing, damaged or has too few labelled samples.
    """
    index = ShardIndex.load(location)
    if index.class_names is None:
        raise UserError(f"{location}: the data has no labels to compare clusters with. Pack it with --label")
    for name, modality in index.modalities.items():
        (train, train_labels), (tested, labels) = (
            map(Tensor.numpy, read_labelled(location, part, name)) for part in ("train", split)
        )
        clusters = num_clusters or len(np.unique(train_labels))
        for part, part_name in ((train, "train"), (tested, split)):
            if len(part) < clusters:
                raise UserError(
                    f"{location}: {len(part)} labelled samples of the {part_name} split have {name}, "
                    f"which are too few for {clusters} clusters"
                )
        plain = plain_features(train, tested, modality)
        sets = {plain_name(modality): plain}
        if modality.kind == "image":
            components = principal_components(plain)
            sets[f"{components.fitted.shape[1]} principal components"] = components
        for features_name, features in sets.items():
            metrics: dict[str, list[float]] = {metric: [] for metric in METRICS}
            for seed in range(seeds):
                found = KMeans(clusters, n_init=_STARTS, random_state=seed).fit(features.fitted)
                agreement = clustering_metrics(found.predict(features.placed), labels)
                for metric, values in metrics.items():
                    values.append(agreement[metric])
            yield Baseline(name, features_name, len(labels), metrics)


def plain_name(modality: Modality) -> str:
    """Name of what `plain_features` makes of a modality."""
    return _NAMES.get(modality.kind, "standardised")


def plain_features(fitted: np.ndarray, placed: np.ndarray, modality: Modality) -> Features:
    """Turn stored values of one modality into vectors, with statistics of the fitted rows.

    Pixels in [0, 1]; TF-IDF of words; standardised numbers and bits; one-hot categories.

    Args:
        fitted: (N, *shape), as stored.
        placed: (M, *shape), as stored.
        modality: the modality.
    """
    if modality.kind == "text":
        vectorizer = TfidfVectorizer(tokenizer=str.split, token_pattern=None, lowercase=False)
        texts = [[modality.describe(row) for row in stored] for stored in (fitted, placed)]
        return Features(vectorizer.fit_transform(texts[0]), vectorizer.transform(texts[1]))
    if modality.kind == "categorical":
        encoder = OneHotEncoder(handle_unknown="ignore")
        return Features(encoder.fit_transform(fitted[:, None]), encoder.transform(placed[:, None]))
    data = [modality.to_data(torch.from_numpy(stored)) for stored in (fitted, placed)]
    rows = [values.float().flatten(1).numpy() for values in data]
    if modality.kind == "image":
        return Features(*rows)
    scaler = StandardScaler().fit(rows[0])
    return Features(*map(scaler.transform, rows))


def principal_components(features: Features, num_components: int = PRINCIPAL_COMPONENTS) -> Features:
    """The first principal components of the fitted rows, which must be dense; fewer if there are fewer."""
    components = PCA(min(num_components, *features.fitted.shape), random_state=0).fit(features.fitted)
    return Features(*map(components.transform, features))
