"""`cmvae cluster` on an untrained export: the table against the model."""

from __future__ import annotations

import csv
import json
import re
import shutil

import numpy as np
import pytest
from commands import run_cmvae, run_without_torch

from cmvae.clustering import responsibilities, vote
from cmvae.data.reader import EvaluationLoader
from cmvae.datasets.base import Sample
from cmvae.datasets.writer import write_shards
from cmvae.modalities import ImageModality
from cmvae.models.cmvae import CMVAE
from cmvae.models.encoding import all_log_weights, encode_split


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def in_order_of_shards(rows, shards, split):
    """The rows of a split, which are sorted by key, as a loader reads it."""
    of_key = {row["key"]: row for row in rows}
    loader = EvaluationLoader(shards, split=split, modalities=["m0"], batch_size=64)
    keys = [batch["key"][place] for batch in loader for place in batch["valid"].nonzero().flatten()]
    assert sorted(keys) == list(of_key)
    return [of_key[key] for key in keys]


def expected_posterior(run, shards, split, places):
    """p(c|z) of a split by the encoders and numpy, without `CMVAE.assign`."""
    model = CMVAE.from_pretrained(run / "export")
    loader = EvaluationLoader(shards, split=split, modalities=model.modality_names, batch_size=64)
    encoded = encode_split(model, loader)
    active = model.cluster_prior.active.numpy()
    return responsibilities(encoded.log_density[:, places], all_log_weights(model), active)


