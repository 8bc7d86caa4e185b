"""`cmvae cluster --by-group` and `--modalities` on an untrained export, against averaging by hand."""

from __future__ import annotations

import csv
import re

import numpy as np
import pytest

from cmvae.clustering import joint_location, responsibilities
from cmvae.data.reader import EvaluationLoader
from cmvae.datasets.base import Sample
from cmvae.datasets.writer import write_shards
from cmvae.modalities import ImageModality
from cmvae.models.cmvae import CMVAE
from cmvae.models.encoding import all_log_weights, encode_split

NAMES = ("m0", "m1", "m2")


class Birds:
    """Random pictures; four of a bird, which may lack some, and in each split two of no bird.

    Bird 0 is in both splits, bird 1 lacks m1 in every picture, and bird 2 lacks everything.
    """

    name, class_names, settings = "birds", None, {}
    modalities = dict.fromkeys(NAMES, ImageModality(shape=(3, 16, 16), optional=True))
    split_sizes = {"train": 14, "test": 6}  # noqa: RUF012

    def sample(self, split, index):
        rng = np.random.default_rng([index, split == "test"])
        pictures = rng.integers(256, size=(3, 3, 16, 16), dtype=np.uint8)
        bird = index // 4 if index < self.split_sizes[split] - 2 else None
        lacking = {None: {0}, 0: {index % 3}, 1: {1}, 2: {0, 1, 2}}[bird]
        values = {name: pictures[m] for m, name in enumerate(NAMES) if m not in lacking}
        return Sample(values, None, group=None if bird is None else f"bird {bird}")


@pytest.fixture
def birds(tmp_path):
    write_shards(Birds(), tmp_path / "birds", shard_size=5)
    return tmp_path / "birds"


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def by_hand(run, shards):
    """Row to (cluster, confidence) of its group by all modalities and by each, None where all lack it."""
    model = CMVAE.from_pretrained(run / "export")
    located, groups = [], {}
    for split in Birds.split_sizes:
        batches = list(EvaluationLoader(shards, split=split, modalities=NAMES, batch_size=4))
        encoded = encode_split(model, batches)
        keys = [(b["key"][n], b["group_name"][n]) for b in batches for n in b["valid"].nonzero().flatten()]
        for n, (key, group) in enumerate(keys):
            groups.setdefault(group or key, []).append(len(located))
            located.append((key, encoded.shared_loc[n], encoded.present[n]))
    active, log_weights = model.cluster_prior.active.numpy(), all_log_weights(model)

    def decide(means):
        if not means:
            return None
        location = joint_location(np.stack(means)[None], np.ones((1, len(means)), bool))
        density = model.log_density(location)[:, None]
        p = responsibilities(density, log_weights, active)[0, 0]
        return int(p.argmax()), float(p.max())

    found = {}
    for members in groups.values():
        means = {
            m: np.mean([located[n][1][m] for n in members if located[n][2][m]], axis=0)
            for m in range(3)
            if any(located[n][2][m] for n in members)
        }
        cells = {"": decide(list(means.values()))}
        cells |= {f"{name}_": decide([means[m]] if m in means else []) for m, name in enumerate(NAMES)}
        found |= {located[n][0]: cells for n in members}
    return found


def test_a_group_has_one_cluster_which_is_that_of_its_means(make_run, call, birds, tmp_path):
    run, out = make_run(), tmp_path / "a.csv"
    code, said, err = call("cluster", run, birds, "--out", out, "--by-group")
    assert code == 0, err
    assert "16 samples in" in said
    assert "4 samples have none of m0, m1, m2" in said
    rows = read(out)
    assert list(rows[0])[:5] == ["key", "split", "group", "cluster", "confidence"]
    assert [row["key"] for row in rows] == sorted(row["key"] for row in rows)
    sizes = {
        group: sum(row["group"] == group for row in rows) for group in ("bird 0", "bird 1", "bird 2", "")
    }
    assert sizes == {"bird 0": 8, "bird 1": 4, "bird 2": 4, "": 4}
    expected = by_hand(run, birds)
    for row in rows:
        for prefix, decision in expected[row["key"]].items():
            if decision is None:
                assert row[f"{prefix}cluster"] == row[f"{prefix}confidence"] == ""
            else:
                assert int(row[f"{prefix}cluster"]) == decision[0]
                assert float(row[f"{prefix}confidence"]) == pytest.approx(decision[1], abs=1e-5)
    alone = [row for row in rows if row["group"] == ""]
    assert len({row["confidence"] for row in alone}) == 4, "samples without a group are decided one by one"


def test_clusters_are_read_from_the_modalities_that_are_named(make_run, call, birds, tmp_path):
    run, out = make_run(), tmp_path / "a.csv"
    code, _, err = call("cluster", run, birds, "--out", out, "--by-group", "--modalities", "m2")
    assert code == 0, err
    rows = read(out)
    assert list(rows[0])[3:] == ["cluster", "confidence", "m2_cluster", "m2_confidence"]
    expected = by_hand(run, birds)
    for row in rows:
        decision = expected[row["key"]]["m2_"]
        assert row["cluster"] == ("" if decision is None else str(decision[0]))


def test_data_without_groups_is_refused_with_what_to_do(make_run, call, digits_shards, tmp_path):
    out = tmp_path / "a.csv"
    code, _, err = call("cluster", make_run(), digits_shards, "--out", out, "--by-group")
    assert code == 2
    assert f"--by-group: {digits_shards}: no sample of train, validation, test has a group" in err
    assert "--group COLUMN" in err
    assert not out.exists()


@pytest.mark.parametrize(
    ("names", "expected"),
    [("m0,m7", r"--modalities m7: .*runs.* has no such modality, only m0, x0"), ("x0", "birds has no such")],
)
def test_a_modality_that_is_not_there_is_refused(make_run, call, birds, tmp_path, names, expected):
    code, _, err = call(
        "cluster", make_run("m0", "x0"), birds, "--out", tmp_path / "a.csv", "--modalities", names
    )
    assert code == 2
    assert re.search(expected, err)
