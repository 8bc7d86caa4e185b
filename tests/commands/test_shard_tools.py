"""The shard tools as a user runs them: from another folder, without installing; exit codes, messages."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, run_tool
from handmade_shards import members_of, write_index, write_tar
from PIL import Image

from cmvae.config import load_config, read_modalities
from cmvae.data.index import ShardIndex


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("work")
    return folder, run_tool(
        "make_shards.py", "digits", "--out", "shards/digits", "--pairings", 1, "--limit", 60,
        "--shard-size", 25, folder=folder,
    )  # fmt: skip


def test_packing_prints_what_was_done_and_what_is_next(packed):
    folder, result = packed
    assert result.returncode == 0, result.stderr
    index = ShardIndex.load(folder / "shards" / "digits")
    assert {name: split.num_samples for name, split in index.splits.items()} == {
        "train": 60, "validation": 30, "test": 30
    }  # fmt: skip
    assert "120 samples" in result.stdout
    assert "samples/s" in result.stdout
    assert "python tools/inspect_shards.py shards/digits" in result.stdout
    assert "launch/train.py configs/digits.yaml data.shards=shards/digits\n" in result.stdout


def test_packing_twice_is_refused_without_a_traceback(packed):
    folder, _ = packed
    result = run_tool("make_shards.py", "digits", "--out", "shards/digits", folder=folder)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: shards/digits: holds a packed data set already")
    assert "Traceback" not in result.stderr


def test_a_wrong_path_is_explained(tmp_path):
    result = run_tool(
        "make_shards.py", "polymnist", "--out", "out", "--mnist", "nothing.npz", "--backgrounds", ".",
        folder=tmp_path,
    )  # fmt: skip
    assert result.returncode == 2
    assert "nothing.npz: no such file" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags", [["digits", "--mnist", "x"], ["polymnist"], ["polymnist", "--released", "a", "--download"]]
)
def test_flags_belong_to_their_source(tmp_path, flags):
    result = run_tool("make_shards.py", *flags, "--out", "out", folder=tmp_path)
    assert result.returncode == 2
    assert "usage" in result.stderr


def test_inspection_counts_verifies_draws_and_then_finds_a_flipped_byte(packed):
    folder, _ = packed
    result = run_tool("inspect_shards.py", "shards/digits", folder=folder)
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()}
    assert rows["train"][:2] == ["60", "3"]
    assert rows["m2"] == ["image", "uint8", "3×16×16"]
    counts = [[int(count) for count in rows[str(digit)]] for digit in range(10)]
    assert [sum(column) for column in zip(*counts, strict=True)] == [60, 30, 30]
    with Image.open(folder / "shards" / "digits" / "contact_sheet.png") as sheet:
        assert len(sheet.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 100

    # A pixel of noise in the last picture of a shard: the tar still reads, only its checksum tells.
    shard = folder / "shards" / "digits" / "train-000001.tar"
    content = bytearray(shard.read_bytes())
    content[content.rindex(b"IDAT") + 20] ^= 1
    shard.write_bytes(content)
    result = run_tool("inspect_shards.py", "shards/digits", "--sheet", "sheet.png", folder=folder)
    assert result.returncode == 2
    assert "train-000001.tar: its SHA-256" in result.stderr
    assert "train-000000.tar" not in result.stderr
    assert not (folder / "sheet.png").exists()


def test_inspection_finds_a_key_that_two_shards_have(tmp_path):
    for number, samples in enumerate([(0, 1, 2), (3, 1)]):
        members = [(f"k{i:05d}.{suffix}", old) for i in samples for suffix, old in members_of(i).items()]
        write_tar(tmp_path / f"train-{number}.tar", members)
    write_index(tmp_path, "train", [3, 2])
    done = run_tool("inspect_shards.py", tmp_path, folder=tmp_path)
    assert done.returncode == 2
    assert "train-1.tar: the key k00001 is in an earlier shard of train, too" in done.stderr


def test_inspection_without_verification_only_looks(packed, monkeypatch):
    folder, _ = packed
    sheet = folder / "looked.png"
    monkeypatch.setattr(
        sys, "argv", ["inspect", str(folder / "shards" / "digits"), "--no-verify", "--sheet", str(sheet)]
    )
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / "inspect_shards.py"), run_name="__main__")
    assert end.value.code == 0
    assert sheet.is_file()


def test_a_table_becomes_shards_a_config_and_a_sheet_of_every_kind(tmp_path):
    rows = ["note,x,y,ok,colour,kind"]
    for n in range(40):
        note = "" if n % 4 == 0 else f"number {n % 3} is here"
        rows.append(f"{note},{n},{-n},{n % 2},{('red', 'blue')[n % 2]},{('odd', 'even')[n % 2]}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    flags = [
        "make_shards.py", "table", "t.csv", "--text", "note", "--vector", "place=x,y", "--binary", "ok",
        "--categorical", "colour", "--label", "kind", "--out", "shards/t", "--config", "configs/t.yaml",
    ]  # fmt: skip
    result = run_tool(*flags, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "note is missing in 10 of 40 samples" in result.stderr
    assert "launch/train.py configs/t.yaml" in result.stdout
    config = load_config(tmp_path / "configs" / "t.yaml")
    assert read_modalities(config) == ("note", "place", "ok", "colour")
    again = run_tool(*flags, folder=tmp_path)
    assert again.returncode == 2
    assert "configs/t.yaml: is there already" in again.stderr

    result = run_tool("inspect_shards.py", "shards/t", folder=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if line.strip()]
    assert ["note", "text", "int64", "8", "9", "words"] in lines
    assert ["colour", "categorical", "int64", "scalar", "2", "categories"] in lines
    (missing,) = (line[1:] for line in lines if line[0] == "note" and line[1].isdigit())
    assert sum(map(int, missing)) == 10
    assert ["odd", "16", "2", "2"] in lines
    sheet = Image.open(tmp_path / "shards" / "t" / "contact_sheet.png").convert("RGB")
    # The grey of what is missing, the vectors' bars.
    colours = {colour: count for count, colour in sheet.getcolors(maxcolors=1 << 20) or []}
    assert colours[(0xDE, 0xE2, 0xE6)] > 3000
    assert (0x22, 0x33, 0x3B) in colours


def test_inspecting_nothing_says_how_to_pack(tmp_path):
    result = run_tool("inspect_shards.py", "shards/none", folder=tmp_path)
    assert result.returncode == 2
    assert "shards/none: no such shard folder" in result.stderr
    assert "make_shards.py" in result.stderr
