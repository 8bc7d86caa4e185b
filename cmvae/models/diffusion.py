"""The Gaussian diffusion without its network: noising, what a network learns of it, and the way back.

Images are in [−1, 1], and x_t = √ᾱ_t · x_0 + √(1 − ᾱ_t) · ε for t = 0 … T − 1: even t = 0 is a little noisy.
A single step of the way back is that of diffusers; which steps are taken, and whose noise they add, is
decided here.
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
"""x_0 (B, C, H, W) of x_t (B, C, H, W) and t (B,), int64: a network, its condition, guidance and clipping."""

# Of Ho et al. (2020), for any T: with fewer than about 1000 time steps x_T still shows the image.
_FIRST_BETA, _LAST_BETA = 1e-4, 0.02
# Of Nichol & Dhariwal (2021): the offset keeps the first β from vanishing, the cap the last one below 1.
_COSINE_OFFSET, _COSINE_CAP = 0.008, 0.999


class Diffusion:
    """The forward process of DDPM (Ho et al., 2020) and what follows from it.

    No `nn.Module` on purpose: a module's buffers are cast with it, and these tables have to stay fp32 (they
    are made from fp64). What is computed with them is fp32, whatever the precision of images or predictions,
    and on the device of the arguments.
    """

    def __init__(self, config: DiffusionConfig) -> None:
        self.config = config
        self.num_timesteps = config.num_timesteps
        self._betas = _betas(config)
        signal_power = torch.cumprod(1 - self._betas, 0)
        rows = [signal_power.sqrt(), (1 - signal_power).sqrt(), _loss_weights(config, signal_power)]
        self._tables = {torch.device("cpu"): torch.stack(rows).float()}

    def add_noise(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t.

        Args:
            images: x_0, (B, C, H, W).
            noise: ε, standard normal, (B, C, H, W).
            timesteps: t, (B,), int64, from 0 to T − 1.

        Returns:
            (B, C, H, W)
        """
        signal, spread = self._coefficients(timesteps)
        return signal * images + spread * noise

    def target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the network is to predict at x_t: ε, v = √ᾱ_t · ε − √(1 − ᾱ_t) · x_0, or x_0.

        Args:
            images: x_0, (B, C, H, W).
            noise: ε, (B, C, H, W).
            timesteps: t, (B,), int64.

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
        """What the squared error of the prediction is multiplied by: 1, or min-SNR-γ (Hang et al., 2023).

        min-SNR-γ is min(SNR, γ) on the squared error of x_0, SNR being ᾱ_t / (1 − ᾱ_t). The same error is SNR
        times as large in terms of ε, and SNR + 1 times in terms of v: there the weight is divided by that.

        Args:
            timesteps: t, (B,), int64.

        Returns:
            (B,)
        """
        return self._table(timesteps.device)[2, timesteps]

    def predicted_image(self, prediction: Tensor, noisy: Tensor, timesteps: Tensor) -> Tensor:
        """The x_0 that a prediction stands for, not clipped; `target` the other way.

        For ε it divides by √ᾱ_t, which is 5e-5 at the end of the cosine schedule: the result is finite, but
        an error of ε is one of x_0 twenty thousand times as large. Clip it.

        Args:
            prediction: of `target`, (B, C, H, W).
            noisy: x_t, (B, C, H, W).
            timesteps: t, (B,), int64.

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
        """The time steps at which a sampler asks for x_0: `sampler.num_steps` of them, falling.

        They are what diffusers calls trailing, of the part of the process below `start`. The first is its
        noisiest, the only one where pure noise is what the network knows; all strides are equal, the last one
        to the clean image included. A schedule down to t = 0 (diffusers' linspace) would spend an evaluation
        where little is left to do, and on the way there SNR changes by more than the second-order solver can
        follow.

        Raises:
            ValueError: there are fewer time steps below `start` than evaluations asked for.
        """
        reach = round(sampler.start * self.num_timesteps)
        if sampler.num_steps > reach:
            raise ValueError(
                f"num_steps = {sampler.num_steps} with start = {sampler.start:g}: "
                f"there are only {reach} of {self.num_timesteps} time steps to take"
            )
        return [
            round(reach * remaining / sampler.num_steps) - 1 for remaining in range(sampler.num_steps, 0, -1)
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
        """The reverse process: from noise, or from a noised image, to an image.

        All noise of a sample comes from its own generator, so it is the same picture in any batch.

        Args:
            predict_image: is called exactly `sampler.num_steps` times.
            shape: (B, C, H, W).
            sampler: which steps and how many; its guidance is the business of `predict_image`.
            generators: B of them on the CPU, which makes the noise the same for every `device`.
            device: where it all happens.
            start_from: images (B, C, H, W) on `device`, noised as far as `sampler.start` says; a start of 1
                needs none, and looks at none.

        Returns:
            (B, C, H, W), fp32, as `predict_image` last left it: clipped if it clips.

        Raises:
            ValueError: the generators or the images to start from do not fit, or as `sampling_timesteps`.
        """
        timesteps = self.sampling_timesteps(sampler)
        shape = tuple(shape)
        # A list: randn_tensor takes other sequences for a single generator.
        streams = list(generators)
        if len(streams) != shape[0]:
            raise ValueError(f"{len(streams)} generators for {shape[0]} samples: every sample has its own")
        noisy = randn_tensor(shape, generator=streams, device=device, dtype=torch.float32)
        if sampler.start < 1:
            if start_from is None or start_from.shape != shape:
                given = "none" if start_from is None else f"images of {tuple(start_from.shape)}"
                raise ValueError(
                    f"start = {sampler.start:g} begins with images of {shape}, and there are {given}"
                )
            noisy = self.add_noise(start_from, noisy, torch.full(shape[:1], timesteps[0], device=device))

        # Its tables and time steps stay on the CPU: a step multiplies by single numbers of theirs, and nobody
        # waits for the device, as one would to look them up by a time step that is there.
        scheduler = self._scheduler(sampler)
        scheduler.set_timesteps(timesteps=timesteps)
        for timestep in timesteps:
            image = predict_image(noisy, torch.full(shape[:1], timestep, device=device)).float()
            noisy = scheduler.step(image, timestep, noisy, generator=streams, return_dict=False)[0]
        return noisy

    def _scheduler(self, sampler: SamplerConfig) -> Any:
        """A fresh scheduler of diffusers, which takes x_0 and leaves it as it is."""
        process: dict[str, Any] = {
            "num_train_timesteps": self.num_timesteps,
            "trained_betas": self._betas.tolist(),
            "prediction_type": "sample",
        }
        if sampler.name == "ddpm":
            # The variance of q(x_{t−1} | x_t, x_0). The larger β_t is for nearly all T steps; with fewer it
            # leaves noise on the picture (Song et al., 2021, table 1).
            return DDPMScheduler(**process, clip_sample=False, variance_type="fixed_small")
        # DPM-Solver++ of first order is DDIM (Lu et al., 2022). DDIMScheduler itself takes no list of time
        # steps, and goes down by T // num_steps from each, wherever the next one is: right only where that
        # divides evenly.
        order = 1 if sampler.name == "ddim" else 2
        return DPMSolverMultistepScheduler(**process, algorithm_type="dpmsolver++", solver_order=order)

    def _coefficients(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """√ᾱ_t and √(1 − ᾱ_t), (B, 1, 1, 1)."""
        # diffusers' add_noise and get_velocity cast ᾱ to the precision of the images: in bf16 it is 1 for the
        # first time steps, which then get no noise at all.
        signal, spread = self._table(timesteps.device)[:2, timesteps, None, None, None]
        return signal, spread

    def _table(self, device: torch.device) -> Tensor:
        """√ᾱ, √(1 − ᾱ) and the loss weights, (3, T), copied once to every device."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]


def _betas(config: DiffusionConfig) -> Tensor:
    """Variances that the steps of the forward process add, (T,), fp64."""
    if config.schedule == "linear":
        return torch.linspace(_FIRST_BETA, _LAST_BETA, config.num_timesteps, dtype=torch.float64)
    # T + 1 points: β_t takes ᾱ from the beginning of its interval to the end.
    time = torch.linspace(0, 1, config.num_timesteps + 1, dtype=torch.float64)
    signal_power = ((time + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2).cos().square()
    return (1 - signal_power[1:] / signal_power[:-1]).clamp(max=_COSINE_CAP)


def _loss_weights(config: DiffusionConfig, signal_power: Tensor) -> Tensor:
    """`Diffusion.loss_weights` of every time step, (T,), from ᾱ (T,)."""
    if config.loss_weighting == "uniform":
        return torch.ones_like(signal_power)
    ratio = signal_power / (1 - signal_power)
    weight = ratio.clamp(max=config.min_snr_gamma)
    if config.prediction == "epsilon":
        return weight / ratio
    if config.prediction == "v":
        return weight / (ratio + 1)
    return weight
