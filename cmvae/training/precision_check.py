"""Check that a device computes the gradients of a model in bf16 as in fp32.

`train.mixed_precision: auto` selects bf16 on a device that has instructions for it. These are not always
right: on processors with AMX some layers returned NaN gradients now and then, see
`cmvae.models.networks.one_pixel`.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from cmvae.config import ExperimentConfig
from cmvae.data.batch import to_device
from cmvae.data.reader import EvaluationLoader
from cmvae.distributed import gather_problems
from cmvae.training.tasks import Task

CHECKED_SAMPLES = 8
"""Number of train samples: the check takes about a second for a model that suits a CPU."""
TOLERANCE = 1.0
"""Largest error of a layer's gradient in bf16, relative to its norm in fp32. Rounding alone gave 0.03 for
configs/digits.yaml and 0.5 for a small configs/cubicc.yaml, whose objective weights ten samples by their
likelihood. The error of a gradient of zeros is 1, that of one in another direction is larger."""
NEGLIGIBLE = 1e-3
"""Smallest norm of a layer's gradient that counts, relative to that of the whole gradient. If a
normalisation cancels a layer's output, its gradient is rounding alone: in bf16 0.00015 times the whole."""

# A fault may come from uninitialised memory and so not show every time.
_REPEATS = 2
_NAMED = 3
# Avoids a division by zero for gradients of zeros.
_TINY = 1e-30

_LOGGER = logging.getLogger(__name__)


def keep_sound_precision(accelerator: Accelerator, task: Task, config: ExperimentConfig) -> None:
    """Set a task from bf16 to fp32 if its gradients are wrong on some rank; must be called on all ranks.

    Only `task.autocast_dtype` changes: the gradients are computed with a copy.

    Args:
        accelerator: the ranks, and the device that they compute on.
        task: before it is prepared and compiled, in training mode.
        config: the experiment, whose train split is read.

    Raises:
        UserError: the train split cannot be read.
    """
    fault = None
    # Ranks on other devices may compute in fp32 already, but must take part in the gathering.
    if task.autocast_dtype is torch.bfloat16:
        fault = _find_fault(task, _first_samples(config, task), accelerator.device)
    found = gather_problems(accelerator, fault)
    if not found:
        return
    task.autocast_dtype = None
    if accelerator.is_main_process:
        _LOGGER.warning(
            "train.mixed_precision: auto takes fp32, which may be slower, as gradients in bf16 are wrong on "
            "this machine: %s. The training is sound. On a processor with AMX the environment variable "
            "ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 may fix bf16; train.mixed_precision=fp32 skips the check",
            found,
        )


def _first_samples(config: ExperimentConfig, task: Task) -> dict[str, Any]:
    size = min(CHECKED_SAMPLES, config.train.batch_size)
    loader = EvaluationLoader(
        config.data.shards,
        split="train",
        modalities=task.modality_names,
        batch_size=size,
        num_samples=size,
        on_error=config.data.on_error,
    )
    return next(iter(loader)) | {"_seed": config.seed, "_place": range(size)}


def _find_fault(task: Task, raw: Mapping[str, Any], device: torch.device) -> str | None:
    """What is wrong with the gradients in bf16, or None; also None if there is not enough memory."""
    try:
        own = copy.deepcopy(task).to(device)
        _switch_dropout_off(own)
        batch = to_device(raw, own.modalities, device)
        expected = _gradients(own, batch, None)
        for _ in range(_REPEATS):
            fault = compare_gradients(_gradients(own, batch, torch.bfloat16), expected)
            if fault is not None:
                return fault
    except torch.OutOfMemoryError:
        # The whole model may not fit on a rank of ZeRO-3.
        _LOGGER.warning(
            "train.mixed_precision: auto takes bf16 unchecked, as there is not enough memory for the check"
        )
    return None


def _switch_dropout_off(module: nn.Module) -> None:
    """Disable dropout: its masks could differ between two precisions."""
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.eval()


def _gradients(task: Task, batch: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Gradients of the loss in one precision, by parameter."""
    task.autocast_dtype = dtype
    task.zero_grad()
    loss, _ = task(batch)
    loss.backward()
    return {name: p.grad for name, p in task.named_parameters() if p.grad is not None}


def compare_gradients(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """Describe layers with wrong gradients; None if there are none or the expected gradient is not finite.

    Args:
        found: by parameter, of any shape.
        expected: as `found`, of the same parameters.
    """
    layers: dict[str, list[str]] = {}
    for name in expected:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    norms = {layer: _norm(expected[name] for name in names) for layer, names in layers.items()}
    whole = _norm(expected.values())
    if not math.isfinite(whole):
        return None
    errors = {
        layer: _norm(found[name] - expected[name] for name in names)
        / max(norms[layer], NEGLIGIBLE * whole, _TINY)
        for layer, names in layers.items()
    }
    # A comparison with NaN is false.
    wrong = {layer: error for layer, error in errors.items() if not error < TOLERANCE}
    if not wrong:
        return None
    named = [f"{layer} {_describe(error)}" for layer, error in list(wrong.items())[:_NAMED]]
    return f"{len(wrong)} of {len(errors)} layers, {', '.join([*named, '…'][: len(wrong)])}"


def _norm(tensors: Iterable[Tensor]) -> float:
    return torch.stack([tensor.norm() for tensor in tensors]).norm().item()


def _describe(error: float) -> str:
    return f"wrong by {error:.2g} times its norm" if math.isfinite(error) else "not finite"
