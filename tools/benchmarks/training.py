"""Jobs of training: an update, and convolutions as the ceiling of its speed."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from job import Job
from reference import ReferenceTask, build_reference_optimizer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cmvae.config import CMVAEExperiment, load_config
from cmvae.data.batch import to_device
from cmvae.data.index import ShardIndex
from cmvae.modalities import ImageModality, Modality
from cmvae.models.cmvae import CMVAE, channels_last
from cmvae.models.networks import IMAGE_NETWORKS
from cmvae.models.precision import AUTOCAST_DTYPES, Precision, network_precision
from cmvae.training.optimization import build_optimizer
from cmvae.training.tasks import CMVAETask
from cmvae.training.train_split import open_train_split
from cmvae.utils.errors import UserError
from cmvae.utils.memory import keep_freed_memory

# Channels and side of the 3×3 convolutions in the published PolyMNIST networks; all have equally many
# operations.
CEILING_SHAPES = ((64, 28), (128, 14), (256, 7))
CEILING_BATCH = 64
# Batch of a decoder in the published training, with five sources; a smaller one leaves a GPU idle.
CEILING_BATCH_ON_GPU = 640
# On a GPU, shorter runs would measure the launch of kernels.
CEILING_SECONDS = 0.2


def update_job(
    config_path: str,
    overrides: Sequence[str] = (),
    synthetic: int | None = None,
    image_size: int = 28,
    reference: bool = False,
    read: bool = False,
    updates: int = 1,
    profile: str | None = None,
) -> Job:
    """Updates of a CMVAE: forward, backward, clipping, optimizer.

    Args:
        config_path: YAML file of the experiment.
        overrides: settings to change, `key=value`.
        synthetic: number of copies of the config's first modality, which replace its modalities.
        image_size: side of random images in pixels, used without `read`.
        reference: train as `reference` does.
        read: read the config's shards; else one random batch is used for every update.
        updates: number of updates per run.
        profile: file for a trace of one run, for chrome://tracing; None writes none.

    Raises:
        UserError: the config does not train a CMVAE, or without `read` has modalities that are not images.
    """
    config = load_config(config_path, list(overrides))
    if not isinstance(config, CMVAEExperiment):
        raise UserError(f"{config_path}: trains a refiner. Give the config of a CMVAE")
    config = _with_modalities(config, synthetic)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    torch.manual_seed(config.seed)
    names = list(config.model.modalities)
    if read:
        modalities: Mapping[str, Modality] = ShardIndex.load(config.data.shards).modalities
        batches = read_forever(config, names, device)
    else:
        modalities = _made_up_modalities(config, image_size)
        batches = _repeat_random(config, modalities)
    precision = "fp32" if reference else network_precision(config.train.mixed_precision, device)
    model = CMVAE(config.model, modalities, AUTOCAST_DTYPES[precision])
    build = build_optimizer
    if reference:
        task: CMVAETask = ReferenceTask(model, config.objective)
        build = build_reference_optimizer
    else:
        task = CMVAETask(model, config.objective)
        channels_last(task)
        if device.type == "cpu":
            keep_freed_memory()
    compiled = config.train.compile if not reference else False
    if compiled:
        task.compile_networks(mode=compiled if isinstance(compiled, str) else None)
    task.to(device)
    optimizer = build(task, config.optimizer)
    waited = [0.0]

    def run() -> None:
        waited[0] = 0.0
        for _ in range(updates):
            started = time.perf_counter()
            raw = next(batches)
            waited[0] += time.perf_counter() - started
            if compiled == "reduce-overhead":
                torch.compiler.cudagraph_mark_step_begin()
            loss, _ = task(to_device(raw, task.modalities, device))
            loss.backward()
            if config.optimizer.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(task.parameters(), config.optimizer.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()

    def count_and_trace() -> dict[str, Any]:
        with FlopCounterMode(display=False) as counter:  # disables checkpointing of decoders
            run()
        if profile is not None:
            with torch.profiler.profile() as trace:
                run()
            trace.export_chrome_trace(profile)
        return {"flops": counter.get_total_flops()}

    facts = {
        "batch_size": config.train.batch_size,
        "parameters": sum(parameter.numel() for parameter in task.parameters()),
        "precision": precision,
        "device": str(device),
    }
    waiting = (lambda: waited[0]) if read else None
    return Job(run, updates * config.train.batch_size, facts, waiting, count_and_trace)


def ceiling_job(precision: Precision) -> Job:
    """3×3 convolutions, forward and backward, channels-last, of the fastest of several shapes.

    Args:
        precision: `fp32`, `bf16` or `fp16`.
    """
    dtype = AUTOCAST_DTYPES[precision] or torch.float32
    timed = [_convolutions(channels, side, dtype) for channels, side in CEILING_SHAPES]
    fastest, _ = max(timed, key=lambda job_and_rate: job_and_rate[1])
    return replace(fastest, facts=fastest.facts | {"precision": precision})


def _convolutions(channels: int, side: int, dtype: torch.dtype) -> tuple[Job, float]:
    """Convolutions of one shape that take at least `CEILING_SECONDS`, and their operations per second."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    batch_size = CEILING_BATCH if device.type == "cpu" else CEILING_BATCH_ON_GPU

    def draw(*shape: int) -> Tensor:
        tensor = torch.randn(shape, device=device, dtype=dtype)
        return tensor.to(memory_format=torch.channels_last).requires_grad_()

    x = draw(batch_size, channels, side, side)
    weight = draw(channels, channels, 3, 3)
    towards = torch.ones_like(x)

    def convolve() -> None:
        torch.autograd.grad(F.conv2d(x, weight, padding=1), (x, weight), towards)

    # Counting warms up as well: the first convolution may take longer than the timed ones.
    with FlopCounterMode(display=False) as counter:
        convolve()
    flops = counter.get_total_flops()

    def repeat(times: int) -> Job:
        def run() -> None:
            for _ in range(times):
                convolve()

        return Job(run, times * batch_size, {"flops": times * flops, "channels": channels, "side": side})

    job = repeat(times := 1)
    while (seconds := job.measure()["seconds"]) < CEILING_SECONDS:
        job = repeat(times := 2 * times)
    return job, job.facts["flops"] / seconds


