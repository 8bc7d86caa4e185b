"""Forward process, compared with closed forms, and samplers on Gaussian data, whose solution is known."""

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from cmvae.config import DiffusionConfig, SamplerConfig
from cmvae.models.diffusion import Diffusion

SCHEDULES = ["linear", "cosine"]
PREDICTIONS = ["epsilon", "v", "sample"]
SAMPLERS = ["ddpm", "ddim", "dpm_solver"]
CPU = torch.device("cpu")

# Data for the samplers: N(MEAN, COVARIANCE) in four dimensions, with eigenvalues from 0.07 to 0.41.
_MIX = np.array([[0.5, 0.1, 0.0, 0.2], [-0.3, 0.4, 0.1, 0.0], [0.2, 0.2, 0.3, -0.1], [0.0, -0.1, 0.2, 0.25]])
COVARIANCE = _MIX @ _MIX.T
MEAN = np.array([0.3, -0.2, 0.1, -0.4])


def closed_betas(schedule, num_timesteps):
    """β of Ho et al. (2020) or Nichol & Dhariwal (2021), computed one by one in fp64."""
    if schedule == "linear":
        step = (0.02 - 1e-4) / (num_timesteps - 1)
        return np.array([1e-4 + step * t for t in range(num_timesteps)])

    def signal(time):
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    return np.array(
        [
            min(1 - signal((t + 1) / num_timesteps) / signal(t / num_timesteps), 0.999)
            for t in range(num_timesteps)
        ]
    )


def closed_signal_power(schedule, num_timesteps=1000):
    """ᾱ."""
    return np.cumprod(1 - closed_betas(schedule, num_timesteps))


def optimal_denoiser(schedule):
    """E[x_0 | x_t] = MEAN + G (x_t − √ᾱ MEAN), for images (B, 1, 4, N) of N independent samples each."""
    signal_power = closed_signal_power(schedule)

    def predict_image(noisy, timesteps):
        power = signal_power[timesteps[0].item()]
        gain = torch.from_numpy(_gain(power))
        mean = torch.from_numpy(MEAN)[:, None]
        return mean + gain @ (noisy.double() - math.sqrt(power) * mean)

    return predict_image


def _gain(power):
    return math.sqrt(power) * COVARIANCE @ np.linalg.inv(power * COVARIANCE + (1 - power) * np.eye(4))


