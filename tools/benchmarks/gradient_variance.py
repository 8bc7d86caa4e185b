"""Measure the variance of a training's gradient: python tools/benchmarks/gradient_variance.py runs/NAME."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from training import read_forever

from cmvae.config import load_cmvae_run
from cmvae.data.batch import to_device
from cmvae.models.cmvae import CMVAE, channels_last
from cmvae.training.tasks import CMVAETask
from cmvae.utils.arguments import positive_integer
from cmvae.utils.process_exit import run_main
from cmvae.utils.progress import progress_bar
from cmvae.utils.tables import markdown_table

AS_CONFIGURED = "as configured"


@dataclass(frozen=True)
class GradientVariance:
    """Unbiased estimates of moments of a gradient."""

    squared_mean: float
    """‖E g‖²."""
    variance: float
    """Tr Cov(g), the sum of the variances of all entries."""


def gradient_variance(
    losses: Iterable[Tensor], groups: Mapping[str, Sequence[nn.Parameter]]
) -> dict[str, GradientVariance]:
    """Estimate moments of the gradient over random draws, with the running means of Welford (1962).

    Args:
        losses: at least two scalar losses of different draws. The gradient of each is taken before the next
            one is requested.
        groups: group → parameters.

    Returns:
        Group → moments.

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
        raise ValueError(f"{draws} losses: a variance takes at least two")
    for name, mean in zip(owners, means, strict=True):
        squares[name] += mean.square().sum(dtype=torch.float64).item()
    moments = {}
    for name in groups:
        variance = deviations[name] / (draws - 1)
        # The squared sample mean overestimates the squared expectation by the variance of the mean.
        moments[name] = GradientVariance(squares[name] - variance / draws, variance)
    return moments


def variance_of_run(run_dir: Path, overrides: Sequence[str], num_draws: int) -> dict[str, GradientVariance]:
    """Estimate moments of the gradient of the training objective at the weights of a run.

    Every draw is another train batch with other noise. The batches are the same in every call.

    Args:
        run_dir: folder of a CMVAE's run.
        overrides: settings to change, such as `objective.cross_sources=1`.
        num_draws: number of gradients, at least two.

    Returns:
        Moments of `encoders`, `decoders` and `priors`.

    Raises:
        UserError: the folder is not the run of a CMVAE, an override is not valid, or the shards are missing.
    """
    config = load_cmvae_run(run_dir, overrides)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    model = CMVAE.from_pretrained(run_dir / "export", device)
    task = CMVAETask(model, config.objective)
    channels_last(task).train()

    def losses() -> Iterator[Tensor]:
        batches = itertools.islice(read_forever(config, model.modality_names, torch.device("cpu")), num_draws)
        for batch in progress_bar(batches, total=num_draws, desc="draws", unit="draw", leave=False):
            loss, _ = task(to_device(batch, task.modalities, device))
            yield loss

    groups: dict[str, list[nn.Parameter]] = {"encoders": [], "decoders": [], "priors": []}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        groups[part if part in groups else "priors"].append(parameter)
    return gradient_variance(losses(), groups)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Variance of the gradient over batches and noise, at the trained weights of a CMVAE, as "
        "a multiple of its squared mean; with the run's settings and with others."
    )
    parser.add_argument("run", type=Path, metavar="runs/NAME")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="SETTINGS",
        help="also with these settings, key=value separated by spaces; may be repeated",
    )
    parser.add_argument(
        "--draws",
        type=positive_integer,
        default=200,
        metavar="N",
        help="number of gradients (default: %(default)s)",
    )
    parsed = parser.parse_args(arguments)
    if parsed.draws < 2:
        parser.error("--draws 1: a variance takes at least two")
    return parsed


def to_markdown(by_settings: Mapping[str, Mapping[str, GradientVariance]]) -> str:
    """A Markdown table with one row per settings and one column per part of the model."""
    first = next(iter(by_settings.values()))
    rows = []
    for settings, parts in by_settings.items():
        cells = []
        for part, it in parts.items():
            # All settings have the same expected gradient; the first, least noisy one estimates its size
            # best.
            cell = f"{it.variance / first[part].squared_mean:.3g}"
            if settings != AS_CONFIGURED:
                cell += f" ({it.variance / first[part].variance:.2f} ×)"
            cells.append(cell)
        rows.append([settings, *cells])
    return markdown_table(["", *first], rows)


def main() -> int:
    """Measure and print."""
    arguments = parse_arguments()
    by_settings = {AS_CONFIGURED: variance_of_run(arguments.run, [], arguments.draws)}
    for settings in arguments.beside:
        by_settings[settings] = variance_of_run(arguments.run, settings.split(), arguments.draws)
    print(to_markdown(by_settings))
    return 0


if __name__ == "__main__":
    run_main(main)
