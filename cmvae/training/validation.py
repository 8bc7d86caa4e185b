"""One pass over the validation split, every sample exactly once, whatever the number of ranks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from cmvae.data.batch import to_device
from cmvae.modalities import Modality
from cmvae.utils.errors import UserError
from cmvae.utils.files import write_whole
from cmvae.utils.seeds import derive_seed

VALIDATION_NAME = "validation.json"
"""File in the run folder: the metrics of the last validation."""


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Set a module to evaluation mode while the block runs."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def collect_records(
    accelerator: Accelerator,
    module: nn.Module,
    modalities: Mapping[str, Modality],
    batches: Iterable[dict[str, Any]],
    seed: int,
    max_batches: int | None = None,
) -> dict[str, np.ndarray]:
    """Collect the report of a task over a split; must be called on all ranks.

    Args:
        accelerator: the ranks.
        module: the prepared task.
        modalities: those that it reads, by name.
        batches: equally many equally large batches on every rank, padding marked in `valid`.
        seed: of the noise, which is a function of (seed, position of the sample in the split): two
            validations differ by the model alone, whatever the number of ranks.
        max_batches: stop early; None reads everything.

    Returns:
        By name (N, ...), the report, `label` and the `loss` of each sample's batch, without padding; rank by
        rank, the same on every rank.
    """
    collected: dict[str, list[np.ndarray]] = {}
    with evaluation_mode(module), torch.no_grad():
        for raw in itertools.islice(batches, max_batches):
            streams = {"_seed": derive_seed(seed, "validation"), "_place": raw["position"].tolist()}
            batch = to_device(raw | streams, modalities, accelerator.device)
            loss, report = module(batch)
            valid = batch["valid"]
            # The loss is a mean over valid samples, so its mean over samples is that of the split.
            per_sample = {**report, "loss": loss.expand(len(valid))}
            gathered = accelerator.gather({**per_sample, "label": batch["label"], "valid": valid})
            valid = gathered.pop("valid")
            for name, values in gathered.items():
                collected.setdefault(name, []).append(values[valid].cpu().numpy())
    return {name: np.concatenate(parts) for name, parts in collected.items()}


def save_validation(run_dir: Path, metrics: Mapping[str, float]) -> None:
    """Write `validation.json`: the metrics of a validation, so that they can be read without a tracker.

    Args:
        run_dir: folder of the run.
        metrics: by name, as a tracker gets them below `validation/`.
    """
    write_whole(run_dir / VALIDATION_NAME, (json.dumps(dict(metrics), indent=1) + "\n").encode())


def load_validation(run_dir: Path) -> dict[str, float]:
    """Read what `save_validation` wrote.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = run_dir / VALIDATION_NAME
    try:
        return {name: float(value) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing. Train the run to its end, with this version") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: cannot be read: {error}. Train the run again") from error
