"""Fetch an archive and unpack what is wanted of it, under names made here, not the archive's."""

from __future__ import annotations

import argparse
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from cmvae.utils.errors import UserError
from cmvae.utils.files import publish_folder
from cmvae.utils.progress import progress_bar


def add_download_arguments(
    parser: argparse.ArgumentParser, origin: argparse._MutuallyExclusiveGroup, cache: Path
) -> None:
    """`--download`, one of the origins that exclude each other, and `--cache`, where that is kept."""
    origin.add_argument(
        "--download", action="store_true", help="fetch the released archive into --cache and read that"
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=cache,
        metavar="FOLDER",
        help=f"where downloads are kept (default: {cache})",
    )


def fetch_and_unpack(url: str, archive: Path, folder: Path, place: Callable[[str], str | None]) -> Path:
    """Fetch a zip archive and unpack it, as far as that is not done already.

    Args:
        url: of the archive.
        archive: where it is kept.
        folder: where to; whole or absent.
        place: from the name of a member to its path below `folder`, None for what is not wanted.

    Returns:
        `folder`.

    Raises:
        UserError: there is no network, or the archive is damaged; the message says what to put where.
    """
    if folder.is_dir():
        return folder
    if not archive.is_file():
        _fetch(url, archive)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as members:
            for name in progress_bar(members.namelist(), desc=f"unpack {archive.name}"):
                path = place(name)
                if path is None:
                    continue
                target = partial / path
                target.parent.mkdir(parents=True, exist_ok=True)
                with members.open(name) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, length=1 << 20)
    except (OSError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{archive}: cannot be unpacked: {error}. Remove it and fetch it again") from error
    if not partial.is_dir():
        raise UserError(
            f"{archive}: holds no {folder.name} in the released form. Remove it and fetch {url} again"
        )
    publish_folder(partial, folder)
    return folder


def _fetch(url: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with urllib.request.urlopen(url, timeout=60) as response, part.open("wb") as file:  # noqa: S310 (our own https URL)
            size = int(response.headers.get("Content-Length", 0)) or None
            with tqdm.wrapattr(response, "read", total=size, desc=path.name) as body:
                shutil.copyfileobj(body, file, length=1 << 20)
    except (urllib.error.URLError, OSError) as error:
        raise UserError(
            f"{url}: cannot be downloaded: {error}. Fetch it on a machine with a network, for example with "
            f"curl -L -o {path.name} {url}, put it at {path}, and give the same command again"
        ) from error
    if size is not None and part.stat().st_size != size:
        raise UserError(f"{url}: the connection ended early. Give the same command again")
    part.replace(path)
