"""Exports on disk: the weights as safetensors beside a YAML that builds the model; no pickle anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cmvae.clustering import ClusterHierarchy
from cmvae.config import CriterionName
from cmvae.utils.errors import UserError
from cmvae.utils.files import sha256_of, whole_folder

WEIGHTS_NAME = "model.safetensors"
EXPORT_CONFIG_NAME = "config.yaml"
CLUSTERS_NAME = "clusters.safetensors"
CLUSTER_RECORD_NAME = "clusters.json"

# The key of an export's config that tells what it is the export of.
_KINDS = {"model": "a CMVAE", "refiner": "a refiner"}

Config = TypeVar("Config", bound=BaseModel)


class CurveRecord(BaseModel):
    """A criterion for every number of clusters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_clusters: tuple[int, ...]
    """(S,) descending."""
    values: tuple[float, ...]
    """(S,)"""
    selected: int
    """The number that the criterion selects."""
    terms: dict[str, tuple[float, ...]] = {}
    """Summands of the values, by name, where there are some."""


class ClusterRecord(BaseModel):
    """`clusters.json` of an export: how many clusters there are, and by which criterion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    criterion: CriterionName
    """The one that decided."""
    selected: int
    """The number that it selected."""
    told: int | None
    """The number that the config asked for instead; None if it asked for none."""
    curves: dict[CriterionName, CurveRecord]
    """All criteria, from one pass of the encoders."""

    @property
    def num_clusters(self) -> int:
        """Clusters of the export."""
        return self.selected if self.told is None else self.told


def load_clusters(folder: Path) -> tuple[ClusterHierarchy, ClusterRecord]:
    """The sets of clusters in an export, and how they were found.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        hierarchy = ClusterHierarchy(**load_numpy(folder / CLUSTERS_NAME))
        text = (folder / CLUSTER_RECORD_NAME).read_text(encoding="utf-8")
        return hierarchy, ClusterRecord.model_validate_json(text)
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename or folder / CLUSTERS_NAME}: missing, so this export knows no other number of "
            "clusters than its own. Train the run again"
        ) from error
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: a damaged export: {error}. Export the run again") from error


def save_export(
    folder: Path,
    config: BaseModel,
    state: Mapping[str, Tensor],
    clusters: tuple[ClusterHierarchy, ClusterRecord] | None = None,
) -> None:
    """Write an export, whole or not at all; an older one there is replaced.

    Args:
        folder: where to.
        config: what builds the module, `config.yaml`.
        state: its weights, `model.safetensors`.
        clusters: `clusters.safetensors` and `clusters.json`, or None.
    """
    with whole_folder(folder) as partial:
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, partial / WEIGHTS_NAME)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (partial / EXPORT_CONFIG_NAME).write_text(text, encoding="utf-8")
        if clusters is not None:
            hierarchy, record = clusters
            save_numpy(asdict(hierarchy), partial / CLUSTERS_NAME)
            (partial / CLUSTER_RECORD_NAME).write_text(record.model_dump_json(indent=1), encoding="utf-8")


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
