"""What the clustering suite compares with: methods that are told the number of clusters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from clusters_data import (
    ALL,
    PIXELS,
    PRINCIPAL_COMPONENTS,
    FeatureReader,
    Features,
    FeatureSet,
    IntArray,
    dense,
)
from clusters_data import reduce as reduce_features

KMEANS_STARTS, MIXTURE_STARTS = 10, 3
NEIGHBOURS = 10
"""Of the graph that spectral clustering cuts."""
MAX_SPECTRAL = 2000
"""Rows that spectral clustering takes: its eigenvectors cost the square of them."""
MAX_MVLEARN_SPECTRAL = 1000
"""The same of mvlearn's, which works on full matrices, once for every two views and iteration."""


class NotRunError(Exception):
    """A cell that cannot be computed here, with the reason, which the table tells."""


@dataclass(frozen=True)
class Assignment:
    """Clusters of rows."""

    clusters: IntArray
    """(K,)"""
    rows: IntArray
    """(K,) which of the compared rows they are of."""
    note: str = ""
    """What a reader of the number has to know."""
    fitted: bool = False
    """Whether the method was fitted on these rows, as it has no way to place others."""


@dataclass(frozen=True)
class Method:
    """A method that is told the number of clusters."""

    title: str
    assign: Callable[[FeatureReader, FeatureSet, int, int], Assignment]
    """(rows, features, number of clusters, seed) to clusters; raises NotRunError."""
    takes: Callable[[FeatureSet], bool]
    """Whether the method is run on such features."""
    by_modality: bool = False
    """Whether it takes each modality by itself, `FeatureReader.blocks`, where it is run on all."""


def _kmeans(reader: FeatureReader, wanted: FeatureSet, num_clusters: int, seed: int) -> Assignment:
    from sklearn.cluster import KMeans

    fitted, placed = reader.features(wanted)
    found = KMeans(num_clusters, n_init=KMEANS_STARTS, random_state=seed).fit(fitted)
    return Assignment(found.predict(placed), np.arange(placed.shape[0]))


def _mixture(reader: FeatureReader, wanted: FeatureSet, num_clusters: int, seed: int) -> Assignment:
    from sklearn.mixture import GaussianMixture

    fitted, placed = reader.features(wanted)
    note = ""
    if fitted.shape[1] > PRINCIPAL_COMPONENTS:
        fitted, placed = reduce_features(Features(fitted, placed), PRINCIPAL_COMPONENTS)
        note = f"the first {PRINCIPAL_COMPONENTS} principal components of the features"
    mixture = GaussianMixture(num_clusters, n_init=MIXTURE_STARTS, random_state=seed)
    with _quiet():
        # In double precision: covariances of single-precision rows need not be positive definite.
        found = mixture.fit(dense(fitted).astype(np.float64))
    clusters = found.predict(dense(placed).astype(np.float64))
    return Assignment(clusters, np.arange(len(clusters)), note)


def _spectral(reader: FeatureReader, wanted: FeatureSet, num_clusters: int, seed: int) -> Assignment:
    from sklearn.cluster import SpectralClustering

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
    """The rows that a method without a way to place new ones is fitted on and compared on.

    Args:
        num_rows: how many there are.
        most: how many the method takes; of more, so many are drawn without replacement.
        seed: of the draw.

    Returns:
        (K,) their places, in order.
    """
    if num_rows <= most:
        return np.arange(num_rows)
    return np.sort(np.random.default_rng(seed).choice(num_rows, most, replace=False))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without warnings of convergence and of graphs in pieces, one a cell, which say nothing to act on."""
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
    # Thousands of pixels would be more numbers than rows, and neighbours of pixels are those of components.
    "gmm": Method("Gaussian mixture", _mixture, lambda features: features.form != PIXELS),
    "spectral": Method("spectral clustering", _spectral, lambda features: features.form != PIXELS),
    "mv-kmeans": Method(
        "mvlearn, multi-view k-means", _mvlearn_kmeans, lambda features: features == ALL, by_modality=True
    ),
    "mv-spectral": Method(
        "mvlearn, multi-view spectral", _mvlearn_spectral, lambda features: features == ALL, by_modality=True
    ),
}
