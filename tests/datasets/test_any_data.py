"""Whatever a table or a folder holds, packing refuses it with a message, or gives it back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from any_data import folders, pack_folder, pack_table, tables
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FEW, MANY = 100, 2500
QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True, "database": None}
# A step of training takes longer than packing.
TRAINS = st.integers(0, 24).map(lambda number: number == 0)


def in_a_folder(pack, made, trains):
    with tempfile.TemporaryDirectory() as place:
        pack(made, Path(place), trains)


@given(tables(), TRAINS)
@settings(max_examples=FEW, derandomize=True, **QUIET)
def test_any_table(made, trains):
    in_a_folder(pack_table, made, trains)


@given(folders(), TRAINS)
@settings(max_examples=FEW, derandomize=True, **QUIET)
def test_any_folder(made, trains):
    in_a_folder(pack_folder, made, trains)


@pytest.mark.faults
@given(tables(), TRAINS)
@settings(max_examples=MANY, **QUIET)
def test_many_tables(made, trains):
    in_a_folder(pack_table, made, trains)


@pytest.mark.faults
@given(folders(), TRAINS)
@settings(max_examples=MANY, **QUIET)
def test_many_folders(made, trains):
    in_a_folder(pack_folder, made, trains)
