"""One pass over packed data that keeps, per cluster, counts and moments and a bounded number of samples.

Memory does not depend on the number of samples.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from cmvae.clustering import BoolArray, FloatArray, IntArray, joint_location
from cmvae.data.batch import to_device
from cmvae.modalities import ImageModality, Modality
from cmvae.modalities.base import CategoriesModality, ColumnsModality
from cmvae.modalities.text import SPECIAL_TOKENS, TextModality
from cmvae.models.cmvae import CMVAE, stack_shared_locations
from cmvae.visualize.plots import project_2d
from cmvae.visualize.thumbnails import shrink

Item = TypeVar("Item")

# Pixels of the longer side of the images that are kept.
THUMBNAIL_SIZE = 64
MIN_MAP_SAMPLES = 4
"""t-SNE fails with fewer points."""
# Candidates for each sample in the list of rare choices.
_KEPT_PER_LISTED = 10


@dataclass(frozen=True)
class Member:
    """One sample that is kept."""

    key: str
    split: str
    label: int
    """−1 for none."""
    cluster: int
    confidence: float
    """p(c|z) of its cluster."""
    location: FloatArray
    """(D_z,) joint location of its modalities."""
    opinions: Mapping[str, tuple[int, float]]
    """Modality that it has → the cluster that this modality chooses, and its p(c|z)."""
    values: Mapping[str, np.ndarray]
    """Modality that it has → stored value; images are at most `THUMBNAIL_SIZE` high and wide."""


@dataclass(frozen=True)
class SummaryLimits:
    """Numbers of samples that are kept."""

    members: int
    """Per cluster: nearest to its mean, and least sure."""
    rare_choices: int
    """Samples for which a modality makes its rarest choices."""
    map_samples: int
    """Random samples."""
    histogram_samples: int
    """Random samples per cluster."""


class LowestScored(Generic[Item]):
    """The items of a stream with the lowest scores.

    Args:
        size: maximum number of items.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._heap: list[tuple[float, int, Item]] = []
        self._count = itertools.count()

    def offer(self, score: float, make: Callable[[], Item]) -> None:
        """Keep an item if its score is among the lowest; `make` is called only then. The first wins a tie."""
        if len(self._heap) < self._size:
            heapq.heappush(self._heap, (-score, -next(self._count), make()))
        elif self._heap and score < -self._heap[0][0]:
            heapq.heapreplace(self._heap, (-score, -next(self._count), make()))

    def __len__(self) -> int:
        return len(self._heap)

    def items(self) -> list[Item]:
        """The items, lowest score first."""
        return [item for _, _, item in sorted(self._heap, key=lambda entry: (-entry[0], -entry[1]))]


@dataclass(frozen=True)
class RareChoice:
    """A sample for which a modality chooses a cluster that it rarely chooses for others of its cluster."""

    member: Member
    modality: str
    rate: float
    """Share of the samples of its cluster for which the modality chooses the same."""

    @property
    def surprise(self) -> float:
        """−log `rate`, in nats, times the probability of the choice."""
        return -math.log(self.rate) * self.member.opinions[self.modality][1]