def _with_modalities(config: CMVAEExperiment, synthetic: int | None) -> CMVAEExperiment:
    if synthetic is None:
        return config
    first = next(iter(config.model.modalities.values()))
    modalities = {f"m{place}": first for place in range(synthetic)}
    model = config.model.model_copy(update={"modalities": modalities})
    return config.model_copy(update={"model": model})


def _made_up_modalities(config: CMVAEExperiment, image_size: int) -> dict[str, Modality]:
    others = [
        name for name, it in config.model.modalities.items() if it.network not in (None, *IMAGE_NETWORKS)
    ]
    if others:
        raise UserError(
            f"{', '.join(others)}: not an image modality, so there are no random batches. Read shards: --read"
        )
    modality = ImageModality(shape=(3, image_size, image_size))
    return dict.fromkeys(config.model.modalities, modality)


def _repeat_random(config: CMVAEExperiment, modalities: Mapping[str, Modality]) -> Iterator[dict[str, Any]]:
    size = config.train.batch_size
    batch: dict[str, Any] = {
        name: torch.randint(256, (size, *modality.shape), dtype=torch.uint8)
        for name, modality in modalities.items()
    }
    batch |= {
        "valid": torch.ones(size, dtype=torch.bool),
        "mask": torch.ones(size, len(modalities), dtype=torch.bool),
        "_seed": config.seed,
        "_place": range(size),
    }
    while True:
        yield batch


def read_forever(
    config: CMVAEExperiment, names: Sequence[str], device: torch.device
) -> Iterator[dict[str, Any]]:
    """Train batches of the modalities `names` without end, as one rank reads them, each with its seed."""
    loader = open_train_split(config, names, device)
    batches = itertools.chain.from_iterable(map(loader.epoch_batches, itertools.count()))
    for step, batch in enumerate(batches):
        yield batch | {"_seed": step, "_place": range(config.train.batch_size)}
