"""Evaluation of tensors that a test provides, without shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from cmvae.config import EvaluationConfig
from cmvae.data.index import ShardIndex, ShardSchema, SplitSchema
from cmvae.evaluation.context import EvaluationContext
from cmvae.models.cmvae import CMVAE


@dataclass(frozen=True)
class MadeUpContext(EvaluationContext):
    """Reads `data` instead of shards: per split the modalities and `label`, each (N, ...)."""

    data: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)

    def batches(self, split: str, num_samples: int | None = None) -> Iterator[dict[str, Any]]:
        values = self.data[split]
        for batch in self.positions(len(values["label"][:num_samples])):
            yield {**{name: value[batch["position"]] for name, value in values.items()}, **batch}


def make_context(
    model: CMVAE,
    data: Mapping[str, Mapping[str, Tensor]],
    class_names: Sequence[str] | None = None,
    **settings: Any,
) -> MadeUpContext:
    """Context for an evaluation of `model` on `data`. Without `label`, samples are unlabelled."""
    filled = {}
    for split, values in data.items():
        num_samples = len(next(iter(values.values())))
        mask = torch.ones(num_samples, len(model.modality_names), dtype=torch.bool)
        filled[split] = {"label": torch.full((num_samples,), -1), "mask": mask, **values}
    splits = {}
    for split, values in filled.items():
        size = len(values["label"])
        shard = ShardSchema(name=f"{split}.tar", num_samples=size, num_bytes=1, sha256="0" * 64)
        splits[split] = SplitSchema(num_samples=size, shards=(shard,))
    index = ShardIndex(
        name="made up", source={}, modalities=model.modalities, class_names=class_names, splits=splits
    )
    return MadeUpContext(
        model=model,
        shards=Path("nowhere"),
        index=index,
        settings=EvaluationConfig(**settings),
        accelerator=Accelerator(cpu=True),
        data=filled,
    )
