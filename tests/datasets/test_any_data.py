"""Whatever a table or a folder holds, packing refuses it with a message, or the shards hold it and train."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from any_data import folders, pack_folder, pack_table, tables
from hypothesis import HealthCheck, given, settings

FEW, MANY = 100, 2500
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True, "database": None}


def in_a_folder(pack, made):
    with tempfile.TemporaryDirectory() as place:
        pack(made, Path(place))


@given(tables())
@settings(max_examples=FEW, derandomize=True, **QUIET)
def test_any_table(made):
    in_a_folder(pack_table, made)


@given(folders())
@settings(max_examples=FEW, derandomize=True, **QUIET)
def test_any_folder(made):
    in_a_folder(pack_folder, made)


@pytest.mark.faults
@given(tables())
@settings(max_examples=MANY, **QUIET)
def test_many_tables(made):
    in_a_folder(pack_table, made)


@pytest.mark.faults
@given(folders())
@settings(max_examples=MANY, **QUIET)
def test_many_folders(made):
    in_a_folder(pack_folder, made)
