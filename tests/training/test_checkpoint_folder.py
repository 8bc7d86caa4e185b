"""Which checkpoint a run goes on from, whatever happened to the folder before."""

import logging
import os

import pytest

from cmvae.training.checkpoint_folder import (
    MANIFEST_NAME,
    find_damage,
    find_newest,
    list_checkpoints,
    thin_out,
    write_manifest,
)
from cmvae.utils.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for step in (3, 6, 9):
        checkpoint = tmp_path / f"step-{step:08d}"
        (checkpoint / "shards").mkdir(parents=True)
        (checkpoint / "state.json").write_text(f'{{"step": {step}}}')
        (checkpoint / "model.safetensors").write_bytes(os.urandom(3 * 2**20))
        (checkpoint / "shards/rank_1.pt").write_bytes(os.urandom(100))
        write_manifest(checkpoint)
    return tmp_path


def steps(folder):
    return [int(path.name.removeprefix("step-")) for path in list_checkpoints(folder)]


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "truncated": lambda c: truncate(c / "model.safetensors"),
    "bit": lambda c: flip_a_bit(c / "model.safetensors"),
    "empty": lambda c: os.truncate(c / "shards/rank_1.pt", 0),
    "missing": lambda c: (c / "shards/rank_1.pt").unlink(),
    "state": lambda c: (c / "state.json").write_text("{"),
    "manifest": lambda c: truncate(c / MANIFEST_NAME),
    "no manifest": lambda c: (c / MANIFEST_NAME).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_newest_is_told_set_aside_and_the_one_before_used(folder, caplog, damage):
    assert find_damage(folder / "step-00000009") is None
    damage(folder / "step-00000009")
    with caplog.at_level(logging.WARNING):
        assert find_newest(folder) == folder / "step-00000006"
    assert "step-00000009: damaged: " in caplog.text
    # Where it does not count as one of the newest, and is there to be looked at.
    assert steps(folder) == [3, 6]
    assert (folder / "damaged-step-00000009").is_dir()


def test_the_damage_is_named(folder):
    newest = folder / "step-00000009"
    (newest / "shards/rank_1.pt").unlink()
    assert find_damage(newest) == "shards/rank_1.pt is missing"
    flip_a_bit(newest / "model.safetensors")
    assert find_damage(newest) == "model.safetensors does not match its checksum"


def test_several_damaged_ones_in_a_row(folder):
    for step in (6, 9):
        flip_a_bit(folder / f"step-{step:08d}/model.safetensors")
    assert find_newest(folder) == folder / "step-00000003"
    assert steps(folder) == [3]


def test_all_damaged_is_an_error_and_nothing_is_touched(folder):
    for step in (3, 6, 9):
        flip_a_bit(folder / f"step-{step:08d}/model.safetensors")
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        find_newest(folder)
    assert steps(folder) == [3, 6, 9]


def test_none_is_none(tmp_path):
    assert find_newest(tmp_path / "never") is None


def test_what_a_killed_process_left_is_removed_or_restored(folder):
    (folder / ".step-00000012.partial").mkdir()
    (folder / ".step-00000012.partial/half").touch()
    # Killed between the two renames that replace a checkpoint, and after them.
    (folder / "step-00000009").rename(folder / ".step-00000009.old")
    (folder / ".step-00000006.old").mkdir()
    # Killed while deleting.
    (folder / "step-00000003").rename(folder / ".step-00000003.deleted")
    (folder / "of-the-user").mkdir()
    assert find_newest(folder) == folder / "step-00000009"
    assert sorted(path.name for path in folder.iterdir()) == [
        "of-the-user",
        "step-00000006",
        "step-00000009",
    ]


def test_an_interrupted_deletion_leaves_no_half_checkpoint(folder, monkeypatch):
    def killed(path, **_):
        (path / MANIFEST_NAME).unlink(missing_ok=True)
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        thin_out(folder, num_newest=2, best_step=None)
    monkeypatch.undo()
    assert find_newest(folder) == folder / "step-00000009"
    assert steps(folder) == [6, 9]
    assert all(path.name.startswith("step-") for path in folder.iterdir())


def test_the_newest_and_the_best_are_kept(folder):
    thin_out(folder, num_newest=1, best_step=3)
    assert steps(folder) == [3, 9]
    thin_out(folder, num_newest=1, best_step=None)
    assert steps(folder) == [9]
