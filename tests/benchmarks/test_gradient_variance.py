import math

import pytest
import torch
from commands import run_tool
from gradient_variance import gradient_variance, variance_of_run
from torch import nn

from cmvae.utils.errors import UserError


def test_moments_of_a_gradient_whose_distribution_is_known():
    mean, deviation, draws = torch.tensor([3.0, -1.0, 0.5]), 2.0, 4000
    parameter, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    generator = torch.Generator().manual_seed(0)

    def losses():
        for _ in range(draws):
            noisy = mean + deviation * torch.randn(3, generator=generator)
            yield (parameter * noisy).sum() + 5 * other.sum()

    found = gradient_variance(losses(), {"noisy": [parameter], "sure": [other]})
    # The sum of 3·draws squared normals, and a mean over the draws: four standard errors.
    assert found["noisy"].variance == pytest.approx(3 * 4, rel=4 * math.sqrt(2 / (3 * draws)))
    error = 4 * 2 * mean.norm().item() * deviation / math.sqrt(draws)
    assert found["noisy"].squared_mean == pytest.approx(mean.square().sum().item(), abs=error)
    assert found["sure"].variance == pytest.approx(0, abs=1e-9)
    assert found["sure"].squared_mean == pytest.approx(50)


def test_the_square_of_the_mean_is_not_larger_for_few_draws():
    parameter = nn.Parameter(torch.zeros(1))
    generator = torch.Generator().manual_seed(1)

    def two_draws():
        losses = (parameter.sum() * torch.randn((), generator=generator) for _ in range(2))
        return gradient_variance(losses, {"all": [parameter]})["all"].squared_mean

    found = torch.tensor([two_draws() for _ in range(3000)])
    # (a + b)²/4 − (a − b)²/4 = ab, whose mean is 0 and whose variance is 1.
    assert abs(found.mean()) < 4 / math.sqrt(3000)
    with pytest.raises(ValueError, match="at least two"):
        gradient_variance([parameter.sum()], {"all": [parameter]})


def test_fewer_cross_sources_make_a_noisier_gradient_of_the_same_mean(make_cmvae_run):
    run = make_cmvae_run()
    found = {n: variance_of_run(run, [f"objective.cross_sources={n}"], 100) for n in ("all", 1)}
    assert found["all"].keys() == {"encoders", "decoders", "priors"}
    assert found[1]["encoders"].variance > 1.5 * found["all"]["encoders"].variance
    assert found[1]["decoders"].variance > found["all"]["decoders"].variance
    assert found[1]["decoders"].squared_mean == pytest.approx(found["all"]["decoders"].squared_mean, rel=0.01)
    with pytest.raises(UserError, match="cross_sources is 3"):
        variance_of_run(run, ["objective.cross_sources=3"], 2)


def test_a_line_for_each_of_the_settings(make_cmvae_run, tmp_path):
    run = make_cmvae_run()
    beside = ("--beside", "objective.cross_sources=1")
    done = run_tool("benchmarks/gradient_variance.py", run, "--draws", 5, *beside, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["|", "|", "encoders", "|", "decoders", "|", "priors", "|"]
    assert lines[2].startswith("| as configured ")
    assert lines[3].startswith("| objective.cross_sources=1 ")
    assert lines[3].count("×") == 3
    refused = run_tool("benchmarks/gradient_variance.py", tmp_path / "none", folder=tmp_path)
    assert refused.returncode == 2
    assert "none" in refused.stderr
