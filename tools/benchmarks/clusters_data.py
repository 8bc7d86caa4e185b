"""The data sets of the clustering suite: how each is packed, what a row of it is, features of the rows."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cmvae.data.index import ShardIndex
from cmvae.modalities import Modality
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole

PRINCIPAL_COMPONENTS = 50
"""Of pixels, and of what is wider where a method needs fewer numbers than rows."""
_BATCH_SIZE = 256

FloatArray = NDArray[np.floating]
IntArray = NDArray[np.integer]
Matrix = Any
"""(N, D), a numpy array or a scipy.sparse matrix."""


@dataclass(frozen=True)
class View:
    """What a row of a comparison is, and which of the modalities it shows."""

    rows: str
    """What people call a row: sample, photograph, pair, bird."""
    alone: tuple[str, ...] | None = None
    """The modalities that are clustered by themselves; None is each of them."""
    together: bool = True
    """Whether all modalities are clustered together as well."""
    grouped: bool = False
    """Whether a row is a whole group of samples, see `DataSet.group_of`, instead of one."""
    read_from: tuple[str, ...] = ()
    """The modalities that our methods read the clusters of these rows from; empty is all."""


@dataclass(frozen=True)
class DataSet:
    """One data set of the suite."""

    name: str
    folder: str
    """Of the packed data, below --shards."""
    pack: Callable[[Path, Path], list[str]]
    """(shared data, folder for tables) to the arguments of tools/make_shards.py, without --out."""
    whole: bool = False
    """Whether methods are fitted and compared on all samples, as the field does with small tables."""
    views: tuple[View, ...] = (View("sample"),)
    group_of: Callable[[str], str] | None = None
    """The group that the key of a sample says it belongs to."""
    max_fitted: int | None = None
    """Train samples that methods are fitted on, at most: the first ones, which packing has shuffled."""

    @property
    def compared(self) -> tuple[str, ...]:
        """The splits whose samples are compared with labels."""
        return ("train", "validation", "test") if self.whole else ("test",)

    def view(self, rows: str) -> View:
        """The view whose rows are called so."""
        return next(view for view in self.views if view.rows == rows)


def _write_table(path: Path, columns: Mapping[str, Sequence[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.unfinished")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    write_whole(path, partial.read_bytes())
    partial.unlink()


def _pack_wine(shared: Path, tables: Path) -> list[str]:
    from sklearn.datasets import load_wine

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
    from sklearn.datasets import load_breast_cancer

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
    """The photograph of a pair: `STEM-NUMBER` is a photograph with one of its captions."""
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
        # Of all 60,000 k-means on the pixels of five pictures would take an hour.
        DataSet("polymnist", "polymnist", _pack_polymnist, max_fitted=5000),
    )
}


class FeatureSet(NamedTuple):
    """Features that a method clusters."""

    modality: str | None
    """None is all of them together."""
    form: str
    """pixels, principal components, standardised, TF-IDF, one-hot; or weighted, which is all together."""

    def __str__(self) -> str:
        return "all" if self.modality is None else f"{self.modality}: {self.form}"


ALL = FeatureSet(None, "weighted")
PIXELS, COMPONENTS = "pixels", "principal components"


def feature_sets(view: View, index: ShardIndex) -> list[FeatureSet]:
    """What of a data set is clustered: modality after modality, then all together where there are several."""
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


class Features(NamedTuple):
    """The same features of two sets of rows."""

    fitted: Matrix
    """(N, D), of the rows that a method is fitted on."""
    placed: Matrix
    """(M, D), of the rows that it puts into clusters; the same matrix where a table is taken whole."""


@dataclass(frozen=True)
class Rows:
    """Samples as they are stored."""

    values: Mapping[str, np.ndarray]
    """Modality to (N, *shape)."""
    labels: IntArray
    """(N,)"""
    keys: Sequence[str]


class FeatureReader:
    """Features of one view of a packed data set; what was read or computed once is kept.

    Args:
        location: the packed data.
        data_set: what it is.
        view: which rows.

    Raises:
        UserError: while reading, a shard is missing or damaged, or the data has no labels.
    """

    def __init__(self, location: Path, data_set: DataSet, view: View) -> None:
        self.location, self.data_set, self.view = location, data_set, view
        self.index = ShardIndex.load(location)
        self._plain_features: dict[str, Features] = {}
        self._features: dict[FeatureSet, Features] = {}

    @cached_property
    def labels(self) -> IntArray:
        """(M,) classes of the rows that are compared."""
        labels = self._compared.labels
        if not self.view.grouped:
            return labels
        _, first = np.unique(self._groups(self._compared), return_index=True)
        return labels[first]

    def describe(self, num_fitted: int | None = None) -> str:
        """Which rows a method was fitted on, and which were compared.

        Args:
            num_fitted: how many of the compared rows it was fitted on; None if it was fitted on the rows for
                that.
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
        """The features of the rows, of the two sets of them."""
        if wanted not in self._features:
            self._features[wanted] = self._make(wanted)
        return self._features[wanted]

    def blocks(self) -> list[Features]:
        """Features of each modality by itself, dense, as methods for several views take them."""
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
        return reduce(plain, PRINCIPAL_COMPONENTS) if wanted.form == COMPONENTS else plain

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
        """The group of every row; each its own where the view has none."""
        group_of = self.data_set.group_of
        if not self.view.grouped or group_of is None:
            return list(rows.keys)
        return [group_of(key) for key in rows.keys]

    def _group_means(self, rows: Rows) -> Matrix:
        """(G, N): times features of samples, gives their means over every group."""
        from scipy.sparse import csr_array

        _, group, size = np.unique(self._groups(rows), return_inverse=True, return_counts=True)
        # scikit-learn takes sparse matrices with 32-bit indices only, and products inherit them.
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
        splits: whose samples, one split after the other.
        modalities: what is read of them; none reads labels and keys alone.
        limit: at most so many of each split, its first ones.

    Raises:
        UserError: the data has no labels, lacks a split or a modality, or is damaged.
    """
    # With torch, slow to import; after the flags, so that a mistake in them shows at once.
    from cmvae.data.reader import EvaluationLoader

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


def plain_features(fitted: np.ndarray, placed: np.ndarray, modality: Modality) -> Features:
    """One modality as k-means takes it; everything that is estimated comes from the fitted rows.

    Pixels from 0 to 1 as they are; TF-IDF of words; numbers and bits standardised; categories one-hot.

    Args:
        fitted: (N, *shape), as stored.
        placed: (M, *shape); may be the same array.
        modality: the modality.
    """
    import torch
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    if modality.kind == "text":
        vectorizer = TfidfVectorizer(tokenizer=str.split, token_pattern=None, lowercase=False)
        texts = [[modality.describe(row) for row in stored] for stored in (fitted, placed)]
        return Features(vectorizer.fit_transform(texts[0]), vectorizer.transform(texts[1]))
    if modality.kind == "categorical":
        encoder = OneHotEncoder(handle_unknown="ignore").fit(fitted[:, None])
        return Features(encoder.transform(fitted[:, None]), encoder.transform(placed[:, None]))
    data = (modality.to_data(torch.from_numpy(stored)) for stored in (fitted, placed))
    rows = [values.float().flatten(1).numpy() for values in data]
    if modality.kind == "image":
        return Features(rows[0], rows[1])
    scaler = StandardScaler().fit(rows[0])
    return Features(scaler.transform(rows[0]), scaler.transform(rows[1]))


def weigh(block: Features) -> Features:
    """Scale the features of one modality so that all modalities weigh the same beside each other.

    Dense features, D of them, are standardised and multiplied by 1/√D, which leaves a variance of 1 to the
    whole block. Sparse ones, such as TF-IDF, are only scaled as a block to the same variance: standardised,
    a word that was seen once would weigh as much as all others.

    Args:
        block: (N, D) and (M, D).

    Returns:
        Dense features of the same shapes.
    """
    from scipy.sparse import issparse
    from sklearn.preprocessing import StandardScaler

    if issparse(block.fitted):
        # In the precision of the others, or everything beside it would be made double.
        fitted, placed = (dense(rows).astype(np.float32) for rows in block)
        scale = float(1 / np.sqrt(fitted.var(axis=0).sum()))
        return Features(fitted * scale, placed * scale)
    scaler = StandardScaler().fit(block.fitted)
    # A NumPy scalar would make double precision of single, and k-means on pixels take twice as long.
    scale = 1 / math.sqrt(block.fitted.shape[1])
    return Features(scaler.transform(block.fitted) * scale, scaler.transform(block.placed) * scale)


def reduce(features: Features, num_components: int) -> Features:
    """The first principal components of the fitted rows, as many as there are if that is fewer."""
    from sklearn.decomposition import PCA

    fitted, placed = dense(features.fitted), dense(features.placed)
    components = PCA(min(num_components, *fitted.shape), random_state=0).fit(fitted)
    return Features(components.transform(fitted), components.transform(placed))


def dense(rows: Matrix) -> np.ndarray:
    """Features as an array, for what takes no sparse matrices."""
    from scipy.sparse import issparse

    return rows.toarray() if issparse(rows) else rows