def streams(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_data(num, seed=0):
    """(1, 1, 4, num)"""
    noise = torch.randn(4, num, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    data = torch.from_numpy(MEAN)[:, None] + torch.from_numpy(np.linalg.cholesky(COVARIANCE)) @ noise
    return data.float()[None, None]


def assert_moments(samples, mean, covariance, bias=0.0):
    """Check that moments of samples (1, 1, 4, N) are within five standard errors plus `bias`."""
    samples = samples[0, 0].double().numpy()
    num = samples.shape[1]
    variances = np.diag(covariance)
    assert np.all(np.abs(samples.mean(1) - mean) < 5 * np.sqrt(variances / num) + bias)
    errors = np.sqrt((np.outer(variances, variances) + covariance**2) / num)
    assert np.all(np.abs(np.cov(samples) - covariance) < 5 * errors + bias)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [1000, 40])
def test_schedule_equals_the_published_one(schedule, num_timesteps):
    diffusion = Diffusion(DiffusionConfig(schedule=schedule, num_timesteps=num_timesteps))
    power = closed_signal_power(schedule, num_timesteps)
    timesteps = torch.arange(num_timesteps)
    one, zero = torch.ones(num_timesteps, 1, 1, 1), torch.zeros(num_timesteps, 1, 1, 1)
    signal = diffusion.add_noise(one, zero, timesteps).flatten()
    spread = diffusion.add_noise(zero, one, timesteps).flatten()
    # The relative rounding error of fp32 is 6e-8; with ᾱ in fp32, that of √(1 − ᾱ) at t = 0 would be 3e-4.
    np.testing.assert_allclose(signal.numpy(), np.sqrt(power), rtol=2e-7)
    np.testing.assert_allclose(spread.numpy(), np.sqrt(1 - power), rtol=2e-7)


def test_the_cosine_schedule_is_capped():
    power = closed_signal_power("cosine")
    diffusion = Diffusion(DiffusionConfig(schedule="cosine"))
    signal = diffusion.add_noise(torch.ones(2, 1, 1, 1), torch.zeros(2, 1, 1, 1), torch.tensor([998, 999]))
    assert (signal[1] / signal[0]).item() ** 2 == pytest.approx(1 - 0.999, rel=1e-5)
    assert math.sqrt(power[-1]) == pytest.approx(4.93e-5, rel=1e-2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_noised_images_have_the_moments_of_the_process(schedule):
    diffusion = Diffusion(DiffusionConfig(schedule=schedule))
    power = closed_signal_power(schedule)
    num = 100_000
    timesteps = torch.tensor([0, 200, 600, 999])
    images = torch.tensor([-1.0, 0.8, 0.5, 1.0])[:, None, None, None].expand(4, 1, 1, num)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = diffusion.add_noise(images, noise, timesteps).double().flatten(1).numpy()
    for row, t in enumerate(timesteps.tolist()):
        mean, variance = math.sqrt(power[t]) * images[row, 0, 0, 0].item(), 1 - power[t]
        # Five standard errors.
        assert abs(noisy[row].mean() - mean) < 5 * math.sqrt(variance / num)
        assert abs(noisy[row].var() - variance) < 5 * variance * math.sqrt(2 / num)


def test_add_noise_is_the_marginal_of_the_markov_chain():
    """q(x_t | x_0) is the marginal of the Markov chain x_t = √(1 − β_t) x_{t−1} + √β_t ε."""
    num_timesteps, num = 12, 100_000
    diffusion = Diffusion(DiffusionConfig(schedule="cosine", num_timesteps=num_timesteps))
    generator = torch.Generator().manual_seed(0)
    image = torch.full((1, 1, 1, num), 0.9)
    chain = image
    for t, beta in enumerate(closed_betas("cosine", num_timesteps)):
        chain = math.sqrt(1 - beta) * chain + math.sqrt(beta) * torch.randn(chain.shape, generator=generator)
        noise = torch.randn(image.shape, generator=generator)
        at_once = diffusion.add_noise(image, noise, torch.tensor([t]))
        # Five standard errors of the difference of two estimates.
        assert abs((chain.mean() - at_once.mean()).item()) < 5 * math.sqrt(2 * chain.var().item() / num)
        assert chain.var().item() == pytest.approx(at_once.var().item(), rel=5 * math.sqrt(4 / num))


def test_targets_are_noise_velocity_and_image():
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, 1000, 3, 2, 2, generator=generator)
    timesteps = torch.arange(1000)
    power = closed_signal_power("linear")[:, None, None, None]
    expected = {
        "epsilon": noise.numpy(),
        "v": np.sqrt(power) * noise.numpy() - np.sqrt(1 - power) * images.numpy(),
        "sample": images.numpy(),
    }
    for prediction in PREDICTIONS:
        target = Diffusion(DiffusionConfig(prediction=prediction)).target(images, noise, timesteps)
        np.testing.assert_allclose(target.numpy(), expected[prediction], atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predicted_image_inverts_target_at_every_time_step(schedule, prediction):
    diffusion = Diffusion(DiffusionConfig(schedule=schedule, prediction=prediction))
    generator = torch.Generator().manual_seed(0)
    images = 2 * torch.rand(1000, 3, 4, 4, generator=generator) - 1
    noise = torch.randn(images.shape, generator=generator)
    timesteps = torch.arange(1000)
    noisy = diffusion.add_noise(images, noise, timesteps)
    target = diffusion.target(images, noise, timesteps)
    error = (diffusion.predicted_image(target, noisy, timesteps) - images).abs().flatten(1).amax(1)
    # x_t is below 6 and rounded with a relative error of 6e-8 a few times. Only ε then divides by √ᾱ.
    rounding = 3 * 6 * 2**-24
    bound = np.full(1000, rounding)
    if prediction == "epsilon":
        bound /= np.sqrt(closed_signal_power(schedule))
    assert np.all(error.numpy() < bound)


def test_half_precision_inputs_give_fp32_and_noise_at_the_first_time_step():
    image = torch.full((1, 1, 1, 1), 0.5, dtype=torch.bfloat16)
    noise, timesteps = torch.ones_like(image), torch.zeros(1, dtype=torch.int64)
    for prediction in PREDICTIONS:
        diffusion = Diffusion(DiffusionConfig(prediction=prediction))
        noisy = diffusion.add_noise(image, noise, timesteps)
        assert noisy.dtype == torch.float32
        assert noisy.item() == pytest.approx(math.sqrt(1 - 1e-4) * 0.5 + math.sqrt(1e-4), abs=1e-6)
        target = diffusion.target(image, noise, timesteps).bfloat16()
        recovered = diffusion.predicted_image(target, noisy, timesteps)
        assert recovered.dtype == torch.float32
        # v = 0.99495 is rounded to 8 bits and multiplied by 0.01.
        assert recovered.item() == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("gamma", [5.0, 1.0])
def test_min_snr_weights_the_image_error_equally_for_every_prediction(schedule, gamma):
    timesteps = torch.arange(1000)
    power = closed_signal_power(schedule)
    snr = power / (1 - power)
    assert snr.min() < gamma < snr.max()
    error = torch.ones(1000, 1, 1, 1)
    for prediction in PREDICTIONS:
        diffusion = Diffusion(
            DiffusionConfig(
                schedule=schedule, prediction=prediction, loss_weighting="min_snr", min_snr_gamma=gamma
            )
        )
        weights = diffusion.loss_weights(timesteps)
        assert weights.shape == (1000,)
        assert weights.dtype == torch.float32
        # x_0 is an affine function of the prediction, so x_t = 0 gives the error of the image.
        image_error = diffusion.predicted_image(error, torch.zeros_like(error), timesteps).flatten()
        expected = np.minimum(snr, gamma) * image_error.double().numpy() ** 2
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-6)


def test_loss_weights_follow_the_order_of_the_batch():
    assert torch.equal(Diffusion(DiffusionConfig()).loss_weights(torch.tensor([999, 0, 7])), torch.ones(3))
    diffusion = Diffusion(DiffusionConfig(prediction="sample", loss_weighting="min_snr"))
    backwards = diffusion.loss_weights(torch.arange(999, -1, -1))
    torch.testing.assert_close(backwards.flip(0), diffusion.loss_weights(torch.arange(1000)), rtol=0, atol=0)
    assert backwards[0] < backwards[-1]


class AffineMap(NamedTuple):
    """x_0 = matrix · x_T + offset."""

    matrix: np.ndarray
    offset: np.ndarray

    @property
    def covariance_error(self):
        """Relative error of the covariance of mapped standard noise, in the Frobenius norm."""
        return np.linalg.norm(self.matrix @ self.matrix.T - COVARIANCE) / np.linalg.norm(COVARIANCE)


def solved_map(schedule, name, num_steps):
    """Map of a deterministic sampler with the optimal denoiser, fitted to 64 noise vectors."""
    denoiser, calls = optimal_denoiser(schedule), []

    def predict_image(noisy, timesteps):
        calls.append(noisy)
        return denoiser(noisy, timesteps)

    sampled = Diffusion(DiffusionConfig(schedule=schedule)).sample(
        predict_image, (1, 1, 4, 64), SamplerConfig(name=name, num_steps=num_steps), streams(0), device=CPU
    )
    inputs = np.vstack([calls[0][0, 0].double().numpy(), np.ones(64)])
    outputs = sampled[0, 0].double().numpy()
    solution = np.linalg.lstsq(inputs.T, outputs.T, rcond=None)[0].T
    # The map is affine in the noise, up to rounding errors.
    assert np.abs(solution @ inputs - outputs).max() < 1e-5
    return AffineMap(solution[:, :4], solution[:, 4])


def reference_map(schedule, order, timesteps):
    """DDIM (Song et al., 2021, eq. 12) or DPM-Solver++(2M) (Lu et al., 2022, algorithm 2), in fp64."""
    power = np.append(closed_signal_power(schedule)[timesteps], 1.0)
    # Columns: linear part and offset.
    state = np.hstack([np.eye(4), np.zeros((4, 1))])
    mean = np.hstack([np.zeros((4, 4)), MEAN[:, None]])
    before = None
    for i in range(len(timesteps)):
        signal, spread = np.sqrt(power[i]), np.sqrt(1 - power[i])
        next_signal, next_spread = np.sqrt(power[i + 1]), np.sqrt(1 - power[i + 1])
        image = mean + _gain(power[i]) @ (state - signal * mean)
        guess = image
        if order == 2 and 0 < i < len(timesteps) - 1:
            log_snr = 0.5 * np.log(power[i - 1 : i + 2] / (1 - power[i - 1 : i + 2]))
            ratio = (log_snr[1] - log_snr[0]) / (log_snr[2] - log_snr[1])
            guess = image + (image - before) / (2 * ratio)
        state = next_signal * guess + next_spread * (state - signal * guess) / spread
        before = image
    return AffineMap(state[:, :4], state[:, 4])


@pytest.mark.parametrize("schedule", SCHEDULES)
# The default time steps of diffusers are one too many for 61, and its DDIM is wrong for 600.
@pytest.mark.parametrize("num_steps", [1, 2, 20, 61, 600])
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm_solver", 2)])
def test_deterministic_samplers_equal_those_of_their_papers(schedule, num_steps, name, order):
    timesteps = [round(1000 * (1 - i / num_steps)) - 1 for i in range(num_steps)]
    solution, expected = solved_map(schedule, name, num_steps), reference_map(schedule, order, timesteps)
    # Tables and steps of the scheduler are fp32; their error was below 1e-6.
    np.testing.assert_allclose(solution.matrix, expected.matrix, atol=5e-6)
    np.testing.assert_allclose(solution.offset, expected.offset, atol=5e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_deterministic_samplers_converge_at_the_rate_of_their_order(schedule):
    errors = {
        name: {num_steps: solved_map(schedule, name, num_steps) for num_steps in (20, 50, 100, 200)}
        for name in ("ddim", "dpm_solver")
    }
    bias = np.sqrt(closed_signal_power(schedule)[-1])
    for name, maps in errors.items():
        for solution in maps.values():
            # Sampling starts with mean 0, but x_T has mean √ᾱ · MEAN. The map contracts this difference.
            assert np.abs(solution.offset - MEAN).max() < bias * np.abs(MEAN).sum() + 1e-5, name
    ddim = {num_steps: solution.covariance_error for num_steps, solution in errors["ddim"].items()}
    solver = {num_steps: solution.covariance_error for num_steps, solution in errors["dpm_solver"].items()}
    # Twice the steps halve the error of first order and reduce that of second order to less than a third
    # (a quarter in the limit).
    assert ddim[50] < 0.12
    assert 0.45 < ddim[100] / ddim[50] < 0.55
    assert 0.45 < ddim[200] / ddim[100] < 0.55
    assert solver[20] < 0.1
    assert solver[20] < ddim[20] / 2
    assert solver[50] < solver[20] / 5
    assert solver[100] < solver[50] / 3
    assert solver[200] < solver[100] / 3


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("num_steps", "distance"), [(20, 0.4), (1000, 0.02)])
def test_ddpm_samples_from_the_chain_of_its_paper(schedule, num_steps, distance):
    timesteps = [round(1000 * (1 - i / num_steps)) - 1 for i in range(num_steps)]
    power = np.append(closed_signal_power(schedule)[timesteps], 1.0)
    # Ho et al. (2020), eq. 7, with the posterior variance, from each time step to the next one that is used.
    mean, covariance = np.zeros(4), np.eye(4)
    for now, after in itertools.pairwise(power):
        beta = 1 - now / after
        image_weight = math.sqrt(after) * beta / (1 - now)
        noisy_weight = math.sqrt(1 - beta) * (1 - after) / (1 - now)
        step = image_weight * _gain(now) + noisy_weight * np.eye(4)
        mean = image_weight * (MEAN - math.sqrt(now) * _gain(now) @ MEAN) + step @ mean
        covariance = step @ covariance @ step.T + beta * (1 - after) / (1 - now) * np.eye(4)
    assert np.linalg.norm(covariance - COVARIANCE) < distance * np.linalg.norm(COVARIANCE)
    assert np.abs(mean - MEAN).max() < 0.01

    sampled = Diffusion(DiffusionConfig(schedule=schedule)).sample(
        optimal_denoiser(schedule),
        (1, 1, 4, 20_000),
        SamplerConfig(name="ddpm", num_steps=num_steps),
        streams(0),
        device=CPU,
    )
    assert_moments(sampled, mean, covariance)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_recover_the_distribution_of_noised_data(schedule, name):
    sampled = Diffusion(DiffusionConfig(schedule=schedule)).sample(
        optimal_denoiser(schedule),
        (1, 1, 4, 20_000),
        SamplerConfig(name=name, num_steps=400, start=0.4),
        streams(1),
        device=CPU,
        start_from=draw_data(20_000),
    )
    # With 400 steps, the discretisation error of the samplers is below 0.005.
    assert_moments(sampled, MEAN, COVARIANCE, bias=0.005)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize(
    ("num_steps", "start"),
    [(1, 1.0), (7, 1.0), (61, 1.0), (999, 1.0), (1000, 1.0), (20, 0.5), (13, 0.37), (300, 0.3), (1, 0.001)],
)
def test_the_network_is_called_once_per_step(name, num_steps, start):
    sampler = SamplerConfig(name=name, num_steps=num_steps, start=start)
    diffusion = Diffusion(DiffusionConfig())
    called_at = []

    def predict_image(noisy, timesteps):
        assert timesteps.dtype == torch.int64
        assert timesteps.shape == (2,)
        called_at.append(timesteps.unique().item())
        return torch.full_like(noisy, 3.0)

    sampled = diffusion.sample(
        predict_image, (2, 1, 1, 1), sampler, streams(0, 1), device=CPU, start_from=torch.zeros(2, 1, 1, 1)
    )
    assert len(called_at) == num_steps
    assert called_at == diffusion.sampling_timesteps(sampler)
    assert called_at[0] == round(1000 * start) - 1
    strides = [before - after for before, after in itertools.pairwise([*called_at, -1])]
    assert min(strides) >= 1
    assert max(strides) - min(strides) <= 1
    # The result is the last prediction, not clipped and without noise.
    assert torch.equal(sampled, torch.full_like(sampled, 3.0))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sampling_starts_from_noise_or_from_the_noised_image(schedule):
    diffusion = Diffusion(DiffusionConfig(schedule=schedule))
    image = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(5)) * 2 - 1
    noise = torch.cat([torch.randn(1, 3, 4, 4, generator=generator) for generator in streams(7, 8)])
    power = closed_signal_power(schedule)[599]
    expected = {1.0: noise, 0.6: math.sqrt(power) * image + math.sqrt(1 - power) * noise}
    for start, first in expected.items():
        inputs = []

        def predict_image(noisy, timesteps, inputs=inputs):
            inputs.append(noisy)
            return noisy

        sampler = SamplerConfig(num_steps=3, start=start)
        diffusion.sample(predict_image, (2, 3, 4, 4), sampler, streams(7, 8), device=CPU, start_from=image)
        torch.testing.assert_close(inputs[0], first, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("start", [1.0, 0.5])
def test_samples_do_not_depend_on_the_batch(name, start):
    diffusion = Diffusion(DiffusionConfig(schedule="cosine"))
    sampler = SamplerConfig(name=name, num_steps=9, start=start)
    images = torch.rand(6, 3, 5, 7, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def draw(*which):
        return diffusion.sample(
            lambda noisy, timesteps: (
                (noisy * (1 + timesteps[:, None, None, None] / 1000)).clamp(-1, 1).bfloat16()
            ),
            (len(which), 3, 5, 7),
            sampler,
            streams(*which),
            device=CPU,
            start_from=images[list(which)],
        )

    together = draw(4, 0, 3, 1, 2)
    assert together.dtype == torch.float32
    assert torch.equal(draw(3), together[2:3])
    assert torch.equal(draw(1, 5, 4)[[0, 2]], together[[3, 0]])
    assert not torch.equal(together[0], together[1])


def test_ancestral_sampling_draws_new_noise_at_every_step():
    def draw(name):
        noisy_images = []

        def predict_image(noisy, timesteps):
            noisy_images.append(noisy)
            return torch.zeros_like(noisy)

        sampler = SamplerConfig(name=name, num_steps=4)
        Diffusion(DiffusionConfig()).sample(predict_image, (1, 1, 50, 50), sampler, streams(0), device=CPU)
        return torch.corrcoef(torch.stack(noisy_images).flatten(1))

    # If every prediction is zero, a deterministic sampler only rescales its noise.
    torch.testing.assert_close(draw("ddim"), torch.ones(4, 4))
    assert draw("ddpm")[0, 1] < 0.9


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("start", [1.0, 0.5])
def test_sampling_does_not_synchronise_with_the_device(name, start):
    """Meta tensors have no values, so reading one, which would synchronise on a GPU, raises an error."""
    meta = torch.device("meta")
    sampled = Diffusion(DiffusionConfig()).sample(
        lambda noisy, timesteps: noisy * timesteps[:, None, None, None],
        (2, 3, 4, 4),
        SamplerConfig(name=name, num_steps=5, start=start),
        streams(0, 1),
        device=meta,
        start_from=torch.empty(2, 3, 4, 4, device=meta),
    )
    assert sampled.device == meta
    assert sampled.shape == (2, 3, 4, 4)


def test_sampling_builds_no_graph():
    weight = torch.ones((), requires_grad=True)
    sampled = Diffusion(DiffusionConfig()).sample(
        lambda noisy, timesteps: weight * noisy,
        (1, 1, 2, 2),
        SamplerConfig(num_steps=2),
        streams(0),
        device=CPU,
    )
    assert not sampled.requires_grad


@pytest.mark.parametrize(
    ("num_steps", "start", "reach"), [(1001, 1.0, 1000), (301, 0.3, 300), (1, 0.0004, 0)]
)
def test_more_steps_than_time_steps_are_rejected(num_steps, start, reach):
    sampler = SamplerConfig(num_steps=num_steps, start=start)
    with pytest.raises(ValueError, match=rf"num_steps = {num_steps} .*only {reach} of 1000"):
        Diffusion(DiffusionConfig()).sample(
            lambda noisy, timesteps: noisy,
            (1, 1, 2, 2),
            sampler,
            streams(0),
            device=CPU,
            start_from=torch.zeros(1, 1, 2, 2),
        )


def test_wrong_numbers_of_generators_or_images_are_rejected():
    diffusion = Diffusion(DiffusionConfig())

    def draw(shape, start, start_from=None):
        diffusion.sample(
            lambda noisy, timesteps: noisy,
            shape,
            SamplerConfig(num_steps=2, start=start),
            streams(0, 1),
            device=CPU,
            start_from=start_from,
        )

    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        draw((3, 1, 2, 2), 1.0)
    with pytest.raises(ValueError, match=r"start = 0\.5 needs images of shape \(2, 1, 2, 2\) .*, not None"):
        draw((2, 1, 2, 2), 0.5)
    with pytest.raises(ValueError, match=r"shape \(2, 1, 2, 2\) to start from, not \(1, 1, 2, 2\)"):
        draw((2, 1, 2, 2), 0.5, torch.zeros(1, 1, 2, 2))
