"""Rows of a table for a trained run, read as the table that it was trained on."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cmvae.config import load_run_table
from cmvae.data.index import TableSchema
from cmvae.data.remote import Location, is_remote
from cmvae.datasets.table_file import Table, read_table_parts
from cmvae.datasets.table_rows import find_lacking, with_columns_of, with_form
from cmvae.datasets.user_data import shorten_list
from cmvae.datasets.values import Unknown, describe_unknown
from cmvae.modalities import Modality

_SUFFIXES = frozenset({".csv", ".tsv", ".parquet"})


def is_table(location: Location) -> bool:
    """Whether a location is that of a table and not of packed data, which is a folder or a URL."""
    if is_remote(location):
        return False
    return Path(location).is_file() or Path(location).suffix.lower() in _SUFFIXES


def load_modalities(run: Path) -> dict[str, Modality]:
    """The modalities of a run, from its export.

    Raises:
        UserError: the run has no export, or it is damaged.
    """
    # Slow to import.
    from cmvae.models.cmvae import ExportConfig
    from cmvae.models.export import read_export_config

    return dict(read_export_config(run / "export", ExportConfig).modalities)


class NewRows(NamedTuple):
    """A table for a run."""

    head: Table
    """The first row."""
    schema: TableSchema
    """How it is read."""
    modalities: dict[str, Modality]
    """The modalities of the run that it has."""


def open_rows(run: Path, path: Path, arguments: argparse.Namespace) -> NewRows:
    """Read how the rows of a table are read for a run; reports the modalities that it lacks on stderr.

    Args:
        run: folder of the run.
        path: the table.
        arguments: with the flags of `add_form_arguments`.

    Raises:
        UserError: the run was not trained on a table, or the table is missing or has other columns.
    """
    schema = with_form(load_run_table(run), arguments)
    first = next(read_table_parts(path, schema.separator, frozenset(["", *schema.na]), 1))
    modalities = load_modalities(run)
    lacking = find_lacking(path, first.columns, schema, modalities)
    for name, columns in lacking.items():
        note(f"{path}: no column {shorten_list(columns)}: {name} is missing in all rows")
    found = {name: modality for name, modality in modalities.items() if name not in lacking}
    return NewRows(first, with_columns_of(schema, first.columns, arguments), found)


def report_unknown(unknown: Mapping[str, Unknown], modalities: Mapping[str, Modality]) -> None:
    """Report words and categories of a table that a run does not know."""
    for name, found in unknown.items():
        message = describe_unknown(name, found, modalities[name])
        if message is not None:
            note(message)


def note(text: str) -> None:
    """Print a note on stderr, on rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr)
