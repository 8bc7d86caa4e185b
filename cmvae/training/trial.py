"""One step of the starter config on two samples, before anything is packed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import yaml

from cmvae.config import CMVAEExperiment
from cmvae.data.batch import stack_values, to_device
from cmvae.data.index import OnError, ShardIndex, ShardSchema, SplitSchema
from cmvae.datasets.base import DamagedSampleError, Source
from cmvae.training.starter_config import write_starter_config
from cmvae.training.tasks import build_task
from cmvae.utils.errors import UserError

_NUM_SAMPLES = 2


def try_starter_config(source: Source, shards: Path, on_error: OnError = "error") -> None:
    """Build the model of the starter config and train it once, so that what it refuses shows in seconds.

    Args:
        source: the data set.
        shards: where it will be packed.
        on_error: `skip` takes the next sample instead of a damaged one.

    Raises:
        UserError: the networks do not take the data, or a loss is not finite.
    """
    index = _index_before_packing(source)
    config = CMVAEExperiment.model_validate(yaml.safe_load(write_starter_config(index, shards)))
    samples = list(islice(_intact_values(source, on_error), _NUM_SAMPLES))
    if not samples:
        raise UserError(f"{source.name}: all samples of the train split are damaged. Replace the files")
    batch = stack_values(samples, index.modalities)
    device = torch.device("cpu")
    try:
        torch.manual_seed(0)
        task = build_task(config, index, device, None)
        task.begin(1)
        loss, _ = task(
            {
                **to_device(batch, index.modalities, device),
                "valid": torch.ones(len(samples), dtype=torch.bool),
                "_seed": 0,
                "_place": range(len(samples)),
            }
        )
        loss.backward()
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{source.name}: the networks of the starter config do not take this data: {error}. Try another "
            "--image-size or --text-length, or leave out a modality"
        ) from error
    if not loss.isfinite():
        raise UserError(
            f"{source.name}: the loss of the starter config is {loss.item()} on the first samples. Look for "
            "extreme numbers in the vectors"
        )


def _intact_values(source: Source, on_error: OnError) -> Iterator[Mapping[str, np.ndarray]]:
    for number in range(source.split_sizes["train"]):
        try:
            yield source.sample("train", number).values
        except DamagedSampleError:
            if on_error == "error":
                raise


def _index_before_packing(source: Source) -> ShardIndex:
    """The index of the data set, with a single shard per split that does not exist."""

    def split(size: int) -> SplitSchema:
        shard = ShardSchema(name="none.tar", num_samples=size, num_bytes=1, sha256="0" * 64)
        return SplitSchema(num_samples=size, shards=(shard,))

    return ShardIndex(
        name=source.name,
        source={},
        modalities=dict(source.modalities),
        class_names=source.class_names,
        splits={name: split(size) for name, size in source.split_sizes.items()},
    )