def test_the_table_holds_every_sample_with_its_clusters(make_run, digits_shards, index, tmp_path):
    run, out = make_run(), tmp_path / "assignments.csv"
    done = run_cmvae("cluster", run, digits_shards, "--out", out, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = read(out)
    assert list(rows[0]) == [
        "key", "split", "cluster", "confidence", "m0_cluster", "m0_confidence",
        "m1_cluster", "m1_confidence", "m2_cluster", "m2_confidence",
    ]  # fmt: skip
    total = sum(split.num_samples for split in index.splits.values())
    assert f"{total} samples" in done.stdout
    assert len({(row["split"], row["key"]) for row in rows}) == len(rows) == total

    keys = [row["key"] for row in rows]
    assert keys == sorted(keys)
    for split in index.splits:
        table = in_order_of_shards([row for row in rows if row["split"] == split], digits_shards, split)
        posterior = expected_posterior(run, digits_shards, split, [0, 1, 2])
        voted = vote(posterior)
        assert [int(row["cluster"]) for row in table] == voted.tolist()
        confidence = posterior[np.arange(len(table)), :, voted].mean(axis=1)
        np.testing.assert_allclose([float(row["confidence"]) for row in table], confidence, atol=1e-5)
        for m, name in enumerate(("m0", "m1", "m2")):
            assert [int(row[f"{name}_cluster"]) for row in table] == posterior[:, m].argmax(axis=1).tolist()
            np.testing.assert_allclose(
                [float(row[f"{name}_confidence"]) for row in table], posterior[:, m].max(axis=1), atol=1e-5
            )
    assert {int(row["cluster"]) for row in rows} <= {1, 3, 5}


def test_data_without_labels_and_with_more_modalities(make_run, call, digits_shards, index, tmp_path):
    shards = tmp_path / "unlabelled"
    shutil.copytree(digits_shards, shards)
    content = json.loads((shards / "index.json").read_text())
    (shards / "index.json").write_text(json.dumps({**content, "class_names": None}))
    code, _, err = call("cluster", make_run("m1"), shards, "--out", tmp_path / "a.csv", "--split", "test")
    assert code == 0, err
    assert "note" not in err
    rows = read(tmp_path / "a.csv")
    assert len(rows) == index.splits["test"].num_samples
    assert list(rows[0])[4:] == ["m1_cluster", "m1_confidence"]
    assert all(row["cluster"] == row["m1_cluster"] for row in rows)


def test_missing_modalities_are_named_and_the_others_decide(make_run, call, digits_shards, tmp_path):
    run = make_run("x0", "m2", "m0")
    code, _, err = call("cluster", run, digits_shards, "--out", tmp_path / "a.csv", "--split", "validation")
    assert code == 0, err
    assert "has no x0: clusters are read from m2, m0 alone" in err
    rows = in_order_of_shards(read(tmp_path / "a.csv"), digits_shards, "validation")
    assert list(rows[0])[4:] == ["m2_cluster", "m2_confidence", "m0_cluster", "m0_confidence"]
    model = CMVAE.from_pretrained(run / "export")
    loader = EvaluationLoader(digits_shards, split="validation", modalities=["m2", "m0"], batch_size=512)
    batch = next(iter(loader))
    images = {name: batch[name][: len(rows)] / 255 for name in ("m2", "m0")}
    assert [int(row["cluster"]) for row in rows] == model.assign(images).cluster.tolist()


def test_an_earlier_table_is_only_replaced_when_asked(make_run, call, digits_shards, tmp_path):
    run, out = make_run("m0"), tmp_path / "a.csv"
    out.write_text("mine")
    arguments = ("cluster", run, digits_shards, "--split", "test", "--out", out)
    code, _, err = call(*arguments)
    assert code == 2
    assert "exists. Add --overwrite" in err
    assert out.read_text() == "mine"
    assert call(*arguments, "--overwrite")[0] == 0
    assert out.read_text().startswith("key,split,cluster,confidence")


@pytest.mark.parametrize(
    ("modalities", "size", "out", "split", "expected"),
    [
        (("x0",), 16, "a.csv", "all", r"modalities: it has m0, m1, m2, but the run .* knows only x0"),
        (
            ("m0",),
            8,
            "a.csv",
            "all",
            r"index\.json: modalities\.m0\.shape: \(3, 16, 16\), but .* \(3, 8, 8\)",
        ),
        (("m0",), 16, "no/a.csv", "all", r"not a file in a folder that exists"),
        (("m0",), 16, ".", "all", r"not a file in a folder that exists"),
        (("m0",), 16, "a.csv", "dev", r"no split 'dev'; it has train, validation, test"),
    ],
)
def test_what_does_not_fit_is_explained_and_nothing_is_written(
    make_run, call, digits_shards, tmp_path, modalities, size, out, split, expected
):
    run = make_run(*modalities, size=size)
    code, _, err = call("cluster", run, digits_shards, "--split", split, "--out", tmp_path / out)
    assert code == 2
    assert re.search(expected, err)
    assert not list(tmp_path.glob("*.csv"))


def test_a_refiner_has_no_clusters_of_its_own(make_refiner_run, digits_shards, tmp_path):
    run, out = make_refiner_run()[0], tmp_path / "a.csv"
    done = run_without_torch("cluster", run, digits_shards, "--out", out, folder=tmp_path)
    assert done.returncode == 2
    assert f"error: {run}: the run of a refiner. Give the run of a CMVAE" in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


class Gaps:
    """Random pictures without labels; sample i has those modalities whose bit is set in i, the last none."""

    name, class_names, settings = "gaps", None, {}
    modalities = dict.fromkeys(("m0", "m1", "m2"), ImageModality(shape=(3, 16, 16), optional=True))
    split_sizes = {"test": 8}  # noqa: RUF012

    def sample(self, split, index):
        pictures = np.random.default_rng(index).integers(256, size=(3, 3, 16, 16), dtype=np.uint8)
        kept = [m for m in range(3) if (index + 1) >> m & 1]
        return Sample({f"m{m}": pictures[m] for m in kept} if index < 7 else {"m2": pictures[2]}, None)


def test_cells_are_empty_where_a_modality_is_missing(make_run, call, tmp_path):
    run, out = make_run(), tmp_path / "assignments.csv"
    write_shards(Gaps(), tmp_path / "gaps")
    code, _, err = call("cluster", run, tmp_path / "gaps", "--out", out)
    assert code == 0, err
    posterior = expected_posterior(run, tmp_path / "gaps", "test", [0, 1, 2])
    rows = in_order_of_shards(read(out), tmp_path / "gaps", "test")
    for n, row in enumerate(rows):
        index = int(row["key"].rpartition("-")[2])
        there = [bool((index + 1) >> m & 1) for m in range(3)] if index < 7 else [False, False, True]
        assert [row[f"m{m}_cluster"] != "" for m in range(3)] == there
        assert [row[f"m{m}_confidence"] != "" for m in range(3)] == there
        assert int(row["cluster"]) == vote(posterior[n : n + 1, there])[0]
        expected = posterior[n, there, int(row["cluster"])].mean()
        assert float(row["confidence"]) == pytest.approx(expected, abs=1e-5)


def test_samples_without_anything_to_go_by_are_counted_apart(make_run, call, tmp_path):
    run, out = make_run("m0", "m1"), tmp_path / "assignments.csv"
    write_shards(Gaps(), tmp_path / "gaps")
    code, said, err = call("cluster", run, tmp_path / "gaps", "--out", out)
    assert code == 0, err
    assert "6 samples in" in said
    assert "2 samples have none of m0, m1" in said
    without = [row for row in read(out) if row["cluster"] == ""]
    assert len(without) == 2
    assert all(value == "" for row in without for key, value in row.items() if key not in ("key", "split"))
