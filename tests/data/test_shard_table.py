"""A split whose shards are listed in a file of their own reads as one whose index lists them."""

import json
import struct

import numpy as np
import pytest
import torch

from cmvae.commands.inspect import verify
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader, TrainingLoader
from cmvae.data.shard_table import open_shards, write_shard_table
from cmvae.utils.errors import UserError

SIZES = [7, 11, 3, 9, 13, 5, 2]


@pytest.fixture
def folder(make_folder):
    """The shards of the train split are in `train.shards`; `listed.json` is the index with all of them."""
    folder = make_folder(SIZES)
    (folder / "index.json").rename(folder / "listed.json")
    index = json.loads((folder / "listed.json").read_text())
    shards = ShardIndex.model_validate(index).splits["train"].shards
    table = write_shard_table(folder / "train.shards", shards)
    del index["splits"]["train"]["shards"]
    index["splits"]["train"]["shard_table"] = table.model_dump()
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def test_a_table_has_the_shards_of_the_index(folder):
    listed = ShardIndex.model_validate_json((folder / "listed.json").read_bytes()).splits["train"]
    split = ShardIndex.load(folder).splits["train"]
    shards = open_shards(split, folder)
    assert tuple(shards) == listed.shards
    assert tuple(shards[2:5]) == listed.shards[2:5]
    assert (split.num_shards, split.num_bytes) == (listed.num_shards, listed.num_bytes)
    # The documented layout, read without numpy.
    content = (folder / "train.shards").read_bytes()
    assert list(struct.unpack_from("<7I", content)) == SIZES
    assert list(struct.unpack_from("<7Q", content, 28)) == [shard.num_bytes for shard in listed.shards]
    assert content[84 + 32 : 84 + 64].hex() == listed.shards[1].sha256
    assert content[84 + 7 * 32 :].startswith(b"train-0.tartrain-1.tar")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_split_with_a_table_reads_the_same_batches(folder, make_folder, num_workers):
    settings = {"modalities": ["m0"], "batch_size": 4, "num_workers": num_workers}
    tabled = list(TrainingLoader(folder, **settings).epoch_batches(1))
    tabled += list(EvaluationLoader(folder, split="train", **settings))
    verify(folder, ShardIndex.load(folder))
    (folder / "listed.json").rename(folder / "index.json")
    listed = list(TrainingLoader(folder, **settings).epoch_batches(1))
    listed += list(EvaluationLoader(folder, split="train", **settings))
    assert [batch["key"] for batch in tabled] == [batch["key"] for batch in listed]
    assert all(torch.equal(a["m0"], b["m0"]) for a, b in zip(tabled, listed, strict=True))


def damaged(content, **changes):
    """The table with other values in some columns."""
    count = len(SIZES)
    columns = np.frombuffer(bytearray(content), np.uint8).copy()
    for offset, value in changes.values():
        columns[offset : offset + len(value)] = np.frombuffer(value, np.uint8)
    assert len(columns) == len(content) == count * (44 + len("train-0.tar"))
    return columns.tobytes()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content[:-1], "bytes of its index"),
        (lambda content: b"", "bytes of its index"),
        (lambda content: damaged(content, empty=(4, bytes(4))), "a shard without samples"),
        (lambda content: damaged(content, more=(0, b"\x08")), "have 51 samples, but the index says 50"),
        (lambda content: damaged(content, name=(84 + 224, b"../../a.tar")), "shard 0: .*plain file name"),
    ],
)
def test_a_damaged_table_is_named(folder, change, words):
    path = folder / "train.shards"
    content = change(path.read_bytes())
    path.unlink()
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"train\.shards: .*{words}"):
        list(EvaluationLoader(folder, split="train", modalities=["m0"], batch_size=4))
    with pytest.raises(UserError):
        verify(folder, ShardIndex.load(folder))


def test_a_missing_table_is_named(folder):
    (folder / "train.shards").unlink()
    with pytest.raises(UserError, match=r"train\.shards: missing"):
        TrainingLoader(folder, modalities=["m0"], batch_size=4)


def test_a_changed_table_is_found_by_its_checksum(folder):
    path = folder / "train.shards"
    content = path.read_bytes()
    path.unlink()
    # The first two shards have exchanged a sample.
    path.write_bytes(struct.pack("<2I", 8, 10) + content[8:])
    with pytest.raises(UserError, match=r"train\.shards: its SHA-256"):
        verify(folder, ShardIndex.load(folder))


def test_paths_and_two_lists_of_shards_are_refused(folder):
    index = json.loads((folder / "index.json").read_text())
    split = index["splits"]["train"]
    for change in ({"shard_table": {**split["shard_table"], "name": "../train.shards"}}, {"shards": [{
        "name": "train-0.tar", "num_samples": 50, "num_bytes": 1, "sha256": "0" * 64}]}):  # fmt: skip
        index["splits"]["train"] = split | change
        (folder / "index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match=r"splits\.train"):
            ShardIndex.load(folder)
