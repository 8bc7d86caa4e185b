"""How much the gradient of a training differs from batch to batch and from draw to draw."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from cmvae.benchmark.training import read_forever
from cmvae.config import load_cmvae_run
from cmvae.data.batch import to_device
from cmvae.model import CMVAE, channels_last
from cmvae.progress import progress_bar
from cmvae.tasks import CMVAETask


@dataclass(frozen=True)
class GradientVariance:
    """Moments of the gradient of some parameters, both without bias."""

    squared_mean: float
    """‖E g‖²."""
    variance: float
    """Tr Cov(g): the variances of all entries, summed."""


def gradient_variance(
    losses: Iterable[Tensor], groups: Mapping[str, Sequence[nn.Parameter]]
) -> dict[str, GradientVariance]:
    """Moments of the gradients of losses that differ by what was drawn for them.

    Args:
        losses: two at least, each a scalar; its gradient is taken before the next is asked for.
        groups: parameters, by a name for them.

    Returns:
        By group the moments, by the running means of Welford (1962).

    Raises:
        ValueError: fewer than two losses.
    """
    owners, parameters = zip(*((name, p) for name, owned in groups.items() for p in owned), strict=True)
    means = [torch.zeros_like(parameter) for parameter in parameters]
    deviations, squares = dict.fromkeys(groups, 0.0), dict.fromkeys(groups, 0.0)
    draws = 0
    for loss in losses:
        draws += 1
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for name, mean, gradient in zip(owners, means, gradients, strict=True):
            before = -mean if gradient is None else gradient - mean
            mean += before / draws
            after = before * (1 - 1 / draws)
            deviations[name] += (before * after).sum(dtype=torch.float64).item()
    if draws < 2:
        raise ValueError(f"{draws} losses: a variance takes two at least")
    for name, mean in zip(owners, means, strict=True):
        squares[name] += mean.square().sum(dtype=torch.float64).item()
    moments = {}
    for name in groups:
        variance = deviations[name] / (draws - 1)
        # The square of a mean over draws exceeds that of the expectation by the mean's own variance.
        moments[name] = GradientVariance(squares[name] - variance / draws, variance)
    return moments


def variance_of_run(run_dir: Path, overrides: Sequence[str], num_draws: int) -> dict[str, GradientVariance]:
    """Of the weights that a training arrived at, the gradient of the training's objective.

    Every draw is another train batch and other noise. The batches of all calls are the same.

    Args:
        run_dir: folder of a CMVAE's run.
        overrides: settings to change, `objective.cross_sources=1`.
        num_draws: how many gradients, two at least.

    Returns:
        Moments for `encoders`, `decoders` and `priors`.

    Raises:
        UserError: the folder is no run of a CMVAE, an override does not fit, or its shards are not there.
    """
    config = load_cmvae_run(run_dir, overrides)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = CMVAE.from_pretrained(run_dir / "export", device)
    task = CMVAETask(model, config.objective)
    channels_last(task).train()
    torch.manual_seed(config.seed)

    def losses() -> Iterator[Tensor]:
        batches = itertools.islice(read_forever(config, model.modality_names), num_draws)
        for batch in progress_bar(batches, total=num_draws, desc="draws", unit="draw", leave=False):
            loss, _ = task(to_device(batch, task.schemas, device))
            yield loss

    groups: dict[str, list[nn.Parameter]] = {"encoders": [], "decoders": [], "priors": []}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        groups[part if part in groups else "priors"].append(parameter)
    return gradient_variance(losses(), groups)
