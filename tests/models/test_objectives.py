"""The objective, compared with a slow implementation that shares only the networks with it.

The slow implementation loops over sources, samples and clusters in float64 and uses torch.distributions.
"""

import dataclasses
import itertools
import math

import pytest
import torch

from cmvae.config import LikelihoodConfig, ModalityConfig, ModelConfig, ObjectiveConfig
from cmvae.modalities import ImageModality
from cmvae.models.cmvae import CMVAE
from cmvae.models.likelihoods import LIKELIHOODS
from cmvae.models.objectives import cluster_log_prob, data_log_prob, dreg, iwae
from cmvae.training.tasks import CMVAETask
from cmvae.utils.seeds import sample_generators

DISTRIBUTIONS = {"normal": torch.distributions.Normal, "laplace": torch.distributions.Laplace}
BETA, FLOOR, B, C = 2.5, 1e-6, 2, 4


def make_task(num_modalities, family, objective, num_samples):
    """A small task in float64, with all parameters perturbed from their neutral values."""
    torch.manual_seed(3)
    modalities = {
        f"m{m}": ModalityConfig(
            width=2, likelihood=LikelihoodConfig(family=family, scale=0.6 + 0.1 * m, weight=1.0 + 0.5 * m)
        )
        for m in range(num_modalities)
    }
    config = ModelConfig(family=family, shared_dim=3, private_dim=2, num_clusters=C, modalities=modalities)
    modality = ImageModality(shape=(1, 4, 4))
    model = CMVAE(config, dict.fromkeys(modalities, modality)).double()
    # The fixed scales were computed in fp32, whose rounding error would dominate the comparison.
    model.cluster_prior.scale = model.family.scale_from_raw(torch.zeros(3, dtype=torch.float64))
    model.private_scale = model.family.scale_from_raw(torch.zeros(2, dtype=torch.float64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    task = CMVAETask(model, ObjectiveConfig(name=objective, num_samples=num_samples, beta=BETA))
    batch = {name: torch.rand(B, 1, 4, 4, dtype=torch.float64) for name in modalities}
    batch["valid"] = torch.ones(B, dtype=torch.bool)
    batch["mask"] = torch.ones(B, num_modalities, dtype=torch.bool)
    batch |= {"_seed": 0, "_place": range(B)}
    noise = task.draw_noise(sample_generators(0, range(B), torch.device("cpu")), 0)
    task.draw_noise = lambda *_: noise
    return task, batch, noise


def positive(family, raw):
    if family == "normal":
        return torch.log1p(raw.exp()) + FLOOR
    return raw.exp() / raw.exp().sum() * len(raw) + FLOOR


class SlowObjective:
    """Computes one log-weight lw[m][k][b] at a time; `cut` detaches posterior parameters in log q."""

    def __init__(self, task, batch, noise, cut):
        self.model, self.batch, self.noise, self.cut = task.model, batch, noise, cut
        self.family = task.model.config.family
        self.dist = DISTRIBUTIONS[self.family]
        self.names = list(task.model.config.modalities)
        self.present = [
            [m for m in range(len(self.names)) if batch["mask"][b, m]] for b in range(len(batch["mask"]))
        ]
        self.K = task.objective.num_samples
        self.q_z, self.q_w = {}, {}
        for name in self.names:
            outputs = self.model.encoders[name](batch[name])
            for b in range(B):
                z_loc, z_raw, w_loc, w_raw = (output[b] for output in outputs)
                self.q_z[name, b] = (z_loc, positive(self.family, z_raw))
                self.q_w[name, b] = (w_loc, positive(self.family, w_raw))

    def latents(self, m, k, b):
        """Reparametrised samples of z and w_m."""
        name = self.names[m]
        z = self.q_z[name, b][0] + self.q_z[name, b][1] * self.noise.shared[m, k, b]
        w = self.q_w[name, b][0] + self.q_w[name, b][1] * self.noise.private[m, m, k, b]
        return z, w

    def log_q(self, parameters, value):
        loc, scale = (p.detach() if self.cut else p for p in parameters)
        return self.dist(loc, scale).log_prob(value).sum()

    def log_weight(self, m, k, b, z, w):
        prior = self.model.cluster_prior
        neutral_z = positive(self.family, torch.zeros(3, dtype=torch.float64))
        neutral_w = positive(self.family, torch.zeros(2, dtype=torch.float64))
        weights = prior.logits.exp() / prior.logits.exp().sum()
        p_z = sum(weights[c] * self.dist(prior.means[c], neutral_z).log_prob(z).sum().exp() for c in range(C))
        present = [self.names[j] for j in self.present[b]]
        q_z = sum(self.log_q(self.q_z[j, b], z).exp() for j in present) / len(present)
        zero = torch.zeros(2, dtype=torch.float64)
        lw = BETA * (
            p_z.log()
            + self.dist(zero, neutral_w).log_prob(w).sum()
            - self.log_q(self.q_w[self.names[m], b], w)
            - q_z.log()
        )
        for n in self.present[b]:
            target = self.names[n]
            if n == m:
                w_target = w
            else:
                scale = positive(self.family, self.model.auxiliary_priors[target].raw_scale)
                w_target = scale * self.noise.private[n, m, k, b]
            mean = self.model.decoders[target](torch.cat([z, w_target])[None])[0]
            likelihood = self.model.config.modalities[target].likelihood
            lw = (
                lw
                + likelihood.weight * self.dist(mean, likelihood.scale).log_prob(self.batch[target][b]).sum()
            )
        return lw


def gradients(loss, task):
    named = dict(task.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if grad is None else grad
        for (name, parameter), grad in zip(named.items(), grads, strict=True)
    }


def assert_equal_gradients(actual, expected):
    for name, grad in expected.items():
        torch.testing.assert_close(
            actual[name], grad, rtol=1e-6, atol=1e-8, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("family", ["normal", "laplace"])
@pytest.mark.parametrize(("num_modalities", "num_samples"), [(1, 1), (1, 3), (2, 1), (2, 3), (5, 1), (5, 2)])
def test_iwae_equals_the_slow_objective(family, num_modalities, num_samples):
    check_iwae(*make_task(num_modalities, family, "iwae", num_samples))


def check_iwae(task, batch, noise):
    loss, report = task(batch)
    slow = SlowObjective(task, batch, noise, cut=False)
    bounds = []
    for b in range(B):
        per_source = []
        for m in slow.present[b]:
            lws = [slow.log_weight(m, k, b, *slow.latents(m, k, b)) for k in range(slow.K)]
            top = max(lw.item() for lw in lws)
            per_source.append(top + (sum((lw - top).exp() for lw in lws) / slow.K).log())
        bounds.append(sum(per_source) / len(per_source))
    expected = -sum(bounds) / B
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(report["bound"], torch.stack(bounds).detach(), rtol=1e-6, atol=0)
    assert_equal_gradients(gradients(loss, task), gradients(expected, task))


@pytest.mark.parametrize("family", ["normal", "laplace"])
@pytest.mark.parametrize(("num_modalities", "num_samples"), [(1, 1), (1, 3), (2, 3), (5, 2)])
def test_dreg_equals_the_slow_objective(family, num_modalities, num_samples):
    check_dreg(*make_task(num_modalities, family, "dreg", num_samples))


def check_dreg(task, batch, noise):
    loss, _ = task(batch)
    actual = gradients(loss, task)

    slow = SlowObjective(task, batch, noise, cut=True)
    named = dict(task.named_parameters())
    encoder = [name for name in named if "encoders" in name]
    generative = [name for name in named if "encoders" not in name]
    expected = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    value = 0.0
    for b in range(B):
        num_sources = len(slow.present[b])
        for m in slow.present[b]:
            paths = [slow.latents(m, k, b) for k in range(slow.K)]
            leaves = [tuple(latent.detach().requires_grad_() for latent in path) for path in paths]
            lws = [slow.log_weight(m, k, b, *leaves[k]) for k in range(slow.K)]
            top = max(lw.item() for lw in lws)
            total = sum(math.exp(lw.item() - top) for lw in lws)
            value += (top + math.log(total / slow.K)) / num_sources / B
            for k, lw in enumerate(lws):
                normalised = math.exp(lw.item() - top) / total
                share = -1 / (B * num_sources)
                dz, dw, *dtheta = torch.autograd.grad(
                    lw, [*leaves[k], *(named[n] for n in generative)], allow_unused=True, retain_graph=True
                )
                for name, grad in zip(generative, dtheta, strict=True):
                    if grad is not None:
                        expected[name] += share * normalised * grad
                dphi = torch.autograd.grad(
                    paths[k],
                    [named[n] for n in encoder],
                    grad_outputs=[dz, dw],
                    allow_unused=True,
                    retain_graph=True,
                )
                for name, grad in zip(encoder, dphi, strict=True):
                    if grad is not None:
                        expected[name] += share * normalised**2 * grad
    assert loss.item() == pytest.approx(-value, rel=1e-6)
    assert_equal_gradients(actual, expected)


@pytest.mark.parametrize("family", ["normal", "laplace"])
@pytest.mark.parametrize("check", [check_iwae, check_dreg])
@pytest.mark.parametrize("num_samples", [1, 3])
def test_missing_modalities_are_neither_sources_nor_targets(family, check, num_samples):
    """Samples lack different modalities, and one sample has a single modality."""
    objective = check.__name__.removeprefix("check_")
    task, batch, noise = make_task(3, family, objective, num_samples)
    batch["mask"] = torch.tensor([[True, False, True], [False, True, False]])
    # The reader fills in zeros; any use of this value changes the result.
    for m, name in enumerate(task.modality_names):
        batch[name][~batch["mask"][:, m]] = 77.0
    check(task, batch, noise)


@pytest.mark.parametrize("objective", ["iwae", "dreg"])
def test_values_of_missing_modalities_have_no_effect(objective):
    task, batch, _ = make_task(3, "laplace", objective, 2)
    batch["mask"] = torch.tensor([[True, False, True], [True, True, False]])
    results = []
    for value in (0.0, 1e4):
        for m, name in enumerate(task.modality_names):
            batch[name] = torch.where(batch["mask"][:, m, None, None, None], batch[name], value)
        loss, report = task(batch)
        results.append((loss, report, gradients(loss, task)))
    (loss, report, grads), (other_loss, other_report, other_grads) = results
    torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=0)
    assert_equal_gradients(other_grads, grads)
    for name in task.term_names:
        torch.testing.assert_close(other_report[name], report[name], rtol=1e-12, atol=0)


def test_samples_without_any_modality_do_not_count():
    task, batch, _ = make_task(2, "laplace", "iwae", 1)
    batch["mask"][1] = False
    loss, report = task(batch)
    torch.testing.assert_close(loss, -report["bound"][0])
    assert all(grad.isfinite().all() for grad in gradients(loss, task).values())


def test_every_parameter_has_a_gradient_if_a_modality_is_missing_everywhere():
    """Data parallelism waits for the gradient of every parameter, and ZeRO-3 for every module."""
    task, batch, _ = make_task(3, "laplace", "iwae", 1)
    batch["mask"][:, 1] = False
    loss, _ = task(batch)
    loss.backward()
    assert [name for name, parameter in task.named_parameters() if parameter.grad is None] == []


def test_log_prior_equals_that_of_the_paper_for_the_optimal_assignment():
    generator = torch.Generator().manual_seed(0)
    log_weights = torch.randn(C, generator=generator, dtype=torch.float64).log_softmax(-1)
    log_density = 5 * torch.randn(7, C, generator=generator, dtype=torch.float64)
    for z in range(7):
        joint = [math.exp(log_weights[c] + log_density[z, c]) for c in range(C)]
        q = [p / sum(joint) for p in joint]
        paper = sum(q[c] * (math.log(joint[c]) - math.log(q[c])) for c in range(C))
        assert cluster_log_prob(log_weights, log_density[z]).item() == pytest.approx(paper, rel=1e-9)


def one_modality_gradient(bound, seed, num_copies=4000, num_samples=3):
    """Monte Carlo gradient for q(z) = N(loc, exp(raw)²) of a one-dimensional model; its standard error."""
    loc = torch.full((num_copies,), 0.7, dtype=torch.float64, requires_grad=True)
    raw = torch.full((num_copies,), -0.4, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(
        1, num_samples, num_copies, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    z = (loc + raw.exp() * noise.squeeze(-1)).unsqueeze(-1)
    cut = (lambda t: t.detach()) if bound == "dreg" else (lambda t: t)
    normal = torch.distributions.Normal
    prior = torch.stack([normal(-1.0, 0.5).log_prob(z), normal(2.0, 0.5).log_prob(z)]).logsumexp(0)
    lw = normal(z, 0.8).log_prob(torch.tensor(1.9)) + prior - math.log(2)
    lw = lw.squeeze(-1) - normal(cut(loc), cut(raw).exp()).log_prob(z.squeeze(-1))
    present = torch.ones(1, num_copies, dtype=torch.bool)
    value = dreg(lw, [z], present) if bound == "dreg" else iwae(lw, present)
    grads = torch.stack(torch.autograd.grad(value.sum(), [loc, raw]))
    return grads.mean(1), grads.std(1) / math.sqrt(num_copies)


def test_dreg_gradient_equals_iwae_in_expectation_for_one_modality():
    iwae_mean, iwae_error = one_modality_gradient("iwae", seed=0, num_copies=400_000)
    dreg_mean, dreg_error = one_modality_gradient("dreg", seed=1, num_copies=400_000)
    error = (iwae_error**2 + dreg_error**2).sqrt()
    assert (iwae_mean.abs() > 20 * error).all(), "the gradients must differ from zero"
    assert ((iwae_mean - dreg_mean).abs() < 4 * error).all()
    assert (dreg_error < iwae_error).all(), "DReG must reduce the variance"


def test_iwae_is_at_least_the_elbo_and_equal_for_one_sample():
    lw = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    present = torch.ones(3, 5, dtype=torch.bool)
    torch.testing.assert_close(iwae(lw[:, :1], present), lw[:, 0].mean(0))
    assert (iwae(lw, present) >= lw.mean((0, 1))).all()


def test_padding_does_not_change_the_loss():
    task, batch, _ = make_task(2, "laplace", "iwae", 1)
    batch["valid"] = torch.tensor([True, False])
    loss, report = task(batch)
    torch.testing.assert_close(loss, -report["bound"][0])
    assert gradients(loss, task)["model.cluster_prior.means"].abs().sum() > 0


@pytest.mark.parametrize("family", ["normal", "laplace"])
def test_log_likelihood_sums_over_pixels(family):
    x, location = torch.rand(4, 3, 2, 5), torch.rand(6, 4, 3, 2, 5)
    distribution = {"normal": torch.distributions.Normal, "laplace": torch.distributions.Laplace}[family]
    expected = distribution(location, 0.2).log_prob(x).sum((-3, -2, -1))
    torch.testing.assert_close(data_log_prob(LIKELIHOODS[family], 0.2, x, location), expected)


@pytest.mark.parametrize(("num_modalities", "cross_sources"), [(2, 1), (3, 1), (5, 1), (5, 3)])
def test_sampled_cross_sources_are_unbiased(num_modalities, cross_sources):
    """The mean of the loss over all draws of cross sources is the loss with all sources."""
    task, batch, noise = make_task(num_modalities, "laplace", "iwae", 1)
    expected = task(batch)[0]
    draws = list(itertools.combinations(range(1, num_modalities), cross_sources))
    losses = []
    for shifts in draws:
        task.draw_noise = lambda *_, shifts=shifts: dataclasses.replace(noise, cross_shifts=shifts)
        losses.append(task(batch)[0])
    if len(draws) > 1:
        assert max(losses) - min(losses) > 1e-3 * expected.abs(), "losses must differ between draws"
    mean = sum(losses) / len(losses)
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=0)
    assert_equal_gradients(gradients(mean, task), gradients(expected, task))
