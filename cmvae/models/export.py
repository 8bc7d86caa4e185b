"""Exports: weights as safetensors, and a YAML file from which the model is built. No pickle is used."""

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

# Keys of `config.yaml` that identify what was exported.
_KINDS = {"model": "a CMVAE", "refiner": "a refiner"}

Config = TypeVar("Config", bound=BaseModel)


class CurveRecord(BaseModel):
    """Values of a criterion for every number of clusters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_clusters: tuple[int, ...]
    """(S,) numbers of clusters, descending."""
    values: tuple[float, ...]
    """(S,) value of the criterion for each number."""
    selected: int
    """Number that the criterion selects."""
    terms: dict[str, tuple[float, ...]] = {}
    """Terms that sum to `values`, by name; empty if there is only one."""


class ClusterRecord(BaseModel):
    """`clusters.json` of an export: the number of clusters, and how it was selected."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    criterion: CriterionName
    """Criterion that decided."""
    selected: int
    """Number of clusters that it selected."""
    told: int | None
    """Number of clusters that the config sets instead; None if it sets none."""
    curves: dict[CriterionName, CurveRecord]
    """All criteria that were computed."""

    @property
    def num_clusters(self) -> int:
        """Number of clusters of the export."""
        return self.selected if self.told is None else self.told


def load_clusters(folder: Path) -> tuple[ClusterHierarchy, ClusterRecord]:
    """Read the sets of clusters of an export, and how they were found.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        hierarchy = ClusterHierarchy(**load_numpy(folder / CLUSTERS_NAME))
        text = (folder / CLUSTER_RECORD_NAME).read_text(encoding="utf-8")
        return hierarchy, ClusterRecord.model_validate_json(text)
    except FileNotFoundError as error:
        raise UserError(
            f"{error.filename or folder / CLUSTERS_NAME}: missing, so the number of clusters of this export "
            "cannot be changed. Train the run again"
        ) from error
    except (OSError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: damaged export: {error}. Export the run again") from error


def save_export(
    folder: Path,
    config: BaseModel,
    state: Mapping[str, Tensor],
    clusters: tuple[ClusterHierarchy, ClusterRecord] | None = None,
) -> None:
    """Write an export atomically. An older export in the same folder is replaced.

    Args:
        folder: folder of the export.
        config: everything needed to build the module, written to `config.yaml`.
        state: weights of the module, written to `model.safetensors`.
        clusters: sets of clusters and how they were found, written to `clusters.safetensors` and
            `clusters.json`; None writes neither.
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
    """Read `config.yaml` of an export.

    Raises:
        UserError: the folder is not an export of this kind, or is damaged.
    """
    for name in (WEIGHTS_NAME, EXPORT_CONFIG_NAME):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name}: missing, so {folder} is not an export. Training writes RUN/export at its "
                "end; pass that folder"
            )
    try:
        content = yaml.safe_load((folder / EXPORT_CONFIG_NAME).read_text(encoding="utf-8"))
        _check_kind(folder, content, config_type)
        return config_type.model_validate(content)
    except (ValidationError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: damaged export: {error}. Export the run again") from error


def _check_kind(folder: Path, content: object, config_type: type[BaseModel]) -> None:
    if not isinstance(content, dict):
        return
    for key, kind in _KINDS.items():
        if key in content and key not in config_type.model_fields:
            (expected,) = (name for own, name in _KINDS.items() if own in config_type.model_fields)
            raise UserError(f"{folder}: the export of {kind}. Pass the export of {expected}")
    written, known = content.get("format_version"), config_type.model_fields["format_version"].default
    if isinstance(written, int) and written != known:
        raise UserError(
            f"{folder}: export format {written}, but this version reads format {known}. Use the version that "
            "wrote it, or train the run again"
        )


def load_weights(module: nn.Module, folder: Path) -> None:
    """Load the weights of an export into a module.

    Raises:
        UserError: the weights are damaged, do not fit the module, or are not finite.
    """
    try:
        state = load_file(folder / WEIGHTS_NAME)
        module.load_state_dict(state)
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{folder}: damaged export: {error}. Export the run again") from error
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise UserError(
                f"{folder / WEIGHTS_NAME}: {name}: holds values that are not finite, so the training "
                "diverged. Train again, for example with a lower optimizer.learning_rate"
            )


def weights_sha256(folder: Path) -> str:
    """Hash of the weights of an export, which identifies it.

    Raises:
        UserError: the folder has no weights.
    """
    path = folder / WEIGHTS_NAME
    if not path.is_file():
        raise UserError(f"{path}: missing, so {folder} is not an export. Train the run to its end")
    return sha256_of(path)
