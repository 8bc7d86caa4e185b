"""`tools/benchmarks/__main__.py` as a user calls it."""

import json
import runpy

import pytest
from commands import ROOT, run_tool
from turns import Measured, Variant

from cmvae.utils.errors import UserError

GROUPS = (("clustering", [1.0, 5.0, 2.0], 5), ("probe", [20.0], 3), ("text", [0.001], 0))


@pytest.fixture
def tool():
    """The functions of the tool, by name."""
    return runpy.run_path(str(ROOT / "tools/benchmarks/__main__.py"))


def test_training_beside_other_settings_and_the_plain_way(tmp_path):
    done = run_tool(
        "benchmarks",
        *("train", ROOT / "configs/digits.yaml", "--image-size", 8, "--repeats", 2, "--warm-up", 0),
        *("--beside", "objective.cross_sources=1 train.mixed_precision=fp32", "--reference"),
        *("train.batch_size=4", "train.mixed_precision=bf16"),
        *(f"model.modalities.m{m}.network=resnet" for m in range(3)),  # whose convolutions do less
        *("--out", tmp_path / "benchmark.json"),
        folder=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "benchmark.json").read_text())
    titles = [m["variant"]["title"] for m in record["measured"]]
    assert titles == [
        "as configured",
        "objective.cross_sources=1 train.mixed_precision=fp32",
        "pair by pair, fp32",
        "3×3 convolutions, bf16",
        "3×3 convolutions, fp32",
    ]
    own, fewer, reference, ceiling, ceiling_fp32 = record["measured"]
    assert [len(m["seconds"]) for m in record["measured"]] == [2] * 5
    assert (own["facts"]["batch_size"], own["num_items"]) == (4, 4)
    assert fewer["facts"]["flops"] < own["facts"]["flops"] < reference["facts"]["flops"]
    assert own["facts"]["precision"] == "bf16"
    assert reference["facts"]["parameters"] == own["facts"]["parameters"]
    # In the table: the rate, its share of what convolutions reach in that precision, and the rate compared.
    for m, reached in ((own, ceiling), (reference, ceiling_fp32)):
        (row,) = [line for line in done.stdout.splitlines() if line.startswith(f"| {m['variant']['title']} ")]
        assert f"{m['median_items_per_second']:.3g}" in row
        assert f"{m['flops_per_second'] / reached['flops_per_second']:.0%}" in row
    ratio = own["median_items_per_second"] / reference["median_items_per_second"]
    assert own["times_as_fast"] == ratio
    assert f"{ratio:.2f} × pair by pair, fp32" in done.stdout
    assert reference["times_as_fast"] is None


def test_settings_stand_before_and_after_options(tool, capsys):
    suite = tool["parse_arguments"](["train", "a.yaml", "--gpu-suite", "--beside", "train.batch_size=256"])
    assert suite.read
    assert suite.updates == 100
    assert suite.beside == [
        "data.on_device=true",
        "data.on_device=true train.compile=true",
        "data.on_device=true train.compile=reduce-overhead",
        "train.batch_size=256",
    ]
    parsed = tool["parse_arguments"](["train", "a.yaml", "a=1", "--reference", "b=2", "c=3"])
    assert (parsed.overrides, parsed.reference) == (["a=1", "b=2", "c=3"], True)
    with pytest.raises(SystemExit):
        tool["parse_arguments"](["train", "a.yaml", "--referense", "a=1"])
    assert "unrecognized arguments: --referense" in capsys.readouterr().err


def test_an_evaluation_is_summed_up(tool):
    groups = [
        Measured(Variant(name, "evaluation"), 10, seconds, {"metrics": count}, 2**30)
        for name, seconds, count in GROUPS
    ]
    table = tool["format_table"](groups)
    # Medians of 2 and 20 seconds.
    assert table.endswith("sum: 22 seconds\n\nno metric for this run: text")
    assert "| probe      | 0.5 " in table
    assert "| text" not in table
    assert "GFLOP/s" not in table
    assert tool["format_table"](groups[2:]).endswith("sum: 0 seconds\n\nno metric for this run: text")


@pytest.mark.parametrize("option", ["--out", "--profile"])
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path, tool, option):
    arguments = tool["parse_arguments"](["train", "a.yaml", option, str(tmp_path / "none/a.json")])
    with pytest.raises(UserError, match=f"{option} .*: there is no folder .*none"):
        tool["check_files"](arguments)
    for path in ("a.json", str(tmp_path / "a.json")):
        tool["check_files"](tool["parse_arguments"](["train", "a.yaml", option, path]))


def test_what_cannot_be_measured_is_told(tmp_path):
    done = run_tool("benchmarks", "select", tmp_path, "--repeats", 1, folder=tmp_path)
    assert done.returncode == 2
    assert "error: one encoding pass" in done.stderr
    assert "Traceback" not in done.stderr
    done = run_tool(
        "benchmarks", "train", ROOT / "configs/digits.yaml", "--beside-checkout", tmp_path, folder=tmp_path
    )
    assert done.returncode == 2
    assert "has no folder cmvae/" in done.stderr
