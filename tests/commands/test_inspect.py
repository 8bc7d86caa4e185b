"""`cmvae inspect`: what it counts, verifies and draws."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import run_cmvae
from handmade_shards import members_of, write_index, write_tar
from PIL import Image

from cmvae.data.index import ShardIndex


@pytest.fixture
def folder(digits_shards, tmp_path) -> Path:
    """A folder with a copy of the digits in shards/digits."""
    copy = shutil.copytree(digits_shards, tmp_path / "shards" / "digits")
    for file in copy.iterdir():
        file.chmod(0o644)
    return tmp_path


def test_inspection_counts_verifies_draws_and_then_finds_a_flipped_byte(folder):
    result = run_cmvae("inspect", "shards/digits", folder=folder)
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line.split()[1:] for line in result.stdout.splitlines() if line.strip()}
    index = ShardIndex.load(folder / "shards" / "digits")
    samples = [split.num_samples for split in index.splits.values()]
    assert rows["train"][:2] == [str(samples[0]), "1"]
    assert rows["m2"] == ["image", "uint8", "3×16×16"]
    counts = [[int(count) for count in rows[str(digit)]] for digit in range(10)]
    assert [sum(column) for column in zip(*counts, strict=True)] == samples
    with Image.open(folder / "shards" / "digits" / "contact_sheet.png") as sheet:
        assert len(sheet.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 100

    # A pixel of noise in the last picture of a shard: the tar still reads, only its checksum tells.
    shard = folder / "shards" / "digits" / "train-000000.tar"
    content = bytearray(shard.read_bytes())
    content[content.rindex(b"IDAT") + 20] ^= 1
    shard.write_bytes(content)
    result = run_cmvae("inspect", "shards/digits", "--sheet", "sheet.png", folder=folder)
    assert result.returncode == 2
    assert "train-000000.tar: its SHA-256" in result.stderr
    assert "test-000000.tar" not in result.stderr
    assert not (folder / "sheet.png").exists()


def test_inspection_finds_a_key_that_two_shards_have(tmp_path):
    for number, samples in enumerate([(0, 1, 2), (3, 1)]):
        members = [(f"k{i:05d}.{suffix}", old) for i in samples for suffix, old in members_of(i).items()]
        write_tar(tmp_path / f"train-{number}.tar", members)
    write_index(tmp_path, "train", [3, 2])
    done = run_cmvae("inspect", tmp_path, folder=tmp_path)
    assert done.returncode == 2
    assert "train-1.tar: the key k00001 is in an earlier shard of train, too" in done.stderr


def test_inspection_without_verification_only_looks(call, folder):
    sheet = folder / "looked.png"
    assert call("inspect", folder / "shards" / "digits", "--no-verify", "--sheet", sheet)[0] == 0
    assert sheet.is_file()


def test_inspecting_nothing_says_how_to_pack(tmp_path):
    result = run_cmvae("inspect", "shards/none", folder=tmp_path)
    assert result.returncode == 2
    assert "shards/none: no such shard folder" in result.stderr
    assert "cmvae pack digits --out shards/none" in result.stderr
