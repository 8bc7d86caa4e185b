"""What k-means finds without any model, from each modality as it is: what clusters have to be better than."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from cmvae.clustering import IntArray, clustering_metrics
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.data.remote import Location
from cmvae.modalities import Modality
from cmvae.utils.errors import UserError

METRICS = ("acc", "nmi", "ari")
PRINCIPAL_COMPONENTS = 50
"""Of an image's pixels, if there are as many."""
_STARTS = 10
_BATCH_SIZE = 256


@dataclass(frozen=True)
class Baseline:
    """K-means with as many clusters as there are classes, on one kind of features."""

    modality: str
    features: str
    num_samples: int
    """Of the split that is evaluated, those that have a label and the modality."""
    metrics: dict[str, list[float]]
    """Of `METRICS`, one value a seed."""


@dataclass(frozen=True)
class _Split:
    """The labelled samples of a split that have one modality."""

    stored: np.ndarray
    """(N, *shape)"""
    label: IntArray
    """(N,)"""


def evaluate_baselines(
    location: Location, split: str, seeds: int, num_clusters: int | None = None
) -> Iterator[Baseline]:
    """Fit k-means on the train split, and put the samples of another one to its nearest centres.

    Pixels as they are and their first principal components; TF-IDF of words; numbers and bits
    standardised by the train split; categories one-hot.

    Args:
        location: what `cmvae pack` wrote, a folder or a URL.
        split: whose labels the clusters are compared with.
        seeds: how many times k-means is fitted, with the seeds 0 to `seeds` − 1.
        num_clusters: None tells it how many classes there are.

    Raises:
        UserError: the data has no labels, or a split is missing, damaged or has too few labelled samples.
    """
    index = ShardIndex.load(location)
    if index.class_names is None:
        raise UserError(f"{location}: the data has no labels to compare clusters with. Pack it with --label")
    for name, modality in index.modalities.items():
        train, tested = (_read(location, part, name) for part in ("train", split))
        clusters = num_clusters or len(np.unique(train.label))
        for part, part_name in ((train, "train"), (tested, split)):
            if len(part.label) < clusters:
                raise UserError(
                    f"{location}: {len(part.label)} labelled samples of the {part_name} split have {name}, "
                    f"which are too few for {clusters} clusters"
                )
        for features, fitted, placed in _features(train.stored, tested.stored, modality):
            metrics: dict[str, list[float]] = {metric: [] for metric in METRICS}
            for seed in range(seeds):
                found = KMeans(clusters, n_init=_STARTS, random_state=seed).fit(fitted)
                agreement = clustering_metrics(found.predict(placed), tested.label)
                for metric, values in metrics.items():
                    values.append(agreement[metric])
            yield Baseline(name, features, len(tested.label), metrics)


def _read(location: Location, split: str, modality: str) -> _Split:
    loader = EvaluationLoader(location, split=split, modalities=[modality], batch_size=_BATCH_SIZE)
    stored, labels = [], []
    for batch in loader:
        kept = batch["valid"] & batch["mask"][:, 0] & (batch["label"] >= 0)
        stored.append(batch[modality][kept].numpy())
        labels.append(batch["label"][kept].numpy())
    return _Split(np.concatenate(stored), np.concatenate(labels))


def _features(
    train: np.ndarray, tested: np.ndarray, modality: Modality
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Names of features, and what they are of both (N, D)."""
    if modality.kind == "text":
        vectorizer = TfidfVectorizer(tokenizer=str.split, token_pattern=None, lowercase=False)
        texts = [[modality.describe(row) for row in stored] for stored in (train, tested)]
        yield "TF-IDF of words", vectorizer.fit_transform(texts[0]), vectorizer.transform(texts[1])
        return
    if modality.kind == "categorical":
        encoder = OneHotEncoder(handle_unknown="ignore")
        yield "one-hot", encoder.fit_transform(train[:, None]), encoder.transform(tested[:, None])
        return
    data = [modality.to_data(torch.from_numpy(stored)) for stored in (train, tested)]
    fitted, placed = (values.float().flatten(1).numpy() for values in data)
    if modality.kind == "image":
        yield "pixels", fitted, placed
        components = PCA(min(PRINCIPAL_COMPONENTS, *fitted.shape), random_state=0).fit(fitted)
        name = f"{components.n_components_} principal components"
        yield name, components.transform(fitted), components.transform(placed)
        return
    scaler = StandardScaler().fit(fitted)
    yield "standardised", scaler.transform(fitted), scaler.transform(placed)
