"""`cmvae pack` from another folder than the checkout: exit codes, messages, what is written."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from commands import run_cmvae
from PIL import Image

from cmvae.config import load_config, read_modalities
from cmvae.data.index import ShardIndex


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("work")
    return folder, run_cmvae(
        "pack", "digits", "--out", "shards/digits", "--pairings", 1, "--limit", 60,
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
    assert "cmvae inspect shards/digits\n" in result.stdout
    assert "cmvae train digits data.shards=shards/digits\n" in result.stdout


def test_packing_twice_is_refused_without_a_traceback(packed):
    folder, _ = packed
    result = run_cmvae("pack", "digits", "--out", "shards/digits", folder=folder)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: shards/digits: already holds a packed data set")
    assert "Traceback" not in result.stderr


def test_a_wrong_path_is_explained(tmp_path):
    result = run_cmvae(
        "pack", "polymnist", "--out", "out", "--mnist", "nothing.npz", "--backgrounds", ".",
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
    result = run_cmvae("pack", *flags, "--out", "out", folder=tmp_path)
    assert result.returncode == 2
    assert "usage" in result.stderr


def test_a_table_becomes_shards_a_config_and_a_sheet_of_every_kind(tmp_path):
    rows = ["note,x,y,ok,colour,kind"]
    for n in range(40):
        note = "" if n % 4 == 0 else f"number {n % 3} is here"
        rows.append(f"{note},{n / 2},{-n / 2},{n % 2},{('red', 'blue')[n % 2]},{('odd', 'even')[n % 2]}")
    (tmp_path / "t.csv").write_text("\n".join(rows))
    flags = [
        "pack", "table", "t.csv", "--text", "note", "--vector", "spot=x,y", "--binary", "ok",
        "--categorical", "colour", "--label", "kind", "--out", "shards/t", "--config", "configs/t.yaml",
    ]  # fmt: skip
    result = run_cmvae(*flags, folder=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "note is missing in 10 of 40 samples" in result.stderr
    assert "cmvae train configs/t.yaml\n" in result.stdout
    config = load_config(tmp_path / "configs" / "t.yaml")
    assert read_modalities(config) == ("note", "spot", "ok", "colour")
    again = run_cmvae(*flags, folder=tmp_path)
    assert again.returncode == 2
    assert "configs/t.yaml: is there already" in again.stderr

    result = run_cmvae("inspect", "shards/t", folder=tmp_path)
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


@pytest.mark.parametrize("name", ["label", "Two-Words"])
def test_a_name_that_no_modality_may_have_is_refused_before_anything_is_read(tmp_path, name):
    done = run_cmvae("pack", "table", "none.csv", "--vector", f"{name}=a", "--out", "o", folder=tmp_path)
    assert done.returncode == 2
    assert f"modality name '{name}' must be lower-case letters" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_networks_refuse_is_refused_before_anything_is_written(tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "p.png")
    (tmp_path / "t.csv").write_text("p\n" + "p.png\n" * 30)
    done = run_cmvae("pack", "table", "t.csv", "--image=p", "--image-size=50", "--out=o", folder=tmp_path)
    assert done.returncode == 2
    assert "error: modality 'p': network resnet halves an image" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_a_config_that_cannot_be_written_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("no folder")
    done = run_cmvae(
        "pack", "table", "none.csv", "--vector=x", "--out=o", "--config=file/c.yaml", folder=tmp_path
    )
    assert done.returncode == 2
    assert "error: --config file/c.yaml: cannot be written" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--part=4/3"], "'4/3': there are only 3 parts"),
        (["--part=1"], "argument --part: invalid"),
        (["--part=1/3", "--force"], "error: --force: would delete what other parts packed"),
    ],
)
def test_a_part_that_cannot_be_packed_is_refused_before_anything_is_written(tmp_path, flags, message):
    done = run_cmvae("pack", "digits", "--out=o", *flags, folder=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "o").exists()


def test_parts_are_joined_once_all_are_there(tmp_path):
    flags = ["digits", "--out=o", "--pairings=1", "--limit=60", "--shard-size=25"]
    assert run_cmvae("pack", *flags, "--part=2/2", folder=tmp_path).returncode == 0
    joined = run_cmvae("pack", "join", "o", folder=tmp_path)
    assert joined.returncode == 2
    assert "error: o: 4 of 7 shards are missing or damaged" in joined.stderr
    # What is missing can be packed without --part as well.
    done = run_cmvae("pack", *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "cmvae train digits data.shards=o\n" in done.stdout
    joined = run_cmvae("pack", "join", "o", folder=tmp_path)
    assert joined.returncode == 2
    assert "error: o: has an index already" in joined.stderr
