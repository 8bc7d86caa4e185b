"""Exports on the Hugging Face Hub: files only, no pickles."""

from __future__ import annotations

import re
from pathlib import Path

from cmvae.models.export import WEIGHTS_NAME
from cmvae.utils.errors import UserError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
CARD_NAME = "README.md"
"""The model card."""
# All that an export consists of, and all that is downloaded.
_SUFFIXES = (".safetensors", ".yaml", ".json")


def find_export(name: str | Path) -> Path:
    """The folder of an export: the folder itself, or the local copy of a repository of the Hub.

    Args:
        name: a folder; or `user/name` if there is no such folder. Only the files of an export are downloaded,
            once.

    Raises:
        UserError: there is neither such a folder nor such a repository, or the Hub does not answer.
    """
    folder = Path(name)
    if folder.exists() or not isinstance(name, str) or not _REPOSITORY.fullmatch(name):
        return folder
    # Slow to import, and seldom needed.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=[f"*{suffix}" for suffix in _SUFFIXES]))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{name}: neither a folder nor a model on the Hugging Face Hub that you may read. Check the "
            "name, or log in with `hf auth login`"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{name}: no such folder, and the Hugging Face Hub cannot be reached: {reason}. Give a folder, "
            "or try again"
        ) from error


def push_export(folder: Path, repository: str, card: str, private: bool = False) -> str:
    """Upload an export to the Hub; the repository is created if it does not exist.

    Args:
        folder: the export.
        repository: `user/name`.
        card: text of the model card.
        private: whether a new repository is private.

    Returns:
        URL of the repository.

    Raises:
        UserError: the folder holds no export, the name is invalid, or the Hub refuses or does not answer.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise UserError(f"{repository}: not the name of a repository. Give one such as user/name")
    files = sorted(path for path in folder.glob("*") if path.suffix in _SUFFIXES)
    if not (folder / WEIGHTS_NAME).is_file():
        raise UserError(f"{folder}: holds no export. Give the folder of a run that was trained to its end")
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    operations = [CommitOperationAdd(CARD_NAME, card.encode())]
    operations += [CommitOperationAdd(path.name, path) for path in files]
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        commit = api.create_commit(repository, operations, commit_message="Upload a CMVAE")
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{repository}: cannot be uploaded: {reason}. Log in with `hf auth login`, and check the name"
        ) from error
    return str(commit.repo_url)
