"""Importance sampling against the exact likelihood of linear-Gaussian models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from linear_model import LIKELIHOOD_SCALE, NUM_PIXELS, PRIOR_SCALE, exact_log_likelihood, linear_model
from made_up_context import make_context
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from cmvae.evaluation import likelihood
from cmvae.evaluation.likelihood import chunk_sizes, evaluate_likelihood, importance_log_weights


def draw_data(names, num_samples, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(num_samples, 1, 1, NUM_PIXELS, generator=generator) for name in names}


@pytest.mark.parametrize(("names", "num_clusters"), [(("a",), 1), (("a", "b"), 1), (("a", "b", "c"), 3)])
def test_estimates_reach_the_exact_log_likelihood(names, num_clusters, monkeypatch):
    monkeypatch.setattr(likelihood, "DECODED_TOGETHER", 10_000)  # these decoders take next to no memory
    model = linear_model(names, num_clusters)
    data = draw_data(names, 12)
    exact = exact_log_likelihood(model, data)
    result = evaluate_likelihood(make_context(model, {"test": data}, likelihood_samples=10_000))
    assert result.metrics["likelihood/joint"] == pytest.approx(exact.mean(), abs=0.03)
    spread = exact.std(ddof=1) / np.sqrt(12)
    assert result.metrics["likelihood/joint_standard_error"] == pytest.approx(spread, abs=0.03)
    assert 100 < result.metrics["likelihood/effective_samples"] < 10_000


def test_of_incomplete_samples_it_is_the_likelihood_of_what_is_there(monkeypatch):
    monkeypatch.setattr(likelihood, "DECODED_TOGETHER", 10_000)
    names = ("a", "b", "c")
    model = linear_model(names, 2)
    data = draw_data(names, 7)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]).bool()
    exact = np.array(
        [
            exact_log_likelihood(
                model, {name: data[name][n : n + 1] for name, there in zip(names, row, strict=True) if there}
            ).item()
            for n, row in enumerate(mask)
        ]
    )
    # What stands in the place of a missing value must not matter.
    filled = {name: x.where(mask[:, m, None, None, None], 50.0) for m, (name, x) in enumerate(data.items())}
    context = make_context(model, {"test": {**filled, "mask": mask}}, likelihood_samples=12_000, batch_size=4)
    np.testing.assert_allclose(collect_log_likelihoods(context), exact, atol=0.1)


@pytest.mark.parametrize("num_samples", [2, 20])
def test_estimates_of_the_likelihood_itself_are_unbiased(num_samples):
    """Whatever the number of importance samples, the mean of p̂ / p over repetitions is one."""
    model = linear_model(("a", "b"), 2)
    one = draw_data(("a", "b"), 1)
    repeated = {name: x.expand(6000, -1, -1, -1) for name, x in one.items()}
    context = make_context(model, {"test": repeated}, likelihood_samples=num_samples, batch_size=1000)
    estimates = collect_log_likelihoods(context)
    ratio = np.exp(estimates - exact_log_likelihood(model, one))
    error = ratio.std(ddof=1) / np.sqrt(len(ratio))
    assert error < 0.05
    assert abs(ratio.mean() - 1) < 4 * error


def collect_log_likelihoods(context):
    """The values whose mean the metric is, from its own collection."""
    kept = {}
    collect = type(context).collect

    def keep(self, batches, compute):
        kept.update(collect(self, batches, compute))
        return kept

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(context), "collect", keep)
        result = evaluate_likelihood(context)
    values = kept["log_likelihood"]
    assert values.dtype == np.float64
    assert result.metrics["likelihood/joint"] == pytest.approx(values.mean())
    # The standard error against its definition.
    expected = np.sqrt(((values - values.mean()) ** 2).sum() / (len(values) - 1) / len(values))
    assert result.metrics["likelihood/joint_standard_error"] == pytest.approx(expected)
    return values


def test_log_weights_term_by_term():
    """Against torch.distributions, written out; with own densities for the mixture, the mean is the same."""
    model = linear_model(("a", "b"), 2)
    inputs = draw_data(("a", "b"), 5)
    posteriors = model.encode(inputs)
    generator = torch.Generator().manual_seed(2)
    shared_noise = torch.randn(2, 3, 5, 2, generator=generator)
    private_noise = torch.randn(2, 6, 5, 2, generator=generator)
    present = torch.ones(2, 5, dtype=torch.bool)
    found = importance_log_weights(model, inputs, posteriors, present, shared_noise, private_noise)

    q_z = [Normal(q.shared.loc, q.shared.scale) for q in posteriors.values()]
    z = torch.cat([q.loc + q.scale * noise for q, noise in zip(q_z, shared_noise, strict=True)])
    clusters = Categorical(logits=model.cluster_prior.logits[:2])
    components = Independent(Normal(model.cluster_prior.means[:2], PRIOR_SCALE), 1)
    expected = MixtureSameFamily(clusters, components).log_prob(z)
    expected -= torch.stack([q.log_prob(z).sum(-1).exp() for q in q_z]).mean(0).log()
    for name, noise in zip(("a", "b"), private_noise, strict=True):
        q_w = Normal(posteriors[name].private.loc, posteriors[name].private.scale)
        w = q_w.loc + q_w.scale * noise
        location = model.decoders[name].map(torch.cat([z, w], dim=-1))
        x = inputs[name].flatten(1)
        expected += Normal(location, LIKELIHOOD_SCALE).log_prob(x).sum(-1)
        expected += Normal(0.0, PRIOR_SCALE).log_prob(w).sum(-1) - q_w.log_prob(w).sum(-1)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected.double(), atol=1e-3, rtol=1e-4)


def test_exact_posteriors_need_one_sample():
    """With one modality, one cluster and proposals that ignore x because x does not depend on the latents."""
    model = linear_model(("a",), 1)
    with torch.no_grad():
        model.decoders["a"].map.weight.zero_()
        for head in (model.encoders["a"].shared, model.encoders["a"].private):
            head.weight.zero_()
        model.encoders["a"].shared.bias.copy_(model.cluster_prior.means[0])
        model.encoders["a"].private.bias.zero_()
    data = draw_data(("a",), 5)
    result = evaluate_likelihood(make_context(model, {"test": data}, likelihood_samples=1))
    exact = exact_log_likelihood(model, data).mean()
    assert result.metrics["likelihood/joint"] == pytest.approx(exact, abs=1e-5)


def test_the_figure_does_not_depend_on_the_batch_size_but_on_the_seed():
    model = linear_model(("a", "b"), 2)
    data = {"test": draw_data(("a", "b"), 11)}

    def joint(**settings):
        return evaluate_likelihood(make_context(model, data, likelihood_samples=150, **settings)).metrics

    whole = joint(batch_size=11)
    for batch_size in (1, 4):
        assert joint(batch_size=batch_size) == pytest.approx(whole, abs=1e-4)
    assert joint(seed=1)["likelihood/joint"] != pytest.approx(whole["likelihood/joint"], abs=1e-3)


def test_the_protocol_says_what_was_done():
    model = linear_model(("a", "b", "c"), 1)
    result = evaluate_likelihood(
        make_context(model, {"validation": draw_data("abc", 1)}, likelihood_samples=10, split="validation")
    )
    assert result.protocol["likelihood.split"] == "validation"
    assert result.protocol["likelihood.num_samples"] == 1
    assert result.protocol["likelihood.importance_samples"] == 12
    assert "single sample" in result.left_out["likelihood/joint_standard_error"]
    assert "likelihood/joint_standard_error" not in result.metrics


@pytest.mark.parametrize(("num_samples", "num_modalities"), [(1, 1), (1000, 3), (1, 5), (7, 200), (240, 2)])
def test_chunks_are_bounded_and_hold_what_is_asked_for(num_samples, num_modalities):
    sizes = chunk_sizes(num_samples, num_modalities)
    assert min(sizes) >= 1
    assert max(sizes) * num_modalities <= max(120, num_modalities)
    assert 0 <= sum(sizes) * num_modalities - num_samples < num_modalities
