"""Gaussian diffusion without its network: forward process, targets of the network, and sampling.

Images are in [−1, 1], and x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε for t = 0 … T − 1: there is some noise even at
t = 0. The reverse steps are those of diffusers; this module chooses the time steps and the source of noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.schedulers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from cmvae.config import DiffusionConfig, SamplerConfig

PredictImage = Callable[[Tensor, Tensor], Tensor]
"""Predicts x_0 (B, C, H, W) from x_t (B, C, H, W) and t (B,) int64, with condition, guidance and clipping."""

# Ho et al. (2020). Used for any T, although x_T still shows the image if T is well below 1000.
_FIRST_BETA, _LAST_BETA = 1e-4, 0.02
# Nichol & Dhariwal (2021): the offset keeps the first β from vanishing, the cap the last one below 1.
_COSINE_OFFSET, _COSINE_CAP = 0.008, 0.999


class Diffusion:
    """Forward process of DDPM (Ho et al., 2020), its training targets and its samplers.

    Results are fp32, whatever the precision of images or predictions, and on the device of the arguments. It
    is not an `nn.Module`, because casting a module casts its buffers, and these tables must stay fp32.

    Args:
        config: schedule, number of time steps, prediction and loss weighting.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.num_timesteps = config.num_timesteps
        self._betas = _betas(config)
        signal_power = torch.cumprod(1 - self._betas, 0)
        rows = [signal_power.sqrt(), (1 - signal_power).sqrt(), _loss_weights(config, signal_power)]
        self._tables = {torch.device("cpu"): torch.stack(rows).float()}

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Sample x_t given x_0.

        Args:
            images: x_0, (B, C, H, W).
            noise: ε, standard normal, (B, C, H, W).
            timesteps: t, (B,) int64, from 0 to T − 1.

        Returns:
            (B, C, H, W)
        """
        signal, spread = self._coefficients(timesteps)
        return signal * images + spread * noise

    def target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Target of the network at x_t: ε, v = √ᾱ_t · ε − √(1 − ᾱ_t) · x_0, or x_0.

        Args:
            images: x_0, (B, C, H, W).
            noise: ε, (B, C, H, W).
            timesteps: t, (B,) int64.

        Returns:
            (B, C, H, W)
        """
        if self.config.prediction == "epsilon":
            return noise
        if self.config.prediction == "sample":
            return images
        signal, spread = self._coefficients(timesteps)
        return signal * noise - spread * images

    def loss_weights(self, timesteps: Tensor) -> Tensor:
        """Weights of the squared error of the prediction: 1, or min-SNR-γ (Hang et al., 2023).

        min-SNR-γ weights the squared error of x_0 by min(SNR, γ), where SNR = ᾱ_t / (1 − ᾱ_t). The squared
        error of ε is SNR times that of x_0, and the squared error of v is SNR + 1 times that of x_0, so their
        weights are divided by these factors.

        Args:
            timesteps: t, (B,) int64.

        Returns:
            (B,)
        """
        return self._table(timesteps.device)[2, timesteps]

    def predicted_image(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """Compute x_0 from a prediction, the inverse of `target`. The result is not clipped.

        A predicted ε is divided by √ᾱ_t, which is 5e-5 at the end of the cosine schedule. The result is
        finite, but an error of ε is multiplied by twenty thousand. Clip the result.

        Args:
            prediction: output of the network, (B, C, H, W).
            noisy: x_t, (B, C, H, W).
            timesteps: t, (B,) int64.

        Returns:
            (B, C, H, W)
        """
        if self.config.prediction == "sample":
            return prediction.float()
        signal, spread = self._coefficients(timesteps)
        if self.config.prediction == "epsilon":
            return (noisy - spread * prediction) / signal
        return signal * noisy - spread * prediction

    def sampling_timesteps(self, sampler: SamplerConfig) -> list[int]:
        """Time steps at which a sampler calls the network: `sampler.num_steps` of them, descending.

        They have the spacing that diffusers calls trailing, over the part of the process below `start`. The
        first is the noisiest one, the only one at which the network was trained on pure noise. All strides
        are equal, including the last one, to the clean image. Spacing down to t = 0 (linspace in diffusers)
        would use an evaluation where little noise is left, and its last strides change the SNR by more than
        a second-order solver can follow.

        Raises:
            ValueError: there are fewer time steps below `start` than `num_steps`.
        """
        num_available = round(sampler.start * self.num_timesteps)
        if sampler.num_steps > num_available:
            raise ValueError(
                f"num_steps = {sampler.num_steps} with start = {sampler.start:g}: "
                f"only {num_available} of {self.num_timesteps} time steps are available"
            )
        return [
            round(num_available * remaining / sampler.num_steps) - 1
            for remaining in range(sampler.num_steps, 0, -1)
        ]

    @torch.no_grad()
    def sample(
        self,
        predict_image: PredictImage,
        shape: Sequence[int],
        sampler: SamplerConfig,
        generators: Sequence[torch.Generator],
        *,
        device: torch.device,
        start_from: Tensor | None = None,
    ) -> Tensor:
        """Run the reverse process, from noise or from a noised image.

        All noise of a sample comes from its own generator, so a sample does not depend on its batch.

        Args:
            predict_image: called `sampler.num_steps` times; applies guidance.
            shape: (B, C, H, W).
            sampler: name, number of steps and start of the sampler.
            generators: B random number generators on the CPU, so that the noise is the same on every device.
            device: device of the computation.
            start_from: images (B, C, H, W) on `device`, to which noise is added up to `sampler.start`; not
                used if `sampler.start` is 1.

        Returns:
            (B, C, H, W) fp32, the last output of `predict_image`.

        Raises:
            ValueError: the number of generators or the shape of `start_from` does not match `shape`, or there
                are too few time steps, see `sampling_timesteps`.
        """
        timesteps = self.sampling_timesteps(sampler)
        shape = tuple(shape)
        # randn_tensor takes any other sequence for a single generator.
        streams = list(generators)
        if len(streams) != shape[0]:
            raise ValueError(f"{len(streams)} generators for {shape[0]} samples; pass one per sample")
        noisy = randn_tensor(shape, generator=streams, device=device, dtype=torch.float32)
        if sampler.start < 1:
            if start_from is None or start_from.shape != shape:
                found = None if start_from is None else tuple(start_from.shape)
                raise ValueError(
                    f"start = {sampler.start:g} needs images of shape {shape} to start from, not {found}"
                )
            noisy = self.add_noise(start_from, noisy, torch.full(shape[:1], timesteps[0], device=device))

        # Its tables and time steps stay on the CPU: looking them up on the device would synchronise.
        scheduler = self._scheduler(sampler)
        scheduler.set_timesteps(timesteps=timesteps)
        for timestep in timesteps:
            image = predict_image(noisy, torch.full(shape[:1], timestep, device=device)).float()
            noisy = scheduler.step(image, timestep, noisy, generator=streams, return_dict=False)[0]
        return noisy

    def _scheduler(self, sampler: SamplerConfig) -> Any:
        """A new scheduler of diffusers that takes predictions of x_0 and does not clip them."""
        process: dict[str, Any] = {
            "num_train_timesteps": self.num_timesteps,
            "trained_betas": self._betas.tolist(),
            "prediction_type": "sample",
        }
        if sampler.name == "ddpm":
            # The variance of q(x_{t−1} | x_t, x_0). The larger one, β_t, leaves noise on the image unless
            # nearly all T steps are taken (Song et al., 2021, table 1).
            return DDPMScheduler(**process, clip_sample=False, variance_type="fixed_small")
        # First-order DPM-Solver++ is DDIM (Lu et al., 2022). DDIMScheduler does not accept a list of time
        # steps and always moves down by T // num_steps, which is wrong unless num_steps divides T.
        order = 1 if sampler.name == "ddim" else 2
        return DPMSolverMultistepScheduler(**process, algorithm_type="dpmsolver++", solver_order=order)

    def _coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t), (B, 1, 1, 1)."""
        # add_noise and get_velocity of diffusers cast ᾱ to the precision of the images: in bf16 it is 1 at
        # the first time steps, which then get no noise at all.
        signal, spread = self._table(timesteps.device)[:2, timesteps, None, None, None]
        return signal, spread

    def _table(self, device: torch.device) -> Tensor:
        """√ᾱ, √(1 − ᾱ) and the loss weights, (3, T), copied to each device once."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]


def _betas(config: DiffusionConfig) -> Tensor:
    """Variances of the steps of the forward process, (T,) fp64."""
    if config.schedule == "linear":
        return torch.linspace(_FIRST_BETA, _LAST_BETA, config.num_timesteps, dtype=torch.float64)
    # T + 1 points: β_t is the relative decrease of ᾱ over interval t.
    time = torch.linspace(0, 1, config.num_timesteps + 1, dtype=torch.float64)
    signal_power = ((time + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2).cos().square()
    return (1 - signal_power[1:] / signal_power[:-1]).clamp(max=_COSINE_CAP)


def _loss_weights(config: DiffusionConfig, signal_power: Tensor) -> Tensor:
    """`Diffusion.loss_weights` of all time steps, (T,), from ᾱ, (T,)."""
    if config.loss_weighting == "uniform":
        return torch.ones_like(signal_power)
    snr = signal_power / (1 - signal_power)
    weight = snr.clamp(max=config.min_snr_gamma)
    if config.prediction == "epsilon":
        return weight / snr
    if config.prediction == "v":
        return weight / (snr + 1)
    return weight
