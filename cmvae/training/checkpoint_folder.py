"""The folder of a run's checkpoints: list, verify and remove them."""

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
    """Path of the checkpoint of a step, whether or not it exists."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in the order of their steps; they are not verified."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _CHECKPOINT_NAME.fullmatch(path.name))


def write_manifest(checkpoint: Path) -> None:
    """Write the checksums of all files of a checkpoint, which is then complete."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    sums = {path.relative_to(checkpoint).as_posix(): sha256_of(path) for path in files}
    (checkpoint / MANIFEST_NAME).write_text(json.dumps(sums, indent=1), encoding="utf-8")


def find_damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None if all checksums match."""
    try:
        sums = json.loads((checkpoint / MANIFEST_NAME).read_text(encoding="utf-8"))
        for name, expected in sums.items():
            if sha256_of(checkpoint / name) != expected:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(checkpoint)} is missing"
    except (OSError, ValueError, AttributeError) as error:
        return f"it cannot be read: {error}"
    return None


def tidy(folder: Path) -> None:
    """Finish what a killed process left: remove checkpoints that are unfinished, deleted or replaced."""
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
    """Find the newest checkpoint that is not damaged; newer ones are renamed, with a warning each.

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
            f"{folder}: every checkpoint is damaged, so the run cannot resume: {reasons}. Restore one from "
            "a copy, or start again with --overwrite"
        )
    return None


def _set_aside(checkpoint: Path, damage: str) -> None:
    # Under its own name it would count as one of the newest, which are kept.
    aside = checkpoint.with_name(f"damaged-{checkpoint.name}")
    if aside.exists():
        remove_folder(aside)
    checkpoint.rename(aside)
    _LOGGER.warning(
        "%s: damaged: %s. The run resumes from an earlier one; this one was renamed to %s",
        checkpoint,
        damage,
        aside.name,
    )


def thin_out(folder: Path, num_newest: int, best_step: int | None) -> None:
    """Remove all checkpoints except the newest and that of the best validation."""
    best = None if best_step is None else checkpoint_path(folder, best_step)
    for path in list_checkpoints(folder)[:-num_newest]:
        if path != best:
            remove_folder(path)
