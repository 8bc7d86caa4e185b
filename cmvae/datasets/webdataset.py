"""Tar files in the WebDataset format: members whose names are equal up to the first dot form a sample."""

from __future__ import annotations

import argparse
import functools
import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar, cast

import numpy as np

from cmvae.data.remote import is_remote
from cmvae.datasets.base import DamagedSampleError, random_stream
from cmvae.datasets.columns import (
    Column,
    ColumnSource,
    DamagedColumn,
)
from cmvae.datasets.folder import read_vector, stack_vectors
from cmvae.datasets.splits import draw_splits, fractions_text
from cmvae.datasets.user_data import (
    add_shared_arguments,
    check_columns,
    check_keys,
    fit_column,
    make_keys,
    read_contents,
    read_labels,
)
from cmvae.datasets.values import Values
from cmvae.modalities import RESERVED_NAMES
from cmvae.modalities.base import NAME_PATTERN
from cmvae.utils.errors import UserError, raise_all
from cmvae.utils.progress import progress_bar

DESCRIPTION = "tar files in the WebDataset format: local ones, or at https://, s3:// or hf://"

_SPLIT_STREAM = 0
_MAX_OPEN_FILES = 16
T = TypeVar("T")
_GLOB = re.compile(r"[*?\[]")


class Member(NamedTuple):
    """Where the content of a member is."""

    tar: str
    """Path or URL of the tar."""
    offset: int
    size: int

    def read_bytes(self) -> bytes:
        """Its content.

        Raises:
            DamagedSampleError: the tar cannot be read.
        """
        try:
            if not is_remote(self.tar):
                with open(self.tar, "rb") as file:
                    file.seek(self.offset)
                    return file.read(self.size)
            remote = _open_remote(self.tar, os.getpid())
            remote.seek(self.offset)
            return remote.read(self.size)
        except (OSError, ValueError) as error:
            raise DamagedSampleError(f"{self.tar}: cannot be read: {error}") from error


@functools.lru_cache(maxsize=_MAX_OPEN_FILES)
def _open_remote(url: str, process: int) -> BinaryIO:
    """An open tar; `process` keeps those of a forked process apart."""
    # Slow to import.
    import fsspec

    return cast(BinaryIO, fsspec.open(url, "rb").open())


@dataclass
class Found:
    """A sample in the tars."""

    key: str
    place: str
    """Name for messages."""
    members: dict[str, Member] = field(default_factory=dict)
    """By extension in lower case, without the first dot."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `cmvae pack webdataset`."""
    parser.add_argument(
        "tars",
        nargs="+",
        metavar="TARS",
        help="paths or URLs, braces and globs are expanded: 'photos-{000..099}.tar', 's3://bucket/*.tar'",
    )
    for kind, example in (("image", "jpg,png"), ("text", "txt"), ("vector", "npy")):
        parser.add_argument(
            f"--{kind}",
            action="append",
            default=[],
            metavar="[NAME=]EXTENSION[,…]",
            help=f"members with these extensions are a modality, e.g. {example} (default of NAME: {kind})",
        )
    parser.add_argument(
        "--label", metavar="EXTENSION", help="member with the class of a sample, e.g. cls; for evaluation"
    )
    add_shared_arguments(parser)


def config_for(arguments: argparse.Namespace) -> None:
    """None: a starter config is made from the data."""


def from_arguments(arguments: argparse.Namespace) -> ColumnSource:
    """Open the tars that the flags describe.

    Raises:
        UserError: a flag is invalid, a tar is missing or damaged, or no sample has a modality.
    """
    chosen = _read_flags(arguments)
    extensions = {extension for _, of_name in chosen.values() for extension in of_name}
    if arguments.label is not None:
        extensions.add(_extension(arguments.label))
    samples = [sample for tar in expand_tars(arguments.tars) for sample in _index(tar, extensions)]
    samples = [sample for sample in samples if sample.members]
    if not samples:
        raise UserError(
            f"{arguments.tars[0]}: no member has the extension {' or '.join(sorted(extensions))}. "
            "`tar --list` shows the members"
        )
    places = [sample.place for sample in samples]
    labels, class_names = None, None
    if arguments.label is not None:
        of_class = _members_with(samples, [_extension(arguments.label)])
        damaged: dict[int, str] = {}
        contents = read_contents(of_class, places, _read_text, damaged)
        raise_all(damaged.values())
        labels, class_names = read_labels(contents, f"--label {arguments.label}")
    splits = draw_splits(
        np.arange(len(samples)), arguments.fractions, random_stream(arguments.seed, _SPLIT_STREAM), labels
    )
    columns = {
        name: _make_column(name, kind, _members_with(samples, of_name), places, splits["train"], arguments)
        for name, (kind, of_name) in chosen.items()
    }
    check_columns(columns, places)
    keys = make_keys([sample.key for sample in samples])
    check_keys(keys, places)
    return ColumnSource(
        name=arguments.name or arguments.out.name,
        columns=columns,
        splits=splits,
        labels=labels,
        class_names=class_names,
        keys=keys,
        settings={
            "source": "webdataset",
            "tars": " ".join(arguments.tars),
            "fractions": fractions_text(arguments.fractions),
        },
    )


