"""`cmvae compare` on runs whose metrics are written by hand."""

from __future__ import annotations

import json
import statistics

import pytest
import yaml
from commands import run_cmvae
from PIL import Image

SETTINGS = {
    "data": {"shards": "shards/digits"},
    "model": {"modalities": {"m0": {}}},
    "train": {"max_steps": 1},
}


@pytest.fixture
def write_run(tmp_path):
    def write(name, metrics, seed=0, beta=1.0, protocol=None, shards="shards/digits"):
        folder = tmp_path / "runs" / name
        (folder / "evaluation").mkdir(parents=True)
        settings = {**SETTINGS, "name": name, "seed": seed, "objective": {"beta": beta}}
        settings["data"] = {"shards": shards}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        (folder / "evaluation/metrics.json").write_text(json.dumps(metrics))
        if protocol is not None:
            (folder / "evaluation/protocol.json").write_text(json.dumps(protocol))
        return folder

    return write


def compare(folder, *arguments):
    done = run_cmvae("compare", *arguments, folder=folder)
    assert "Traceback" not in done.stderr
    return done


def tables(text):
    """Cells of every row of all tables, by the first cell."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}


def test_runs_that_differ_in_their_seed_only_are_one_group(write_run, tmp_path):
    accs = [0.9, 0.8, 0.95]
    protocol = {"likelihood.importance_samples": 100, "seed": 0, "left_out": {}}
    for seed, acc in enumerate(accs):
        metrics = {"clustering/acc": acc, "likelihood/joint": -1000.0 - seed}
        if seed == 2:
            del metrics["likelihood/joint"]
        write_run(f"a{seed}", metrics, seed=seed, protocol={**protocol, "export_sha256": f"{seed}"})
    protocol = {"likelihood.importance_samples": 300, "seed": 1, "left_out": {"probe": "no labels"}}
    write_run("b", {"clustering/acc": 0.5}, beta=2.5, protocol=protocol)
    done = compare(tmp_path, "runs/a0", "runs/b", "runs/a1", "runs/a2", "--out", "out")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out/comparison.md").read_text()
    assert text in done.stdout
    cells = tables(text)
    assert cells["metric"] == ["a0 (n = 3)", "b (n = 1)"]
    assert cells["clustering/acc"] == [f"{sum(accs) / 3:.4f} ± {statistics.stdev(accs):.4f}", "0.5000"]
    assert cells["likelihood/joint"] == ["-1000.5000 ± 0.7071 (2)", "–"]
    assert cells["objective.beta"] == ["1.0", "2.5"]
    assert cells["likelihood.importance_samples"] == ["100", "300"]
    # The seed of the evaluation is part of its protocol; that of the training is what repeats differ in.
    assert cells["seed"] == ["0", "1"]
    assert cells["left_out.probe"] == ["–", "no labels"]
    assert not {"name", "output_dir", "train.max_steps", "export_sha256"} & set(cells)
    assert "a0: runs/a0, runs/a1, runs/a2" in text
    with Image.open(tmp_path / "out/comparison.png") as picture:
        assert min(picture.size) > 50


def test_one_run_is_a_table_too_below_runs(write_run, tmp_path):
    write_run("a", {"probe/z/m0": 1.0})
    done = compare(tmp_path, "runs/a")
    assert done.returncode == 0, done.stderr
    assert "differ" not in done.stdout
    assert tables((tmp_path / "runs/comparison/comparison.md").read_text())["probe/z/m0"] == ["1.0000"]


def test_runs_of_one_name_in_different_folders_are_told_apart(write_run, tmp_path):
    write_run("x/digits", {"a": 1}, beta=1.0)
    write_run("y/digits", {"a": 2}, beta=2.0)
    for folder in ("x", "y"):
        path = tmp_path / "runs" / folder / "digits" / "config.yaml"
        path.write_text(path.read_text().replace(f"name: {folder}/digits", "name: digits"))
    done = compare(tmp_path, "runs/x/digits", "runs/y/digits", "--out", "out")
    assert done.returncode == 0, done.stderr
    assert tables(done.stdout)["metric"] == ["runs/x/digits (n = 1)", "runs/y/digits (n = 1)"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "runs/a/evaluation/metrics.json: missing. Evaluate the run first"),
        ('{"clustering/acc": 0.', "cannot be read as JSON"),
        ("[1]", "holds list, not an object"),
        ("{}", "holds no metric"),
        ('{"clustering/acc": NaN}', "clustering/acc: nan is no finite number"),
        ('{"clustering/acc": "0.9"}', "clustering/acc: '0.9' is no finite number"),
    ],
)
def test_missing_or_damaged_metrics_are_named(write_run, tmp_path, content, expected):
    path = write_run("a", {}) / "evaluation/metrics.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    done = compare(tmp_path, "runs/a", "--out", "out")
    assert done.returncode == 2
    assert expected in done.stderr
    assert "cmvae evaluate runs/a" in done.stderr
    assert not (tmp_path / "out").exists()


def test_repeats_that_are_none_are_refused(write_run, tmp_path):
    write_run("a", {"x": 1.0}, seed=4)
    write_run("b", {"x": 1.0}, seed=4)
    done = compare(tmp_path, "runs/a", "runs/b")
    assert done.returncode == 2
    assert "runs/a and runs/b: the same experiment with the same seed 4" in done.stderr
    assert "no run" in compare(tmp_path, "runs").stderr


@pytest.fixture
def write_shards_index(tmp_path):
    """An index alone: what shards were packed with stands there."""

    def write(folder, source):
        split = {"num_samples": 1, "shards": []}
        split["shards"] = [{"name": "a.tar", "num_samples": 1, "num_bytes": 1, "sha256": "0" * 64}]
        content = {
            "name": "by hand",
            "source": source,
            "modalities": {"m0": {"kind": "image", "shape": [3, 4, 4], "dtype": "uint8"}},
            "class_names": None,
            "splits": {"train": split},
        }
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "index.json").write_text(json.dumps(content))

    return write


def test_along_a_number_that_shards_were_packed_with(write_run, write_shards_index, tmp_path):
    for share, accs in ((0.5, [0.7]), (0.0, [0.9, 0.95])):
        write_shards_index(f"shards/m{share}", {"source": "digits", "missing": share})
        for seed, acc in enumerate(accs):
            metrics = {"clustering/acc": acc, "probe/z/m0": 0.5}
            write_run(f"m{share}-{seed}", metrics, seed=seed, shards=f"shards/m{share}")
    flags = ("--along", "data.source.missing", "--metric", "clustering/acc", "--out", "out")
    done = compare(tmp_path, "runs/m0.5-0", "runs/m0.0-0", "runs/m0.0-1", *flags)
    assert done.returncode == 0, done.stderr
    cells = tables(done.stdout)
    assert cells["metric"] == ["m0.5-0 (n = 1)", "m0.0-0 (n = 2)"]
    assert cells["data.source.missing"] == ["0.5", "0.0"]
    assert "data.source.source" not in cells
    with Image.open(tmp_path / "out/comparison.png") as picture:
        assert min(picture.size) > 50


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--along", "objective.bta"], "runs/a has no such setting. Did you mean objective.beta?"),
        (["--along", "data.shards"], "'shards/digits' of runs/a is no number"),
        (["--along", "model.private_dim"], "a and b both have 32 and differ in other settings"),
        (["--along", "data.source.missing"], "shards/digits: no such shard folder"),
        (["--metric", "clustering/ac"], "none of the runs has it. Did you mean clustering/acc?"),
    ],
)
def test_what_cannot_be_drawn_is_named(write_run, tmp_path, flags, expected):
    write_run("a", {"clustering/acc": 0.5}, beta=1.0)
    write_run("b", {"clustering/acc": 0.6}, beta=2.0)
    done = compare(tmp_path, "runs/a", "runs/b", *flags, "--out", "out")
    assert done.returncode == 2
    assert f"{flags[0]} {flags[1]}: " in done.stderr or expected.startswith("shards/")
    assert expected in done.stderr
    assert not (tmp_path / "out").exists()