class RareChoices:
    """The samples for which a modality makes its rarest choices, from one pass.

    A modality that cannot tell two clusters apart confuses them often, which says little about a sample. So
    samples are collected by modality, cluster and choice; when there are too many, those of the most frequent
    choice are dropped.

    Args:
        names: the M modalities.
        num_clusters: K.
        limit: number of samples in the result.
    """

    def __init__(self, names: Sequence[str], num_clusters: int, limit: int) -> None:
        self._names, self._limit = names, limit
        self._counts = np.zeros((len(names), num_clusters, num_clusters), dtype=np.int64)
        self._kept: dict[tuple[int, int, int], LowestScored[Member]] = {}
        self._dropped: set[tuple[int, int, int]] = set()
        self._num_kept = 0

    def count(self, places: IntArray, choices: IntArray, present: BoolArray) -> None:
        """Count choices.

        Args:
            places: (B,) cluster of each sample, from 0 to K − 1.
            choices: (B, M) cluster that each modality chooses, from 0 to K − 1.
            present: (B, M) bool, the modalities that a sample has.
        """
        for m, there in enumerate(present.T):
            np.add.at(self._counts[m], (places[there], choices[there, m]), 1)

    def offer(self, m: int, place: int, choice: int, certainty: float, make: Callable[[], Member]) -> None:
        """Keep a counted sample whose modality m chooses another cluster; the most certain choices stay."""
        cell = (m, place, choice)
        if cell in self._dropped:
            return
        kept = self._kept.setdefault(cell, LowestScored[Member](self._limit))
        before = len(kept)
        kept.offer(-certainty, make)
        self._num_kept += len(kept) - before
        if self._num_kept > _KEPT_PER_LISTED * self._limit:
            self._drop_frequent(self._num_kept // 2)

    def ranked(self) -> list[RareChoice]:
        """Each sample once, with the choice of the highest −p(c|z) · log(rate), and in that order."""
        choices = [
            RareChoice(member, self._names[cell[0]], self._rate(cell))
            for cell, kept in self._kept.items()
            for member in kept.items()
        ]
        found: dict[tuple[str, str], RareChoice] = {}
        for choice in sorted(choices, key=lambda choice: -choice.surprise):
            found.setdefault((choice.member.split, choice.member.key), choice)
        return list(found.values())[: self._limit]

    def _drop_frequent(self, num_kept: int) -> None:
        """Drop the most frequent choices until at most `num_kept` samples are left, or one choice."""
        for cell in sorted(self._kept, key=self._rate)[:0:-1]:
            if self._num_kept <= num_kept:
                break
            self._num_kept -= len(self._kept.pop(cell))
            self._dropped.add(cell)

    def _rate(self, cell: tuple[int, int, int]) -> float:
        m, place, choice = cell
        return float(self._counts[m, place, choice] / self._counts[m, place].sum())


class ModalityStatistics:
    """Statistics of one modality for K clusters: here its presence, in a subclass also its values.

    Args:
        modality: the modality.
        num_clusters: K.
    """

    def __init__(self, modality: Modality, num_clusters: int) -> None:
        self.modality = modality
        self.present = np.zeros(num_clusters, dtype=np.int64)
        """(K,) number of samples that have the modality."""

    def add(self, stored: np.ndarray, data: np.ndarray, clusters: IntArray) -> None:
        """Add samples that have the modality.

        Args:
            stored: (B, *shape) as stored.
            data: (B, *shape) as data.
            clusters: (B,) from 0 to K − 1.
        """
        np.add.at(self.present, clusters, 1)


class ColumnStatistics(ModalityStatistics):
    """Moments of each column, as data."""

    def __init__(self, modality: Modality, num_clusters: int) -> None:
        super().__init__(modality, num_clusters)
        self.sums = np.zeros((num_clusters, *modality.shape))
        self.squares = np.zeros_like(self.sums)

    def add(self, stored: np.ndarray, data: np.ndarray, clusters: IntArray) -> None:
        """See `ModalityStatistics`."""
        super().add(stored, data, clusters)
        values = data.astype(np.float64)
        np.add.at(self.sums, clusters, values)
        np.add.at(self.squares, clusters, np.square(values))


class CategoryStatistics(ModalityStatistics):
    """Number of samples with each category or word, and number of occurrences of each."""

    def __init__(self, modality: CategoriesModality, num_clusters: int) -> None:
        super().__init__(modality, num_clusters)
        self.names = modality.categories
        self.samples = np.zeros((num_clusters, modality.num_categories), dtype=np.int64)
        self.occurrences = np.zeros_like(self.samples)

    def add(self, stored: np.ndarray, data: np.ndarray, clusters: IntArray) -> None:
        """See `ModalityStatistics`."""
        super().add(stored, data, clusters)
        for row, cluster in zip(stored.reshape(len(stored), -1), clusters, strict=True):
            found, counts = np.unique(row, return_counts=True)
            self.samples[cluster, found] += 1
            self.occurrences[cluster, found] += counts
        if isinstance(self.modality, TextModality):
            self.samples[:, : len(SPECIAL_TOKENS)] = 0
            self.occurrences[:, : len(SPECIAL_TOKENS)] = 0


class ImageStatistics(ModalityStatistics):
    """Sum of the images."""

    def __init__(self, modality: Modality, num_clusters: int) -> None:
        super().__init__(modality, num_clusters)
        self.sums = np.zeros((num_clusters, *modality.shape))

    def add(self, stored: np.ndarray, data: np.ndarray, clusters: IntArray) -> None:
        """See `ModalityStatistics`."""
        super().add(stored, data, clusters)
        for cluster in np.unique(clusters):
            self.sums[cluster] += stored[clusters == cluster].sum(0, dtype=np.float64)


class ClusterSummary:
    """What one pass over the data finds out about K clusters.

    Args:
        model: the model; its active clusters count.
        num_classes: number of classes of the labels; 0 without labels.
        limits: numbers of samples to keep.
        seed: seed of the random samples and of the map.
    """

    def __init__(self, model: CMVAE, num_classes: int, limits: SummaryLimits, seed: int) -> None:
        self._model, self._seed = model, seed
        self._rng = np.random.default_rng(seed)
        self.clusters = model.cluster_prior.active.cpu().numpy().nonzero()[0]
        """(K,) cluster ids, in the order of every K axis."""
        self._means = model.cluster_prior.means.detach().cpu().numpy()
        number = len(self.clusters)
        self.sizes = np.zeros(number, dtype=np.int64)
        """(K,) number of samples."""
        self.confidence_sums = np.zeros(number)
        """(K,) sum of p(c|z)."""
        self.class_counts = np.zeros((num_classes, number), dtype=np.int64)
        """(classes, K) number of labelled samples."""
        self.num_split_opinions = 0
        """Number of samples whose modalities choose different clusters."""
        self.num_several_modalities = 0
        """Number of samples with at least two modalities."""
        self.num_empty = 0
        """Number of samples without any modality, which have no cluster."""
        self.modalities = {
            name: _statistics_of(modality, number) for name, modality in model.modalities.items()
        }
        self.nearest = [LowestScored[Member](limits.members) for _ in self.clusters]
        """Per cluster the samples nearest to its mean."""
        self.least_sure = [LowestScored[Member](limits.members) for _ in self.clusters]
        """Per cluster the samples with the lowest p(c|z)."""
        self.random = [LowestScored[Member](limits.histogram_samples) for _ in self.clusters]
        """Per cluster random samples, without images."""
        self.rare_choices = RareChoices(model.modality_names, number, limits.rare_choices)
        """The samples for which a modality makes its rarest choices."""
        self.map = LowestScored[Member](limits.map_samples)
        """Random samples of all clusters."""

    @functools.cached_property
    def map_points(self) -> FloatArray | None:
        """(N, 2) joint locations of the samples of `map` by t-SNE; None for too few samples."""
        locations = [member.location for member in self.map.items()]
        return project_2d(np.stack(locations), self._seed) if len(locations) >= MIN_MAP_SAMPLES else None

    def add_batches(self, batches: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Add batches from a reader, each with the name of its split."""
        for split, raw in batches:
            self._add(split, raw)

    def _add(self, split: str, raw: Mapping[str, Any]) -> None:
        batch = to_device(raw, self._model.modalities, self._model.private_scale.device)
        rows = _encode_rows(self._model, split, raw, batch)
        self.num_empty += int(raw["valid"].sum()) - len(rows.in_batch)
        places = np.searchsorted(self.clusters, rows.clusters)
        choices = np.searchsorted(self.clusters, rows.choices)
        self._count(rows, places)
        self.rare_choices.count(places, choices, rows.present)
        for m, (name, statistics) in enumerate(self.modalities.items()):
            there = rows.present[:, m]
            if there.any():
                kept = rows.in_batch[there]
                statistics.add(raw[name].numpy()[kept], batch[name].cpu().numpy()[kept], places[there])
        self._collect(rows, places, choices)

    def _count(self, rows: _EncodedRows, places: IntArray) -> None:
        np.add.at(self.sizes, places, 1)
        np.add.at(self.confidence_sums, places, rows.confidence)
        labelled = rows.labels >= 0
        np.add.at(self.class_counts, (rows.labels[labelled], places[labelled]), 1)
        first = np.take_along_axis(rows.choices, rows.present.argmax(1)[:, None], axis=1)
        self.num_several_modalities += int((rows.present.sum(1) > 1).sum())
        self.num_split_opinions += int((rows.present & (rows.choices != first)).any(1).sum())

    def _collect(self, rows: _EncodedRows, places: IntArray, choices: IntArray) -> None:
        """Offer each sample to all that keep some.

        Args:
            rows: B samples.
            places: (B,) cluster of each sample, from 0 to K − 1.
            choices: (B, M) cluster that each modality chooses, from 0 to K − 1.
        """
        distances = np.linalg.norm(rows.locations - self._means[rows.clusters], axis=1)
        odd = rows.present & (rows.choices != rows.clusters[:, None])
        odd[rows.present.sum(1) == 1] = False
        drawn = self._rng.random((len(places), 2))
        for row, place in enumerate(places.tolist()):
            member = functools.partial(rows.member, row)
            self.nearest[place].offer(distances[row], member)
            self.least_sure[place].offer(rows.confidence[row], member)
            self.map.offer(drawn[row, 0], member)
            self.random[place].offer(drawn[row, 1], functools.partial(member, images=False))
            for m in np.flatnonzero(odd[row]).tolist():
                certainty = float(rows.certainty[row, m])
                self.rare_choices.offer(m, place, int(choices[row, m]), certainty, member)


@dataclass(frozen=True)
class _EncodedRows:
    """The B samples of a batch that have a modality, and their clusters."""

    model: CMVAE
    split: str
    raw: Mapping[str, Any]
    """The batch, as stored."""
    in_batch: IntArray
    """(B,) rows of the batch."""
    labels: IntArray
    """(B,)"""
    present: BoolArray
    """(B, M)"""
    locations: FloatArray
    """(B, D_z) joint locations."""
    clusters: IntArray
    """(B,) cluster ids."""
    confidence: FloatArray
    """(B,)"""
    choices: IntArray
    """(B, M) cluster id that each modality chooses."""
    certainty: FloatArray
    """(B, M) p(c|z) of the choices."""

    def member(self, row: int, images: bool = True) -> Member:
        """Sample `row`, with its images or without."""
        modalities, place = self.model.modalities, self.in_batch[row]
        has = [(m, name) for m, name in enumerate(modalities) if self.present[row, m]]
        return Member(
            key=self.raw["key"][place],
            split=self.split,
            label=int(self.labels[row]),
            cluster=int(self.clusters[row]),
            confidence=float(self.confidence[row]),
            location=self.locations[row].copy(),
            opinions={n: (int(self.choices[row, m]), float(self.certainty[row, m])) for m, n in has},
            values={
                name: _kept_value(modalities[name], self.raw[name][place].numpy())
                for _, name in has
                if images or not isinstance(modalities[name], ImageModality)
            },
        )


@torch.no_grad()
def _encode_rows(model: CMVAE, split: str, raw: Mapping[str, Any], batch: Mapping[str, Any]) -> _EncodedRows:
    """Encode the valid samples of a batch that have a modality."""
    posteriors = model.encode({name: batch[name] for name in model.modality_names})
    mask = raw["mask"].numpy()
    in_batch = np.flatnonzero(raw["valid"].numpy() & mask.any(1))
    present, shared_loc = mask[in_batch], stack_shared_locations(posteriors).cpu().numpy()[in_batch]
    found = model.assign_locations(shared_loc, present)
    certainty, choices = found.responsibilities.max(2)
    return _EncodedRows(
        model=model,
        split=split,
        raw=raw,
        in_batch=in_batch,
        labels=raw["label"].numpy()[in_batch],
        present=present,
        locations=joint_location(shared_loc, present),
        clusters=found.cluster.numpy(),
        confidence=found.confidence.numpy(),
        choices=choices.numpy(),
        certainty=certainty.numpy(),
    )


def _statistics_of(modality: Modality, num_clusters: int) -> ModalityStatistics:
    if isinstance(modality, ImageModality):
        return ImageStatistics(modality, num_clusters)
    if isinstance(modality, ColumnsModality):
        return ColumnStatistics(modality, num_clusters)
    if isinstance(modality, CategoriesModality):
        return CategoryStatistics(modality, num_clusters)
    return ModalityStatistics(modality, num_clusters)


def _kept_value(modality: Modality, stored: np.ndarray) -> np.ndarray:
    return shrink(stored, THUMBNAIL_SIZE) if isinstance(modality, ImageModality) else stored.copy()
