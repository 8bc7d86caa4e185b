"""Data of all kinds, a third of it missing: from shards to a report, and back to pictures and tables."""

from __future__ import annotations

import csv
import json
import runpy
import sys

import numpy as np
import pytest
import yaml
from commands import ROOT
from mixed import MODALITIES, VOCABULARY, Mixed

from cmvae.datasets.writer import write_shards


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A trained CMVAE and its refiner, both for a few steps, on packed data; beside them MLflow's store."""
    folder = tmp_path_factory.mktemp("mixed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
        patch.chdir(folder)  # where MLflow makes its folder of artifacts
        yield train(folder)


def train(folder):
    """Pack and train; the same folder."""
    write_shards(Mixed(missing=0.3), folder / "shards")
    common = {
        "data": {"shards": str(folder / "shards"), "num_workers": 0},
        "optimizer": {"learning_rate": 0.002},
        "evaluation": {
            "batch_size": 32,
            "num_generated": 70,
            "likelihood_samples": 10,
            "map_samples": 50,
        },
    }
    (folder / "cmvae.yaml").write_text(
        yaml.safe_dump(
            {
                **common,
                "name": "mixed",
                "output_dir": str(folder / "run"),
                "model": {
                    "shared_dim": 4,
                    "private_dim": 3,
                    "num_clusters": 6,
                    "modalities": {name: {"width": 8} for name in MODALITIES},
                },
                "train": {"batch_size": 24, "max_steps": 8},
            }
        )
    )
    (folder / "refiner.yaml").write_text(
        yaml.safe_dump(
            {
                **common,
                "name": "refined",
                "cmvae": str(folder / "run"),
                "output_dir": str(folder / "refined"),
                "tracking": {"enabled": False},
                "refiner": {
                    "network": {"channels": 8, "multipliers": [1, 2], "blocks": 1},
                    "diffusion": {"num_timesteps": 20},
                    "conditioning": {"latent": True},
                    "sampler": {"num_steps": 2},
                },
                "train": {"batch_size": 24, "max_steps": 3},
            }
        )
    )
    for command in (
        ["tools/train_classifiers.py", folder / "shards", "--epochs", "40", "--width", "4"],
        ["launch/train.py", folder / "cmvae.yaml"],
        ["launch/train.py", folder / "refiner.yaml"],
    ):
        run(*command)
    return folder


def run(script, *arguments):
    """A command in this process, which has imported everything already."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    assert not end.value.code


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_everything_is_evaluated_that_can_be(folder):
    run("launch/evaluate.py", folder / "run")
    metrics, protocol = (
        json.loads((folder / f"run/evaluation/{name}.json").read_text()) for name in ("metrics", "protocol")
    )
    groups = {name.split("/")[0] for name in metrics}
    assert groups == {
        "clustering", "clustering_all", "coherence", "fidelity", "frechet", "likelihood", "prediction",
        "probe", "text",
    }  # fmt: skip
    matrix = {tuple(name.split("/")[2:]) for name in metrics if name.startswith("coherence/matrix/")}
    assert matrix == {(source, target) for source in MODALITIES for target in ("photo", "caption")}
    assert protocol["classifier.accuracy.caption"] > 0.95
    for name in ("sizes", "marks", "habitat"):
        assert "a source only" in protocol["left_out"][f"coherence/{name}"]
        assert "distances are between images" in protocol["left_out"][f"frechet/{name}"]
    there = {name: sum(name in Mixed(0.3).sample("test", n).values for n in range(60)) for name in MODALITIES}
    assert {name: protocol[f"generative.num_samples.{name}"] for name in MODALITIES} == there
    assert {name: protocol[f"probe.test_samples.{name}"] for name in MODALITIES} == there
    figures = {path.stem for path in (folder / "run/evaluation/figures").iterdir()}
    assert figures >= {"cross_modal", "cluster_samples", "latent_map", "coherence_matrix"}


def test_words_are_shown_as_text_in_training_and_evaluation(folder):
    run("launch/evaluate.py", folder / "run", "metrics=[text]")
    (artifacts,) = folder.glob("mlruns/*/*/artifacts")
    assert (artifacts / "figures/cross_modal.png").is_file()
    of_training, of_evaluation = (
        (artifacts / "texts" / name).read_text()
        for name in ("cross_modal/step-00000008.txt", "cross_modal.txt")
    )
    assert (folder / "run/evaluation/texts/cross_modal.txt").read_text() == of_evaluation
    for text, split in ((of_training, "validation"), (of_evaluation, "test")):
        samples = text.split("\nsample ")[1:]
        assert len(samples) == 8
        told = {real_words(sample, "caption") for sample in samples}
        source = Mixed(missing=0.3)
        there = [source.sample(split, n).values.get("caption") for n in range(source.split_sizes[split])]
        assert told <= {
            "(missing)" if x is None else " ".join(VOCABULARY[n] for n in x if n > 1) for x in there
        }


def real_words(sample, modality):
    """What a listing says of a modality of a sample."""
    lines = sample.splitlines()
    title, words = lines[lines.index(f"  {modality}") + 1].split(maxsplit=1)
    assert title == "real"
    return words


def test_anything_is_generated_from_anything(folder, tmp_path):
    out = tmp_path / "out"
    run("launch/generate.py", folder / "run", "--given", "caption,sizes", "--num", 12, "--out", out)
    samples = [n for n in range(60) if {"caption", "sizes"} & set(Mixed(0.3).sample("test", n).values)]
    tables = {name: read(out / f"{name}.csv") for name in MODALITIES if name != "photo"}
    names = [row["name"] for row in tables["caption"]]
    assert 0 < len(names) <= 12
    assert {int(name.rpartition("-")[2]) for name in names} <= set(samples)
    assert sorted(path.stem for path in (out / "photo").iterdir()) == names
    for name, table in tables.items():
        assert [row["name"] for row in table] == names, name
    assert all(set(row["text"].split()) <= set(VOCABULARY) for row in tables["caption"])
    assert list(tables["sizes"][0]) == ["name", "wing", "beak"]
    # In centimetres, not in standard deviations.
    assert 20 < np.mean([float(row["wing"]) for row in tables["sizes"]]) < 80
    assert {row["crest"] for row in tables["marks"]} <= {"0", "1"}
    assert {row["categorical"] for row in tables["habitat"]} <= {"shore", "forest", "field"}
    assert (out / "grid.png").is_file()


def test_a_refiner_refines_the_images_and_leaves_the_rest(folder, tmp_path):
    arguments = ("--given", "caption", "--num", 6, "--seed", 1)
    for name in ("run", "refined"):
        run("launch/generate.py", folder / name, *arguments, "--out", tmp_path / name)
    before, after = (tmp_path / name for name in ("run", "refined"))
    for name in MODALITIES:
        if name != "photo":
            assert (before / f"{name}.csv").read_text() == (after / f"{name}.csv").read_text()
    for path in (before / "photo").iterdir():
        assert path.read_bytes() != (after / "photo" / path.name).read_bytes()
    run("launch/evaluate.py", folder / "refined", "metrics=[coherence,frechet,text]")
    metrics = json.loads((folder / "refined/evaluation/metrics.json").read_text())
    for source in MODALITIES:
        name = f"coherence/matrix/{source}/caption"
        assert metrics[name] == metrics[f"refined/{name}"]
    assert metrics["frechet/classifier/unconditional"] != metrics["refined/frechet/classifier/unconditional"]
    assert (folder / "refined/evaluation/figures/refinements.png").is_file()


def test_clusters_come_with_their_gaps(folder, tmp_path):
    run(
        "launch/cluster.py", folder / "run", folder / "shards", "--split", "test", "--out", tmp_path / "t.csv"
    )
    for row in read(tmp_path / "t.csv"):
        there = Mixed(0.3).sample("test", int(row["key"].rpartition("-")[2])).values
        assert {name for name in MODALITIES if row[f"{name}_cluster"]} == set(there)
        assert row["cluster"] in {row[f"{name}_cluster"] for name in there}
