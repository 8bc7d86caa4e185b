"""Data sets of the clustering suite: how each is packed, what its rows are, and features of the rows."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array, issparse
from sklearn.datasets import load_breast_cancer, load_wine
from sklearn.preprocessing import StandardScaler

from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.evaluation.baselines import Features, plain_features, principal_components
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole

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
    """(shared data, folder for tables) → arguments of tools/make_shards.py, without --out."""
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

    def view(self, rows: str) -> View:
        """The view with this name of rows."""
        return next(view for view in self.views if view.rows == rows)


def _write_table(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    write_whole(path, text.getvalue().encode())


def _pack_wine(shared: Path, tables: Path) -> list[str]:
    wine = load_wine()
    columns = dict(zip(wine.feature_names, wine.data.T.tolist(), strict=True))
    _write_table(tables / "wine.csv", columns | {"cultivar": wine.target.tolist()})
    groups = (
        "acids=malic_acid,ash,alcalinity_of_ash,magnesium",
        "phenols=*phen*,flav*,proanth*",
        "look=color_intensity,hue,alcohol",
        "rest=od280*,proline",
    )
    return _table_arguments(tables / "wine.csv", "cultivar", groups)


def _pack_tumours(shared: Path, tables: Path) -> list[str]:
    tumours = load_breast_cancer()
    columns = dict(zip(tumours.feature_names.tolist(), tumours.data.T.tolist(), strict=True))
    diagnosis = [str(tumours.target_names[target]) for target in tumours.target.tolist()]
    _write_table(tables / "tumours.csv", columns | {"diagnosis": diagnosis})
    return _table_arguments(
        tables / "tumours.csv", "diagnosis", ("mean=mean *", "error=* error", "worst=worst *")
    )


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
PIXELS, COMPONENTS = "pixels", "principal components"


def feature_sets(view: View, index: ShardIndex) -> list[FeatureSet]:
    """The features of a data set that are clustered: of each modality, then of all together."""
    sets = []
    for name in view.alone if view.alone is not None else index.modalities:
        kind = index.modalities[name].kind
        sets.append(FeatureSet(name, _plain_form(kind)))
        if kind == "image":
            sets.append(FeatureSet(name, COMPONENTS))
    if view.together and len(index.modalities) > 1:
        sets.append(ALL)
    return sets


def _plain_form(kind: str) -> str:
    return {"image": PIXELS, "text": "TF-IDF", "categorical": "one-hot"}.get(kind, "standardised")


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

    Its methods raise UserError if a shard is missing or damaged, or the data has no labels.

    Args:
        location: the packed data.
        data_set: the data set.
        view: the rows.
    """

    def __init__(self, location: Path, data_set: DataSet, view: View) -> None:
        self.location, self.data_set, self.view = location, data_set, view
        self.index = ShardIndex.load(location)
        self._plain_features: dict[str, Features] = {}
        self._features: dict[FeatureSet, Features] = {}

    @cached_property
    def labels(self) -> IntArray:
        """Classes (M,) of the rows that are compared."""
        labels = self._compared.labels
        if not self.view.grouped:
            return labels
        _, first = np.unique(self._groups(self._compared), return_index=True)
        return labels[first]

    def describe(self, num_fitted: int | None = None) -> str:
        """Describe which rows a method was fitted on, and which were compared.

        Args:
            num_fitted: number of compared rows that it was fitted on; None if it was fitted on other rows.
        """
        num_rows, rows = len(self.labels), f"{self.view.rows}s"
        if num_fitted is None and not self.data_set.whole:
            num_train = self.index.splits["train"].num_samples
            of_train = f" of {num_train:,}" if len(self._fitted.labels) < num_train else ""
            num_groups = len(np.unique(self._groups(self._fitted)))
            return f"fitted on {num_groups:,}{of_train} train {rows}, compared on {num_rows:,} of test"
        where = rows if self.data_set.whole else f"test {rows}"
        if num_fitted is None or num_fitted == num_rows:
            return f"fitted and compared on all {num_rows:,} {where}"
        return f"fitted and compared on {num_fitted:,} of {num_rows:,} {where}, drawn by the seed"

    def features(self, wanted: FeatureSet) -> Features:
        """Features of the fitted and the compared rows."""
        if wanted not in self._features:
            self._features[wanted] = self._make(wanted)
        return self._features[wanted]

    def blocks(self) -> list[Features]:
        """Dense features of each modality, as multi-view methods take them."""
        return [
            Features(*(dense(rows) for rows in self._plain(name)))
            if modality.kind != "image"
            else self.features(FeatureSet(name, COMPONENTS))
            for name, modality in self.index.modalities.items()
        ]

    def _make(self, wanted: FeatureSet) -> Features:
        if wanted.modality is None:
            weighted = [weigh(self._plain(name)) for name in self.index.modalities]
            fitted = np.hstack([block.fitted for block in weighted])
            if self.data_set.whole:
                return Features(fitted, fitted)
            return Features(fitted, np.hstack([block.placed for block in weighted]))
        plain = self._plain(wanted.modality)
        return principal_components(plain) if wanted.form == COMPONENTS else plain

    def _plain(self, modality: str) -> Features:
        if modality not in self._plain_features:
            stored = [rows.values[modality] for rows in (self._fitted, self._compared)]
            features = plain_features(stored[0], stored[1], self.index.modalities[modality])
            if self.view.grouped:
                means = (self._group_means(rows) for rows in (self._fitted, self._compared))
                features = Features(*(mean @ rows for mean, rows in zip(means, features, strict=True)))
            self._plain_features[modality] = features
        return self._plain_features[modality]

    def _groups(self, rows: Rows) -> list[str]:
        """The group of every row; without groups, every row has its own."""
        group_of = self.data_set.group_of
        if not self.view.grouped or group_of is None:
            return list(rows.keys)
        return [group_of(key) for key in rows.keys]

    def _group_means(self, rows: Rows) -> Matrix:
        """Matrix (G, N) that maps features of samples to their means over every group."""
        _, group, size = np.unique(self._groups(rows), return_inverse=True, return_counts=True)
        # scikit-learn requires sparse matrices with 32-bit indices, which products inherit.
        places = (group.astype(np.int32), np.arange(len(group), dtype=np.int32))
        return csr_array(((1 / size[group]).astype(np.float32), places), shape=(len(size), len(group)))

    @cached_property
    def _fitted(self) -> Rows:
        if self.data_set.whole:
            return self._compared
        return read_rows(self.location, ("train",), list(self.index.modalities), self.data_set.max_fitted)

    @cached_property
    def _compared(self) -> Rows:
        return read_rows(self.location, self.data_set.compared, list(self.index.modalities))


def read_rows(
    location: Path, splits: Sequence[str], modalities: Sequence[str], limit: int | None = None
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
