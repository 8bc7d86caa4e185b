"""Densities, samples and scales, compared with torch.distributions and closed forms."""

import math

import pytest
import torch

from cmvae.models.distributions import FAMILIES, SCALE_FLOOR, Laplace, Normal

REFERENCE = {"normal": torch.distributions.Normal, "laplace": torch.distributions.Laplace}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("event_dims", [1, 3])
def test_log_prob_matches_torch(name, event_dims):
    generator = torch.Generator().manual_seed(0)
    loc, value = torch.randn(2, 4, 3, 2, 5, generator=generator, dtype=torch.float64)
    scale = torch.rand(4, 3, 2, 5, generator=generator, dtype=torch.float64) + 0.1
    expected = REFERENCE[name](loc, scale).log_prob(value).sum(tuple(range(-event_dims, 0)))
    torch.testing.assert_close(FAMILIES[name](loc, scale).log_prob(value, event_dims), expected)


def test_a_scalar_scale_applies_to_every_pixel():
    value = torch.zeros(2, 3, 4, 4)
    log_prob = Laplace(torch.zeros(5, 2, 3, 4, 4), torch.tensor(0.75)).log_prob(value, event_dims=3)
    torch.testing.assert_close(log_prob, torch.full((5, 2), -48 * math.log(1.5)))


@pytest.mark.parametrize(("name", "variance"), [("normal", 1.0), ("laplace", 2.0)])
def test_noise_has_the_moments_of_the_standard_distribution(name, variance):
    noise = FAMILIES[name].draw_noise((400_000,), torch.device("cpu"), torch.Generator().manual_seed(1))
    assert noise.dtype == torch.float32
    # Standard errors here are at most 0.0023 (mean) and 0.008 (variance).
    assert abs(noise.mean().item()) < 0.01
    assert noise.var().item() == pytest.approx(variance, abs=0.04)
    quantiles = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    expected = REFERENCE[name](0.0, 1.0).icdf(quantiles)
    torch.testing.assert_close(noise.quantile(quantiles), expected, atol=0.02, rtol=0)


def test_laplace_noise_is_finite_at_the_end_of_the_uniform_range(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda values, **_: values.zero_())
    noise = Laplace.draw_noise((3,), torch.device("cpu"))
    assert noise.isfinite().all()
    assert (noise < -10).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_samples_are_reparametrised(name):
    loc = torch.tensor([1.0, -2.0], requires_grad=True)
    scale = torch.tensor([0.5, 3.0], requires_grad=True)
    noise = torch.tensor([0.3, -0.7])
    sample = FAMILIES[name](loc, scale).sample(noise)
    torch.testing.assert_close(sample, torch.tensor([1.15, -4.1]))
    sample.sum().backward()
    torch.testing.assert_close(loc.grad, torch.ones(2))
    torch.testing.assert_close(scale.grad, noise)


def test_detached_parameters_get_no_gradient():
    loc = torch.zeros(2, requires_grad=True)
    value = torch.ones(2, requires_grad=True)
    Normal(loc, torch.ones(2)).detach().log_prob(value).backward()
    assert loc.grad is None
    torch.testing.assert_close(value.grad, torch.full((2,), -1.0))


def test_raw_zero_is_neutral():
    torch.testing.assert_close(Normal.scale_from_raw(torch.zeros(3)), torch.full((3,), math.log(2)))
    torch.testing.assert_close(Laplace.scale_from_raw(torch.zeros(3)), torch.ones(3))


def test_laplace_scales_average_one_and_scales_have_a_lower_bound():
    raw = torch.tensor([[4.0, -200.0, 1.0, 0.0]])
    assert Laplace.scale_from_raw(raw).mean().item() == pytest.approx(1.0, abs=1e-5)
    for family in FAMILIES.values():
        assert family.scale_from_raw(raw).min().item() == pytest.approx(SCALE_FLOOR, rel=1e-3)
