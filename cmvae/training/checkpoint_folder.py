"""The folder of a run's checkpoints: which are there, which are sound, and which are no longer wanted."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path

from cmvae.utils.errors import UserError
from cmvae.utils.files import remove_folder, sha256_of

MANIFEST_NAME = "manifest.json"
_LOGGER = logging.getLogger(__name__)
_CHECKPOINT_NAME = re.compile(r"step-\d{8}")
_LEFTOVER_NAME = re.compile(r"\.(step-\d{8})\.(partial|deleted|old)")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in the order of their steps; whether they are sound has not been looked at."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _CHECKPOINT_NAME.fullmatch(path.name))


def write_manifest(checkpoint: Path) -> None:
    """Write the checksum of every file of a checkpoint, which is then complete."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sums = {path.relative_to(checkpoint).as_posix(): sha256_of(path) for path in files}
    (checkpoint / MANIFEST_NAME).write_text(json.dumps(sums, indent=1), encoding="utf-8")


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if every file is what was written."""
    try:
        sums = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if sha256_of(checkpoint / name) != expected:
                return f"{name} is not what was written: its checksum differs"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"it cannot be read: {error}"
    return None


def tidy(folder: Path) -> None:
    """Bring to an end what a killed process had begun: remove what is unfinished, deleted or replaced."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        leftover = _LEFTOVER_NAME.fullmatch(path.name)
        if leftover is None:
            continue
        if leftover[2] == "old" and not (folder / leftover[1]).exists():
            # Killed after the old one was moved away and before the new one took its place.
            path.rename(folder / leftover[1])
        else:
            shutil.rmtree(path)


def find_newest(folder: Path) -> Path | None:
    """The newest sound checkpoint; damaged ones after it are set aside, with a warning each.

    Raises:
        UserError: there are checkpoints, but all are damaged.
    """
    tidy(folder)
    damaged: dict[Path, str] = {}
    for path in reversed(list_checkpoints(folder)):
        damage = find_damage(path)
        if damage is None:
            for other, reason in damaged.items():
                _set_aside(other, reason)
            return path
        damaged[path] = damage
    if damaged:
        reasons = "; ".join(f"{path.name}: {damage}" for path, damage in damaged.items())
        raise UserError(
            f"{folder}: every checkpoint is damaged, so that the run cannot go on: {reasons}. Restore one "
            "from a copy, or start anew with --overwrite"
        )
    return None


def _set_aside(checkpoint: Path, damage: str) -> None:
    # Under its own name it would count as one of the newest that are kept, and push out a sound one.
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    if aside.exists():
        remove_folder(aside)
    checkpoint.rename(aside)
    _LOGGER.warning(
        "%s: damaged: %s. The one before it is used; this one is now %s, for you to look at and delete",
        checkpoint,
        damage,
        aside.name,
    )


def thin_out(folder: Path, num_newest: int, best_step: int | None) -> None:
    """Remove all checkpoints but the newest ones and that of the best validation."""
    best = None if best_step is None else checkpoint_path(folder, best_step)
    for path in list_checkpoints(folder)[:-num_newest]:
        if path != best:
            remove_folder(path)
