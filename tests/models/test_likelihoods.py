"""Values and gradients of likelihoods with leading axes (M, K, B), compared with torch.distributions."""

import pytest
import torch

from cmvae.config import LikelihoodConfig
from cmvae.modalities import BinaryModality, CategoricalModality, ImageModality, TextModality, VectorModality
from cmvae.modalities.text import SPECIAL_TOKENS
from cmvae.models.likelihoods import LIKELIHOODS, likelihood_of
from cmvae.models.objectives import data_log_prob

M, K, B, NUM_WORDS, SCALE = 2, 3, 4, 6, 0.3
VOCABULARY = (*SPECIAL_TOKENS, *"abc")

MODALITIES = {
    "image": ImageModality(shape=(3, 2, 5)),
    "text": TextModality(shape=(7,), categories=VOCABULARY),
    "vector": VectorModality(shape=(5,), mean=(0.0,) * 5, std=(1.0,) * 5),
    "binary": BinaryModality(shape=(5,)),
    "categorical": CategoricalModality(categories=VOCABULARY),
}
CASES = [(kind, family) for kind, modality in MODALITIES.items() for family in modality.likelihoods]


def reference(family, parameters):
    """Density of one element of the data as a distribution of torch."""
    if family == "normal":
        return torch.distributions.Normal(parameters, SCALE)
    if family == "laplace":
        return torch.distributions.Laplace(parameters, SCALE)
    if family == "bernoulli":
        return torch.distributions.Bernoulli(logits=parameters)
    return torch.distributions.Categorical(logits=parameters)


def made_up(kind, family):
    torch.manual_seed(0)
    modality = MODALITIES[kind]
    parameters = 2 * torch.randn(M, K, B, *modality.parameter_shape, dtype=torch.float64)
    if family == "categorical":
        data = torch.randint(NUM_WORDS, (B, *modality.shape))
    elif family == "bernoulli":
        data = torch.randint(2, (B, *modality.shape)).double()
    else:
        data = torch.rand(B, *modality.shape, dtype=torch.float64)
    return data, parameters.requires_grad_()


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_values_and_gradients_match_torch(kind, family):
    data, parameters = made_up(kind, family)
    density = LIKELIHOODS[family].log_prob(data, parameters, SCALE)
    assert density.shape == (M, K, *data.shape)
    expected = torch.empty_like(density)
    # Computed row by row, to detect wrong broadcasting.
    for m in range(M):
        for k in range(K):
            for b in range(B):
                expected[m, k, b] = reference(family, parameters[m, k, b]).log_prob(data[b])
    torch.testing.assert_close(density, expected)
    factors = torch.randn_like(density)
    (gradient,) = torch.autograd.grad((density * factors).sum(), parameters)
    (expected_gradient,) = torch.autograd.grad((expected * factors).sum(), parameters)
    torch.testing.assert_close(gradient, expected_gradient)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_log_likelihood_sums_over_elements(kind, family):
    data, parameters = made_up(kind, family)
    log_prob = data_log_prob(LIKELIHOODS[family], SCALE, data, parameters)
    event = len(MODALITIES[kind].shape)
    expected = torch.distributions.Independent(reference(family, parameters), event).log_prob(data)
    assert log_prob.shape == (M, K, B)
    torch.testing.assert_close(log_prob, expected)


def test_bernoulli_of_fractions_is_the_cross_entropy():
    shade = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    logits = torch.tensor([[-1.0, 0.5, 3.0], [2.0, -40.0, 40.0]], dtype=torch.float64)
    bright = 1 / (1 + (-logits).exp())
    dark = 1 / (1 + logits.exp())
    expected = shade * bright.log() + (1 - shade) * dark.log()
    torch.testing.assert_close(LIKELIHOODS["bernoulli"].log_prob(shade, logits, 1.0), expected)


def test_extreme_logits_give_finite_densities():
    logits = torch.tensor([[1e4, -1e4]])
    x = torch.tensor([0.0, 1.0])
    assert LIKELIHOODS["categorical"].log_prob(torch.tensor([1]), logits, 1.0).item() == -2e4
    assert LIKELIHOODS["bernoulli"].log_prob(x, logits, 1.0).tolist() == [[-1e4, -1e4]]


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_to_data_returns_the_mean_or_mode(kind, family):
    modality = MODALITIES[kind]
    _, parameters = made_up(kind, family)
    data = LIKELIHOODS[family].to_data(parameters)
    assert data.shape == (M, K, B, *modality.shape)
    density = reference(family, parameters)
    # Categories have no mean.
    torch.testing.assert_close(data, density.mode if family == "categorical" else density.mean)


def test_the_config_overrides_the_default_family():
    defaults = {kind: likelihood_of(LikelihoodConfig(), modality) for kind, modality in MODALITIES.items()}
    names = {likelihood: name for name, likelihood in LIKELIHOODS.items()}
    assert {kind: names[likelihood] for kind, likelihood in defaults.items()} == {
        "image": "laplace",
        "text": "categorical",
        "vector": "normal",
        "binary": "bernoulli",
        "categorical": "categorical",
    }
    likelihood = likelihood_of(LikelihoodConfig(family="bernoulli"), MODALITIES["image"])
    assert likelihood is LIKELIHOODS["bernoulli"]
