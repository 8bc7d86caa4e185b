from commands import run_tool


def test_a_line_for_each_of_the_settings(make_cmvae_run, tmp_path):
    run = make_cmvae_run()
    beside = ("--beside", "objective.cross_sources=1")
    done = run_tool("benchmarks/gradient_variance.py", run, "--draws", 5, *beside, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "| | encoders | decoders | priors |"
    assert lines[2].startswith("| as configured |")
    assert lines[3].startswith("| objective.cross_sources=1 |")
    assert lines[3].count("×") == 3
    refused = run_tool("benchmarks/gradient_variance.py", tmp_path / "none", folder=tmp_path)
    assert refused.returncode == 2
    assert "no run" in refused.stderr
