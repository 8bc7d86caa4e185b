"""Download and unpack published archives."""

from __future__ import annotations

import argparse
import re
import shutil
import zipfile
import zlib
from pathlib import Path

from cmvae.data.download import DownloadError, download
from cmvae.utils.errors import UserError
from cmvae.utils.files import publish_folder
from cmvae.utils.progress import progress_bar

_ATTEMPTS = 3
"""Fewer than for shards: where there is no network, the user learns so within seconds."""


def add_download_arguments(
    parser: argparse.ArgumentParser, origin: argparse._MutuallyExclusiveGroup, cache: Path
) -> None:
    """Add the flag `--download` to a group of exclusive flags, and `--cache` to the parser."""
    origin.add_argument(
        "--download", action="store_true", help="download the released archive into --cache and read that"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=cache,
        metavar="FOLDER",
        help=f"where downloads are kept (default: {cache})",
    )


def download_and_unpack(url: str, folder: Path, members: re.Pattern[str]) -> Path:
    """Download a zip archive as `folder`.zip and unpack it, unless this has been done before.

    Args:
        url: URL of the archive.
        folder: where to unpack it; either complete or absent.
        members: matches the names of the members to unpack; the groups of the match are joined to the path
            in `folder`, so that no member is written elsewhere.

    Returns:
        `folder`.

    Raises:
        UserError: the archive cannot be downloaded or is damaged.
    """
    if folder.is_dir():
        return folder
    archive = folder.with_name(f"{folder.name}.zip")
    if not archive.is_file():
        _download(url, archive)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            for name in progress_bar(file.namelist(), desc=f"unpack {archive.name}"):
                match = members.fullmatch(name)
                if match is not None:
                    target = partial.joinpath(*match.groups())
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with file.open(name) as source, target.open("wb") as unpacked:
                        shutil.copyfileobj(source, unpacked, length=1 << 20)
    except (OSError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{archive}: cannot be unpacked: {error}. Remove it and download it again") from error
    if not partial.is_dir():
        raise UserError(
            f"{archive}: does not contain {folder.name} as released. Remove it and download {url} again"
        )
    publish_folder(partial, folder)
    return folder


def _download(url: str, path: Path) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download(url, partial, attempts=_ATTEMPTS, show_progress=True)
        partial.replace(path)
    except (DownloadError, OSError) as error:
        reason = error.reason if isinstance(error, DownloadError) else error
        raise UserError(
            f"{url}: cannot be downloaded to {path}: {reason}. Download it on a machine with a network, for "
            f"example with curl -L -o {path.name} {url}, copy it to {path}, and run the same command again"
        ) from error