def expand_tars(patterns: Sequence[str]) -> list[str]:
    """Paths and URLs of the tars, with braces and globs expanded, each once.

    Raises:
        UserError: a pattern matches nothing, or is a command.
    """
    # A dependency of webdataset, which expands its URLs with it.
    from braceexpand import braceexpand

    found: dict[str, None] = {}
    for pattern in patterns:
        for url in braceexpand(pattern):
            matching = _match(url)
            if not matching:
                raise UserError(f"{url}: no such file. Give tar files; quote patterns")
            found |= dict.fromkeys(matching)
    return list(found)


def _match(url: str) -> list[str]:
    if not is_remote(url):
        path = Path(url)
        if not _GLOB.search(url):
            return [url] if path.is_file() else []
        return sorted(str(found) for found in Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    if not _GLOB.search(url):
        return [url]
    import fsspec

    try:
        filesystem, pattern = fsspec.core.url_to_fs(url)
        return [filesystem.unstrip_protocol(name) for name in sorted(filesystem.glob(pattern))]
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{url}: cannot be listed: {error}") from error


def _index(tar: str, extensions: set[str]) -> Iterator[Found]:
    """The samples of a tar, and where their members with one of the extensions are; contents are not read.

    Raises:
        UserError: the tar cannot be read, or a member occurs twice.
    """
    current: Found | None = None
    try:
        with (
            _open_tar(tar) as opened,
            progress_bar(desc=Path(tar).name, unit=" members", leave=False) as bar,
        ):
            for entry in opened:
                bar.update()
                if not entry.isreg():
                    continue
                folder, _, name = entry.name.rpartition("/")
                stem, dot, extension = name.partition(".")
                if not dot or not stem:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if current is None or current.key != key:
                    if current is not None:
                        yield current
                    current = Found(key, f"{tar}: {key}")
                extension = extension.lower()
                if extension in current.members:
                    raise UserError(f"{tar}: {entry.name} occurs twice. Write the tar again")
                if extension in extensions:
                    current.members[extension] = Member(tar, entry.offset_data, entry.size)
    except (tarfile.TarError, OSError, ValueError, ImportError, EOFError) as error:
        raise UserError(
            f"{tar}: cannot be read as a tar: {error}. Fix the path, or copy the file here"
        ) from error
    if current is not None:
        yield current


def _open_tar(tar: str) -> tarfile.TarFile:
    # Not compressed: a member is then found at its offset.
    if not is_remote(tar):
        return tarfile.open(tar, "r:")
    return tarfile.open(fileobj=_open_remote(tar, os.getpid()), mode="r:")


def _read_flags(arguments: argparse.Namespace) -> dict[str, tuple[str, list[str]]]:
    """By name of a modality its kind and its extensions."""
    chosen: dict[str, tuple[str, list[str]]] = {}
    for kind in ("image", "text", "vector"):
        for text in getattr(arguments, kind):
            name, equals, extensions = text.rpartition("=")
            name = name if equals else kind
            if not re.fullmatch(NAME_PATTERN, name) or name in RESERVED_NAMES:
                raise UserError(
                    f"--{kind} {text}: {name!r} is not a valid name of a modality. Use lower-case letters, "
                    "digits and _, and begin with a letter"
                )
            if name in chosen:
                raise UserError(
                    f"--{kind} {text}: there is a modality {name!r} already. Write --{kind} NAME=EXTENSION"
                )
            chosen[name] = (kind, [_extension(part) for part in extensions.split(",")])
    if not chosen:
        raise UserError(
            "no modality. Name some with --image, --text and --vector, e.g. --image jpg --text txt"
        )
    return chosen


def _extension(text: str) -> str:
    return text.strip().lstrip(".").lower()


def _members_with(samples: Sequence[Found], extensions: Sequence[str]) -> list[Member | None]:
    """(N,) the member with the first of the extensions that a sample has."""
    return [next((sample.members[e] for e in extensions if e in sample.members), None) for sample in samples]


def _make_column(
    name: str,
    kind: str,
    members: Sequence[Member | None],
    places: Sequence[str],
    train: np.ndarray,
    arguments: argparse.Namespace,
) -> Column:
    damaged: dict[int, str] = {}
    if kind == "image":
        values = Values("image", list(members), places=places)
    elif kind == "text":
        values = Values("text", read_contents(members, places, _read_text, damaged))
    else:
        rows = read_contents(members, places, _read_vector, damaged)
        named = [None if member is None else place for member, place in zip(members, places, strict=True)]
        values = Values("vector", stack_vectors(named, rows), places=places)
    column = fit_column(name, f"--{kind} {name}", values, train, arguments)
    if arguments.on_error == "error":
        raise_all(damaged.values())
    return DamagedColumn(column, damaged) if damaged else column


def _read_vector(member: Member) -> np.ndarray:
    return read_vector(io.BytesIO(member.read_bytes()))


def _read_text(member: Member) -> str | None:
    try:
        return member.read_bytes().decode("utf-8").strip() or None
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot be read as text in UTF-8: {error}") from error
