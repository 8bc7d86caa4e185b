"""`tools/benchmark.py` as a user calls it."""

import json

from commands import ROOT, run_tool


def test_training_beside_other_settings_and_the_plain_way(tmp_path):
    done = run_tool(
        "benchmark.py",
        *("train", ROOT / "configs/digits.yaml", "train.batch_size=4", "--image-size", 8, "--repeats", 2),
        *("--beside", "objective.cross_sources=1 train.mixed_precision=fp32", "--reference"),
        *("--out", tmp_path / "benchmark.json"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "benchmark.json").read_text())
    titles = [m["title"] for m in record["measured"]]
    assert titles == [
        "as configured",
        "objective.cross_sources=1 train.mixed_precision=fp32",
        "pair by pair, fp32",
        "3×3 convolutions, bf16",
    ]
    own, fewer, reference, ceiling = record["measured"]
    assert [len(m["seconds"]) for m in record["measured"]] == [2] * 4
    assert fewer["facts"]["flops"] < own["facts"]["flops"] < reference["facts"]["flops"]
    assert own["facts"]["precision"] == "bf16"
    assert reference["facts"]["parameters"] == own["facts"]["parameters"]
    # The rate is in the table, and its share of what convolutions reach.
    share = own["flops_per_second"] / ceiling["flops_per_second"]
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("| as configured")]
    assert f"{own['median_items_per_second']:.3g}" in row
    assert f"{share:.0%}" in row


def test_what_cannot_be_measured_is_told(tmp_path):
    done = run_tool("benchmark.py", "select", tmp_path, "--repeats", 1, folder=tmp_path)
    assert done.returncode == 2
    assert "error: one encoding pass" in done.stderr
    assert "Traceback" not in done.stderr
    done = run_tool(
        "benchmark.py", "train", ROOT / "configs/digits.yaml", "--beside-checkout", tmp_path, folder=tmp_path
    )
    assert done.returncode == 2
    assert "holds no cmvae/" in done.stderr
