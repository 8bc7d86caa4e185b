"""Features of pretrained networks: a vector modality beside, or instead of, what they were computed from."""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cmvae.data.index import OnError
from cmvae.datasets.columns import (
    Column,
    ColumnSource,
    DamagedColumn,
    fit_vector,
    name_original,
    number_column,
    originals_of,
)
from cmvae.datasets.pretrained import Network, load_network
from cmvae.modalities import Embedding, VectorModality
from cmvae.modalities.vector import NETWORK_PATTERN
from cmvae.utils.errors import UserError, raise_all
from cmvae.utils.progress import progress_bar

FEATURES_SUFFIX = "_features"
_BATCH_SIZE = 64
_KINDS: dict[str, Literal["image", "text"]] = {
    "timm": "image",
    "torchvision": "image",
    "sentence-transformers": "text",
}
"""What the networks of each library take."""


@dataclass(frozen=True)
class EmbedRequest:
    """One flag `--embed MODALITY=LIBRARY:NETWORK[@PATH]`."""

    modality: str
    network: str
    """LIBRARY:NETWORK."""
    weights: str | None
    """Local path of the weights."""


def add_embed_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--embed` and `--embed-only`."""
    parser.add_argument(
        "--embed",
        type=embed_request,
        action="append",
        default=[],
        metavar="MODALITY=LIBRARY:NETWORK[@PATH]",
        help="add the features that a pretrained network computes from a modality, as the vector "
        f"MODALITY{FEATURES_SUFFIX}: photo=timm:vit_small_patch14_dinov2, photo=torchvision:resnet50, "
        "caption=sentence-transformers:all-MiniLM-L6-v2; PATH holds the weights, which the library downloads "
        "otherwise (pip install 'cmvae[embed]')",
    )
    parser.add_argument(
        "--embed-only", action="store_true", help="pack the features instead of the modalities of --embed"
    )


def embed_request(text: str) -> EmbedRequest:
    """Type of the flag `--embed`."""
    modality, _, rest = text.partition("=")
    network, _, weights = rest.partition("@")
    if not modality or not re.fullmatch(NETWORK_PATTERN, network):
        raise argparse.ArgumentTypeError(
            f"{text!r}: write MODALITY=LIBRARY:NETWORK; libraries are {', '.join(_KINDS)}"
        )
    return EmbedRequest(modality, network, str(Path(weights).resolve()) if weights else None)


def embed_source(
    source: ColumnSource, requests: Sequence[EmbedRequest], *, only: bool = False, on_error: OnError = "error"
) -> ColumnSource:
    """Add the features of pretrained networks to a data set; every image and sentence is embedded once.

    Args:
        source: the data set.
        requests: what to embed with which networks.
        only: leave out the modalities that are embedded.
        on_error: `skip` leaves out samples with a damaged image.

    Raises:
        UserError: there is no such modality, the network does not fit it or is not available, or an image is
            damaged.
    """
    columns = dict(source.columns)
    schema = source.table
    if only and not requests:
        raise UserError(
            "--embed-only: there is nothing to pack instead. Add --embed MODALITY=LIBRARY:NETWORK"
        )
    for modality, count in Counter(request.modality for request in requests).items():
        if count > 1:
            raise UserError(f"--embed {modality}=…: is given {count} times. Give one network per modality")
    for request in requests:
        _check_request(request, columns)
    for request in requests:
        column = source.columns[request.modality]
        network = load_network(request.network, request.weights)
        embedding = Embedding(
            of=request.modality,
            kind=_kind_of(request.network),
            network=request.network,
            weights=request.weights,
            version=network.version,
            sha256=network.sha256,
        )

        def fit(vectors: np.ndarray, embedding: Embedding = embedding) -> VectorModality:
            fitted = fit_vector(vectors, None, source.splits["train"])
            return fitted.model_copy(update={"embedding": embedding})

        name = request.modality + FEATURES_SUFFIX
        originals = originals_of(column) or ()
        places = [f"{request.modality}: {key}" for key in source.keys]
        columns[name] = _make_column(originals, places, network, fit, on_error)
        if schema is not None:
            of_columns = {**schema.columns, name: schema.columns[request.modality]}
            schema = schema.model_copy(update={"columns": of_columns})
    if only:
        embedded = {request.modality for request in requests}
        columns = {name: column for name, column in columns.items() if name not in embedded}
    return replace(source, columns=columns, table=schema)


def embed_column(
    originals: Sequence[Any], places: Sequence[str], modality: VectorModality, on_error: OnError = "error"
) -> Column:
    """The features of new data, from the network that made a modality.

    Args:
        originals: (N,) images or sentences, None where missing.
        places: (N,) names of the samples for messages.
        modality: with an `embedding`.
        on_error: `skip` leaves out samples with a damaged image.

    Raises:
        UserError: the network is not available or has other weights, or an image is damaged.
    """
    embedding = modality.embedding
    assert embedding is not None  # noqa: S101 (the caller asked)
    network = load_network(embedding.network, embedding.weights)
    if network.sha256 != embedding.sha256:
        raise UserError(
            f"{network.where}: its weights have SHA-256 {network.sha256[:12]}…, but the model was trained "
            f"with {embedding.sha256[:12]}…. Use the same weights"
        )
    if network.version != embedding.version:
        _note_version(network.where, network.version, embedding.version)

    def restate(vectors: np.ndarray) -> VectorModality:
        return modality.model_copy(update={"optional": bool(np.isnan(vectors).any())})

    return _make_column(originals, places, network, restate, on_error)


@functools.cache
def _note_version(where: str, found: str, expected: str) -> None:
    """Report another version of a library on stderr, once."""
    print(
        f"note: {where}: the library has version {found}, but the model was trained with {expected}",
        file=sys.stderr,
    )


def _check_request(request: EmbedRequest, columns: Mapping[str, Column]) -> None:
    flag = f"--embed {request.modality}={request.network}"
    column = columns.get(request.modality)
    if column is None:
        raise UserError(f"{flag}: no modality {request.modality!r}; there are {', '.join(columns)}")
    kind = _kind_of(request.network)
    if column.modality.kind != kind or originals_of(column) is None:
        fitting = [name for name, other in columns.items() if other.modality.kind == kind]
        raise UserError(
            f"{flag}: takes modalities of kind {kind} with their original values, which are: "
            f"{', '.join(fitting) or 'none'}"
        )
    if request.modality + FEATURES_SUFFIX in columns:
        raise UserError(f"{flag}: there is a modality {request.modality + FEATURES_SUFFIX!r}. Rename it")


def _kind_of(network: str) -> Literal["image", "text"]:
    return _KINDS[network.partition(":")[0]]


def _make_column(
    originals: Sequence[Any],
    places: Sequence[str],
    network: Network,
    fit: Callable[[np.ndarray], VectorModality],
    on_error: OnError,
) -> Column:
    vectors, damaged = _embed(originals, places, network)
    if on_error == "error":
        raise_all(damaged.values())
    column = number_column(vectors, fit(vectors))
    return DamagedColumn(column, damaged) if damaged else column


def _embed(
    originals: Sequence[Any], places: Sequence[str], network: Network
) -> tuple[np.ndarray, dict[int, str]]:
    """(N, D) float64, NaN where an original is missing or damaged, and what is damaged by row."""
    rows_of: dict[Any, list[int]] = {}
    for row, original in enumerate(originals):
        if original is not None:
            # Arrays are told apart by identity, files and sentences by value.
            key = id(original) if isinstance(original, np.ndarray) else original
            rows_of.setdefault(key, []).append(row)
    vectors = np.full((len(originals), network.dim), np.nan)
    damaged: dict[int, str] = {}
    distinct = iter(rows_of.values())
    with progress_bar(total=len(rows_of), desc=network.where, unit=" values", leave=False, delay=2) as bar:
        while batch := list(itertools.islice(distinct, _BATCH_SIZE)):
            features, problems = network.embed([originals[rows[0]] for rows in batch])
            for place, rows in enumerate(batch):
                vectors[rows] = features[place]
                if place in problems:
                    original = originals[rows[0]]
                    damaged |= {
                        row: f"{name_original(places[row], original)}: {problems[place]}" for row in rows
                    }
            bar.update(len(batch))
    return vectors, damaged
