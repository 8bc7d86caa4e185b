"""Groups of samples: packed, read back as names and numbers, and absent where there are none."""

import numpy as np
import pytest
from packing import NumberSource, contents, read, write_csv

from cmvae.data import groups
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.datasets.base import Sample
from cmvae.datasets.writer import write_shards
from cmvae.utils.errors import UserError


class GroupedSource(NumberSource):
    """Sample i is of the group `photo i // 3`; every fifth has none. Those of the test split have none."""

    def sample(self, split, index):
        grouped = split == "train" and index % 5
        picture = np.full((1, 2, 2), index, dtype=np.uint8)
        return Sample({"m0": picture}, label=index, group=f"photo {index // 3} ü" if grouped else None)


def test_groups_are_read_back_as_names_and_as_numbers_that_tell_them_apart(tmp_path):
    index = write_shards(GroupedSource(), tmp_path, shard_size=7)
    assert {name: split.num_groups for name, split in index.splits.items()} == {"train": 20, "test": 0}
    read_back = {}
    for batch in EvaluationLoader(tmp_path, split="train", modalities=["m0"], batch_size=16):
        for place in batch["valid"].nonzero().flatten().tolist():
            number = int(batch["label"][place])
            name = f"photo {number // 3} ü" if number % 5 else None
            assert batch["group_name"][place] == name
            read_back.setdefault(name, set()).add(int(batch["group"][place]))
    assert read_back.pop(None) == {-1}
    assert len(read_back) == 20
    assert all(len(numbers) == 1 for numbers in read_back.values())
    assert len(set.union(*read_back.values())) == 20
    assert min(set.union(*read_back.values())) >= 0


def test_the_number_of_a_group_is_the_same_in_every_process_and_version():
    # The reader computes it, so that packed data does not depend on it; ranks do.
    assert groups.group_number("photo 1") == 7897457226335780544
    assert groups.group_number(None) == -1


def test_batches_of_a_split_without_groups_hold_none(tmp_path):
    write_shards(GroupedSource(), tmp_path, shard_size=7)
    (batch,) = EvaluationLoader(tmp_path, split="test", modalities=["m0"], batch_size=10)
    assert not {"group", "group_name"} & set(batch)


def test_the_bytes_of_groups_do_not_depend_on_the_number_of_processes(tmp_path):
    for name, num_workers in (("a", 1), ("b", 2)):
        write_shards(GroupedSource(), tmp_path / name, shard_size=7, num_workers=num_workers)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_an_index_of_an_earlier_version_has_no_groups(tmp_path):
    path = tmp_path / "index.json"
    write_shards(NumberSource(), tmp_path, shard_size=30)
    text = path.read_text()
    assert '"num_groups": 0' in text
    path.write_text(text.replace(',\n      "num_groups": 0', ""))
    assert "num_groups" not in path.read_text()
    assert ShardIndex.load(tmp_path).splits["train"].num_groups == 0


def test_groups_that_numbers_do_not_tell_apart_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "group_number", len)
    with pytest.raises(UserError, match=r"groups 'photo \d+ ü' and 'photo \d+ ü' have the same number"):
        write_shards(GroupedSource(), tmp_path, shard_size=7)
    assert not (tmp_path / "index.json").exists()


@pytest.mark.parametrize("on_error", ["error", "skip"])
def test_a_damaged_group_is_damage_of_its_sample(tmp_path, on_error):
    write_shards(GroupedSource(), tmp_path, shard_size=60)
    shard = tmp_path / "train-000000.tar"
    content = shard.read_bytes()
    place = content.index("photo 7 ü".encode())
    shard.chmod(0o644)
    shard.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    loader = EvaluationLoader(tmp_path, split="train", modalities=["m0"], batch_size=60, on_error=on_error)
    if on_error == "error":
        with pytest.raises(UserError, match=r"group: b'\\xffhoto 7 .*' is not a name in UTF-8"):
            next(iter(loader))
    else:
        batch = next(iter(loader))
        assert len(batch["skipped"]) == 1
        assert batch["valid"].sum() == 59


def test_a_table_keeps_its_groups(tmp_path):
    rows = [{"x": float(number), "bird": f"bird {number // 4}"} for number in range(80)]
    source = read(write_csv(tmp_path / "t.csv", rows), "--vector x --group bird")
    index = write_shards(source, tmp_path / "out")
    assert sum(split.num_groups for split in index.splits.values()) == 20
    for split in index.splits:
        loader = EvaluationLoader(tmp_path / "out", split=split, modalities=["x"], batch_size=80)
        for batch in loader:
            expected = [f"bird {int(value) // 4}" for value in batch["x"][:, 0].tolist()]
            assert batch["group_name"] == expected
