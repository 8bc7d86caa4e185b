"""Exports on disk: the weights as safetensors beside a YAML that builds the model; no pickle anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmvae.errors import UserError
from cmvae.files import sha256_of, whole_folder

WEIGHTS_NAME = "model.safetensors"
EXPORT_CONFIG_NAME = "config.yaml"

# The key of an export's config that tells what it is the export of.
_KINDS = {"model": "a CMVAE", "refiner": "a refiner"}

Config = TypeVar("Config", bound=BaseModel)


def save_export(folder: Path, config: BaseModel, state: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` and `config.yaml`, whole or not at all; an older export there is replaced."""
    with whole_folder(folder) as partial:
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, partial / WEIGHTS_NAME)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (partial / EXPORT_CONFIG_NAME).write_text(text, encoding="utf-8")


def read_export_config(folder: Path, config_type: type[Config]) -> Config:
    """What an export says of itself.

    Raises:
        UserError: the folder is no export, one of something else, or damaged.
    """
    for name in (WEIGHTS_NAME, EXPORT_CONFIG_NAME):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: missing, so this is no export. A training writes RUN/export when it ends; "
                "give that folder"
            )
    try:
        content = yaml.safe_load((folder / EXPORT_CONFIG_NAME).read_text(encoding="utf-8"))
        _check_kind(folder, content, config_type)
        return config_type.model_validate(content)
    except (ValidationError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: a damaged export: {error}. Export the run again") from error


def _check_kind(folder: Path, content: object, config_type: type[BaseModel]) -> None:
    if not isinstance(content, dict):
        return
    for key, kind in _KINDS.items():
        if key in content and key not in config_type.model_fields:
            (wanted,) = (name for own, name in _KINDS.items() if own in config_type.model_fields)
            raise UserError(f"{folder}: the export of {kind}, where that of {wanted} is wanted")
    written, known = content.get("format_version"), config_type.model_fields["format_version"].default
    if isinstance(written, int) and written != known:
        raise UserError(
            f"{folder}: an export of format {written}, and this version reads {known}. Read it with the "
            "version that wrote it, or train the run again"
        )


def load_weights(module: nn.Module, folder: Path) -> None:
    """Give a module the weights of an export.

    Raises:
        UserError: they are damaged, do not fit, or are not finite.
    """
    try:
        state = load_file(folder / WEIGHTS_NAME)
        module.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder}: a damaged export: {error}. Export the run again") from error
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{folder / WEIGHTS_NAME}: {name}: holds values that are not finite, as after a training "
                "that diverged. Train again, for example with a lower optimizer.learning_rate"
            )


def weights_sha256(folder: Path) -> str:
    """What tells one export from all others.

    Raises:
        UserError: there are no weights.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"{path}: missing, so {folder} is no export. Train the run to its end")
    return sha256_of(path)
