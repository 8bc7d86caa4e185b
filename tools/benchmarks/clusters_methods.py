"""Other methods in the clustering suite; all are given the number of clusters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from clusters_data import ALL, FeatureReader, FeatureSet, IntArray, dense
from sklearn.cluster import KMeans, SpectralClustering
from sklearn.mixture import GaussianMixture

from cmvae.evaluation.baselines import PRINCIPAL_COMPONENTS, Features, principal_components

KMEANS_STARTS, MIXTURE_STARTS = 10, 3
NEIGHBOURS = 10
"""Neighbours in the graph of spectral clustering."""
MAX_SPECTRAL = 2000
"""Largest number of rows for spectral clustering, whose cost grows with their square."""
MAX_MVLEARN_SPECTRAL = 1000
"""The same for mvlearn, which works on full matrices, once per pair of views and iteration."""


class NotRunError(Exception):
    """A cell cannot be computed; the message is the reason in the table."""


@dataclass(frozen=True)
class Assignment:
    """Clusters of rows."""

    clusters: IntArray
    """(K,)"""
    rows: IntArray
    """(K,) indices of the compared rows that were assigned."""
    note: str = ""
    """Remark for the table."""
    fitted: bool = False
    """Whether the method was fitted on these rows, because it cannot assign others."""


@dataclass(frozen=True)
class Method:
    """A method that is given the number of clusters."""

    title: str
    assign: Callable[[FeatureReader, FeatureSet, int, int], Assignment]
    """(rows, features, number of clusters, seed) → clusters; raises NotRunError."""
    takes: Callable[[FeatureSet], bool]
    """Whether the method is run on these features."""
    by_modality: bool = False
    """Whether it takes `FeatureReader.blocks`, one per modality."""


def _kmeans(reader: FeatureReader, wanted: FeatureSet, num_clusters: int, seed: int) -> Assignment:
    fitted, placed = reader.features(wanted)
    found = KMeans(num_clusters, n_init=KMEANS_STARTS, random_state=seed).fit(fitted)
    return Assignment(found.predict(placed), np.arange(placed.shape[0]))


def _mixture(reader: FeatureReader, wanted: FeatureSet, num_clusters: int, seed: int) -> Assignment:
    fitted, placed = reader.features(wanted)
    note = ""
    if fitted.shape[1] > PRINCIPAL_COMPONENTS:
        fitted, placed = principal_components(Features(dense(fitted), dense(placed)))
        note = f"the first {PRINCIPAL_COMPONENTS} principal components of the features"
    mixture = GaussianMixture(num_clusters, n_init=MIXTURE_STARTS, random_state=seed)
    with _quiet():
        # Double precision, because single-precision covariances may not be positive definite.
        found = mixture.fit(dense(fitted).astype(np.float64))
    clusters = found.predict(dense(placed).astype(np.float64))
    return Assignment(clusters, np.arange(len(clusters)), note)


def _spectral(reader: FeatureReader, wanted: FeatureSet, num_clusters: int, seed: int) -> Assignment:
    placed = reader.features(wanted).placed
    rows = choose_rows(placed.shape[0], MAX_SPECTRAL, seed)
    method = SpectralClustering(
        num_clusters, affinity="nearest_neighbors", n_neighbors=NEIGHBOURS, random_state=seed
    )
    with _quiet():
        clusters = method.fit_predict(placed[rows])
    return Assignment(clusters, rows, fitted=True)


def _mvlearn_kmeans(reader: FeatureReader, wanted: FeatureSet, num_clusters: int, seed: int) -> Assignment:
    if len(reader.index.modalities) != 2:
        raise NotRunError(f"takes two modalities, the data has {len(reader.index.modalities)}")
    with _import_mvlearn():
        from mvlearn.cluster import MultiviewKMeans
    blocks = reader.blocks()
    method = MultiviewKMeans(n_clusters=num_clusters, n_init=KMEANS_STARTS, random_state=seed)
    with _quiet():
        method.fit([block.fitted for block in blocks])
        clusters = method.predict([block.placed for block in blocks])
    return Assignment(clusters, np.arange(len(clusters)), _note_of_images(reader))


def _mvlearn_spectral(reader: FeatureReader, wanted: FeatureSet, num_clusters: int, seed: int) -> Assignment:
    with _import_mvlearn():
        from mvlearn.cluster import MultiviewSpectralClustering
    blocks = reader.blocks()
    rows = choose_rows(blocks[0].placed.shape[0], MAX_MVLEARN_SPECTRAL, seed)
    method = MultiviewSpectralClustering(n_clusters=num_clusters, random_state=seed)
    with _quiet():
        clusters = method.fit_predict([block.placed[rows] for block in blocks])
    return Assignment(clusters, rows, _note_of_images(reader), fitted=True)


def _note_of_images(reader: FeatureReader) -> str:
    has_images = any(modality.kind == "image" for modality in reader.index.modalities.values())
    return f"the first {PRINCIPAL_COMPONENTS} principal components of images" if has_images else ""


def choose_rows(num_rows: int, most: int, seed: int) -> IntArray:
    """Choose the rows for a method that cannot assign new rows.

    Args:
        num_rows: number of rows.
        most: largest number that the method takes; of more rows, a sample is drawn without replacement.
        seed: seed of the sample.

    Returns:
        (K,) sorted indices.
    """
    if num_rows <= most:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, most, replace=False))


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings about convergence and disconnected graphs, which every cell would print."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _import_mvlearn() -> Iterator[None]:
    try:
        with _quiet():
            yield
    except ImportError as error:
        raise NotRunError(
            f"mvlearn cannot be imported ({error}): pip install --no-deps mvlearn seaborn"
        ) from error


METHODS: Mapping[str, Method] = {
    "kmeans": Method("k-means", _kmeans, lambda features: True),
    # There are more pixels than rows, and neighbours in pixels are about those in components.
    "gmm": Method("Gaussian mixture", _mixture, lambda features: features.form != "pixels"),
    "spectral": Method("spectral clustering", _spectral, lambda features: features.form != "pixels"),
    "mv-kmeans": Method(
        "mvlearn, multi-view k-means", _mvlearn_kmeans, lambda features: features == ALL, by_modality=True
    ),
    "mv-spectral": Method(
        "mvlearn, multi-view spectral", _mvlearn_spectral, lambda features: features == ALL, by_modality=True
    ),
}
