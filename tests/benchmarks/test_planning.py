import json

from commands import ROOT, run_tool


def test_the_first_batch_of_a_split_without_most_of_its_shards():
    sizes = ["--shards=40", "--samples-per-shard=8", "--batch-size=8", "--ranks=2", "--skip=3", "--repeats=1"]
    done = run_tool("benchmarks/planning.py", *sizes, folder=ROOT)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert (measured["samples"], measured["batches_per_epoch"]) == (8, 40 * 8 // 16)
    assert 0 < measured["cpu_seconds"] < 10
    assert measured["import_mib"] > 10
