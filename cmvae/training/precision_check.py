"""Whether a device computes the gradients of the model that is to be trained in bf16 as in fp32.

`train.mixed_precision: auto` takes bf16 where the device has instructions for it. Having them is not enough:
on processors with AMX some layers gave NaN gradients now and then, see `cmvae.models.networks.one_pixel`.
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
"""Train samples that the gradients are of: about a second for a model that suits a CPU."""
TOLERANCE = 1.0
"""The error of a layer's gradient in bf16 must be smaller than so many times its norm in fp32. Rounding alone
came to 0.03 for configs/digits.yaml and to 0.5 for configs/cub_mini.yaml, whose objective weights ten samples
by their likelihood. A gradient of zeros is wrong by 1, one of another direction by more."""
NEGLIGIBLE = 1e-3
"""A layer's norm counts as at least so many times that of the whole gradient. Where a
normalisation takes a layer's output away, its gradient is rounding alone: in bf16 0.00015 times the whole."""

# Memory that nobody wrote to may hold something else the next time.
_REPEATS = 2
_NAMED = 3
# So that gradients that are all zero have no error relative to nothing.
_TINY = 1e-30

_LOGGER = logging.getLogger(__name__)


def keep_sound_precision(accelerator: Accelerator, task: Task, config: ExperimentConfig) -> None:
    """Set a task that computes in bf16 to fp32 if some rank finds its gradients wrong; on all ranks.

    Only `task.autocast_dtype` changes: gradients are those of a copy.

    Args:
        accelerator: the ranks, and the device that they compute on.
        task: what is to be trained, before it is prepared and compiled, in training mode.
        config: the experiment; its train split is read.

    Raises:
        UserError: the train split cannot be read.
    """
    fault = None
    # Ranks on devices of another kind may compute in fp32 already, but must answer all the same.
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
    return next(iter(loader)) | {"seed": config.seed, "place": range(size)}


def _find_fault(task: Task, raw: Mapping[str, Any], device: torch.device) -> str | None:
    """What is wrong with the gradients in bf16, or None, also if there is no memory to find out."""
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
        # With ZeRO-3 a rank may have less than the whole model takes.
        _LOGGER.warning("train.mixed_precision: auto takes bf16 unchecked, for want of memory for the check")
    return None


def _switch_dropout_off(module: nn.Module) -> None:
    """Its masks are drawn in the precision of what they mask, so that two precisions could have two."""
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
    """What is wrong with gradients, layer by layer, or None, also if the expected ones are not finite.

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
