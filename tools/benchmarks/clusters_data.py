"""Data sets of the clustering suite: how each is packed, what its rows are, and features of the rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_array, issparse
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.preprocessing import StandardScaler

from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.data.remote import Location
from cmvae.evaluation.baselines import Features, plain_features, plain_name, principal_components
from cmvae.utils.errors import UserError

_BATCH_SIZE = 256

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.integer]
Matrix = Any
"""(N, D), a numpy array or a scipy.sparse matrix."""


@dataclass(frozen=True)
class View:
    """What a row of a comparison is, and which modalities are clustered."""

    rows: str
    """Name of a row: sample, photograph, pair, bird."""
    alone: tuple[str, ...] | None = None
    """Modalities that are clustered separately; None means each of them."""
    together: bool = True
    """Whether all modalities are also clustered together."""
    grouped: bool = False
    """Whether a row is a group of samples (see `DataSet.group_of`) instead of one sample."""
    read_from: tuple[str, ...] = ()
    """Modalities that our methods assign these rows by; empty means all."""


@dataclass(frozen=True)
class DataSet:
    """One data set of the suite."""

    name: str
    folder: str
    """Folder of the packed data, below --shards."""
    pack: Callable[[Path, Path], list[str]]
    """(shared data, folder for tables) → arguments of `cmvae pack`, without --out."""
    whole: bool = False
    """Whether methods are fitted and compared on all samples, as is usual for small tables."""
    views: tuple[View, ...] = (View("sample"),)
    group_of: Callable[[str], str] | None = None
    """Key of a sample → its group."""
    max_fitted: int | None = None
    """Largest number of train samples to fit on: the first ones, which packing has shuffled."""

    @property
    def compared(self) -> tuple[str, ...]:
        """Splits whose samples are compared with labels."""
        return ("train", "validation", "test") if self.whole else ("test",)

    def groups(self, keys: Sequence[str], view: View) -> list[str]:
        """The row of a view that each sample belongs to."""
        return list(map(self.group_of, keys)) if view.grouped and self.group_of is not None else list(keys)

    def view(self, rows: str) -> View:
        """The view with this name of rows."""
        return next(view for view in self.views if view.rows == rows)


def _pack_wine(shared: Path, tables: Path) -> list[str]:
    wine = load_wine(as_frame=True)
    groups = (
        "acids=malic_acid,ash,alcalinity_of_ash,magnesium",
        "phenols=*phen*,flav*,proanth*",
        "look=color_intensity,hue,alcohol",
        "rest=od280*,proline",
    )
    table = wine.data.assign(cultivar=wine.target)
    return _table_arguments(_write_table(table, tables / "wine.csv"), "cultivar", groups)


def _pack_tumours(shared: Path, tables: Path) -> list[str]:
    tumours = load_breast_cancer(as_frame=True)
    table = tumours.data.assign(diagnosis=tumours.target_names[tumours.target])
    groups = ("mean=mean *", "error=* error", "worst=worst *")
    return _table_arguments(_write_table(table, tables / "tumours.csv"), "diagnosis", groups)


def _write_table(table: pd.DataFrame, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)
    return path


def _pack_mfeat(shared: Path, tables: Path) -> list[str]:
    groups = [f"{name}={name}_*" for name in ("fou", "fac", "kar", "pix", "zer", "mor")]
    return _table_arguments(shared / "mfeat.csv", "digit", groups)


def _table_arguments(path: Path, label: str, groups: Sequence[str]) -> list[str]:
    vectors = [part for group in groups for part in ("--vector", group)]
    return ["table", str(path), "--label", label, *vectors]


def _pack_polymnist(shared: Path, tables: Path) -> list[str]:
    backgrounds = shared / "polymnist_backgrounds"
    return ["polymnist", "--mnist", str(shared / "mnist.npz"), "--backgrounds", str(backgrounds)]


def _photograph_of(key: str) -> str:
    """The photograph of a pair; a key `STEM-NUMBER` is a photograph with one of its captions."""
    return key.rpartition("-")[0]


DATA_SETS: Mapping[str, DataSet] = {
    data_set.name: data_set
    for data_set in (
        DataSet("wine", "wine", _pack_wine, whole=True),
        DataSet("tumours", "tumours", _pack_tumours, whole=True),
        DataSet("mfeat", "mfeat", _pack_mfeat, whole=True),
        DataSet("digits", "digits", lambda shared, tables: ["digits"]),
        DataSet("digits_mixed", "digits_mixed", lambda shared, tables: ["digits_mixed"]),
        DataSet(
            "birds",
            "cub_mini",
            lambda shared, tables: ["cubicc", "--mini", str(shared / "cub_mini64")],
            views=(
                View("photograph", alone=("image",), together=False, grouped=True, read_from=("image",)),
                View("pair", alone=("caption",)),
                View("bird", alone=("caption",), grouped=True, read_from=("caption",)),
            ),
            group_of=_photograph_of,
        ),
        # With all 60,000 samples, k-means on pixels would take an hour.
        DataSet("polymnist", "polymnist", _pack_polymnist, max_fitted=5000),
    )
}


class FeatureSet(NamedTuple):
    """Features that a method clusters."""

    modality: str | None
    """None means all modalities together."""
    form: str
    """pixels, principal components, standardised, TF-IDF or one-hot; weighted for all together."""

    def __str__(self) -> str:
        return "all" if self.modality is None else f"{self.modality}: {self.form}"


ALL = FeatureSet(None, "weighted")
COMPONENTS = "principal components"


def feature_sets(view: View, index: ShardIndex) -> list[FeatureSet]:
    """The features of a data set that are clustered: of each modality, then of all together."""
    sets = []
    for name in view.alone if view.alone is not None else index.modalities:
        sets.append(FeatureSet(name, plain_name(index.modalities[name])))
        if index.modalities[name].kind == "image":
            sets.append(FeatureSet(name, COMPONENTS))
    if view.together and len(index.modalities) > 1:
        sets.append(ALL)
    return sets


@dataclass(frozen=True)
class Rows:
    """Stored samples."""

    values: Mapping[str, np.ndarray]
    """Modality → (N, *shape)."""
    labels: IntArray
    """(N,)"""
    keys: Sequence[str]


class FeatureReader:
    """Features of one view of a packed data set, cached.

    Args:
        location: the packed data.
        data_set: the data set.
        view: the rows.

    Raises:
        UserError: a shard is missing or damaged, or the data has no labels.
    """

    def __init__(self, location: Path, data_set: DataSet, view: View) -> None:
        self.data_set, self.view = data_set, view
        self.index = ShardIndex.load(location)
        names = list(self.index.modalities)
        compared = read_rows(location, data_set.compared, names)
        fitted = compared if data_set.whole else read_rows(location, ("train",), names, data_set.max_fitted)
        self._rows = (fitted, compared)
        groups = [np.unique(data_set.groups(rows.keys, view), return_inverse=True)[1] for rows in self._rows]
        self._means = [_group_means(numbers) for numbers in groups]
        self.num_fitted = int(groups[0].max()) + 1
        """Number of rows that methods are fitted on."""
        _, first = np.unique(groups[1], return_index=True)
        self.labels: IntArray = compared.labels[first if view.grouped else slice(None)]
        """Classes (M,) of the rows that are compared."""
        self._features: dict[FeatureSet, Features] = {}

    def features(self, wanted: FeatureSet) -> Features:
        """Features of the fitted and the compared rows."""
        if wanted not in self._features:
            self._features[wanted] = self._make(wanted)
        return self._features[wanted]

    def blocks(self) -> list[Features]:
        """Dense features of each modality, as multi-view methods take them."""
        return [
            self.features(FeatureSet(name, COMPONENTS))
            if modality.kind == "image"
            else Features(*map(dense, self._plain(name)))
            for name, modality in self.index.modalities.items()
        ]

    def _plain(self, name: str) -> Features:
        return self.features(FeatureSet(name, plain_name(self.index.modalities[name])))

    def _make(self, wanted: FeatureSet) -> Features:
        name = wanted.modality
        if name is None:
            weighted = [weigh(self._plain(name)) for name in self.index.modalities]
            return Features(*map(np.hstack, zip(*weighted, strict=True)))
        if wanted.form == COMPONENTS:
            return principal_components(self._plain(name))
        fitted, compared = (rows.values[name] for rows in self._rows)
        features = plain_features(fitted, compared, self.index.modalities[name])
        if not self.view.grouped:
            return features
        return Features(*(mean @ rows for mean, rows in zip(self._means, features, strict=True)))


def _group_means(numbers: IntArray) -> Matrix:
    """Matrix (G, N) that maps features of samples to their means over every group; numbers (N,)."""
    sizes = np.bincount(numbers)
    # scikit-learn requires sparse matrices with 32-bit indices, which products inherit.
    places = (numbers.astype(np.int32), np.arange(len(numbers), dtype=np.int32))
    return csr_array(((1 / sizes[numbers]).astype(np.float32), places), shape=(len(sizes), len(numbers)))


def read_rows(
    location: Location, splits: Sequence[str], modalities: Sequence[str], limit: int | None = None
) -> Rows:
    """Read the samples of splits that have all of the modalities.

    Args:
        location: the packed data.
        splits: the splits, one after the other.
        modalities: modalities to read; an empty list reads labels and keys only.
        limit: largest number of samples per split.

    Raises:
        UserError: the data has no labels, lacks a split or a modality, or is damaged.
    """
    if ShardIndex.load(location).class_names is None:
        raise UserError(f"{location}: the data has no labels to compare clusters with. Pack it with --label")
    values: dict[str, list[np.ndarray]] = {name: [] for name in modalities}
    labels: list[np.ndarray] = []
    keys: list[str] = []
    for split in splits:
        loader = EvaluationLoader(
            location, split=split, modalities=modalities, batch_size=_BATCH_SIZE, num_samples=limit
        )
        for batch in loader:
            kept = (batch["valid"] & batch["mask"].bool().all(dim=1)).numpy()
            for name in modalities:
                values[name].append(batch[name].numpy()[kept])
            labels.append(batch["label"].numpy()[kept])
            keys += [key for key, keep in zip(batch["key"], kept, strict=True) if keep]
    return Rows({name: np.concatenate(parts) for name, parts in values.items()}, np.concatenate(labels), keys)


def weigh(block: Features) -> Features:
    """Scale the features of one modality to a total variance of 1, so that modalities have equal weight.

    Dense features (D of them) are standardised and multiplied by 1/√D. Sparse features, such as TF-IDF, are
    scaled as a block: standardised, a word that occurs once would weigh as much as all others.

    Args:
        block: (N, D) and (M, D).

    Returns:
        Dense features of the same shapes.
    """
    if issparse(block.fitted):
        # Single precision, or stacking would convert all other features to double.
        fitted, placed = (dense(rows).astype(np.float32) for rows in block)
        scale = float(1 / np.sqrt(fitted.var(axis=0).sum()))
        return Features(fitted * scale, placed * scale)
    scaler = StandardScaler().fit(block.fitted)
    # A NumPy scalar would convert to double precision, and k-means on pixels would take twice as long.
    scale = 1 / math.sqrt(block.fitted.shape[1])
    return Features(scaler.transform(block.fitted) * scale, scaler.transform(block.placed) * scale)


def dense(rows: Matrix) -> np.ndarray:
    """Features as an array, for methods that take no sparse matrices."""
    return rows.toarray() if issparse(rows) else rows
