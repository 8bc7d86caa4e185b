"""A config for data without a tuned one; it trains as it is."""

from __future__ import annotations

import math
import re
from pathlib import Path

import yaml

from cmvae.data.index import ShardIndex
from cmvae.modalities import Modality
from cmvae.models.networks import network_family
from cmvae.utils.errors import UserError

# Approximate gain of a good decoder over a constant one, in nats per element: pixels with a Laplace scale of
# 0.75, standardised numbers with a Normal scale of 0.75 (at most 1 / (2 · 0.75²)), words, binary values.
_NATS_PER_ELEMENT = {"image": 0.27, "vector": 0.9, "text": 3.0, "binary": 0.5}
_TARGET_NATS = 200.0
"""Target for every modality: an image of 3×16×16 with weight 1, as in configs/digits.yaml. The published
CUBICC settings balance modalities, too: 32 / (3·64·64) for the image, 5 for the caption."""
_MAX_WEIGHT = 50.0
"""A larger weight overfits modalities of few numbers."""
STARTER_CLUSTERS = 20
"""Clusters at the start. The number of labels is not used: the model is to find it."""
_BATCH_SIZE = 64
_EPOCHS, _MAX_EPOCHS, _MIN_STEPS = 100, 150, 2000
"""Small data sets are seen more often, up to a number of epochs that does not overfit."""
_MAX_STEPS = 20_000
_ALIGNED_BATCH_SIZE = 128
"""The alignment term contrasts the samples of a batch: more samples give a better estimate."""
_ALIGNED_MAX_STEPS = 2000
_ALIGNMENT = {"weight": 500.0, "pretrain": 0.5}
_NETWORKS = {"image": "strided", "text": "bag_of_words"}
_WIDTHS = {"image": 64, "text": 16}
_WIDTH = 64
"""Hidden units for the other kinds."""
_LARGE_IMAGE = 48
"""Images of at least this height and width are taken for photographs, which may be mirrored and cropped."""


def write_starter_config(index: ShardIndex, shards: Path) -> str:
    """YAML of an experiment on packed data, with comments on what to change first.

    Args:
        index: what was packed.
        shards: where it lies, as the command line says it.
    """
    # The name of a run and its folder; a data set may have any name.
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", index.name).strip("_.-") or "experiment"
    num_train = index.splits["train"].num_samples
    aligns = needs_alignment(index)
    batch_size = min(_ALIGNED_BATCH_SIZE if aligns else _BATCH_SIZE, num_train)
    epoch = num_train / batch_size
    steps = max(_EPOCHS * epoch, min(_MIN_STEPS, _MAX_EPOCHS * epoch))
    steps = min(math.ceil(steps / 100) * 100, _ALIGNED_MAX_STEPS if aligns else _MAX_STEPS)
    # Decoding an image from every other modality takes most of the time; numbers take almost none.
    cross_sources = "1" if aligns and len(index.modalities) > 2 else "all"
    alignment = _describe_alignment(index) if aligns else ""
    # Convolutions gain from bf16; small layers do not, and numbers lose precision.
    has_images = any(modality.kind == "image" for modality in index.modalities.values())
    precision = "auto" if has_images else "fp32"
    modalities = "\n".join(_describe(key, modality) for key, modality in index.modalities.items())
    return f"""\
# {name}: a config to start from, written by cmvae pack.
# If you know the number of clusters, set clusters.num_clusters, or use cmvae cluster … --num-clusters K after
# the training. If one modality is generated badly, increase its likelihood.weight. Compare several seeds:
# seed=1 name=…. cmvae/config.py explains every key.
name: {_scalar(name)}
seed: 0

data:
  shards: {_quote(shards)}
  num_workers: 0            # reader processes; use 1 or more if decoding large images is the bottleneck

model:
  family: normal
  shared_dim: 32
  private_dim: 16
  num_clusters: {STARTER_CLUSTERS}          # more than you expect; superfluous ones are merged
  assign_by: joint
  cluster_mean_range: 0.1   # close together at the start, so that all are used
  modalities:
{modalities}

objective:
  name: iwae
  num_samples: 1
  beta: 2.5
  cross_sources: {cross_sources}
{alignment}
clusters:
  criterion: stability      # the largest number on which halves of the data agree
  num_clusters: null        # or a number that you know

optimizer:
  learning_rate: 2.0e-3
  schedule: cosine

train:
  batch_size: {batch_size}
  max_steps: {steps}
  mixed_precision: {precision}
  log_every: 25
  validate_every: {steps // 4}
  checkpoint_every: {steps // 4}

evaluation:
  likelihood_samples: 100
"""


def needs_alignment(index: ShardIndex) -> bool:
    """Whether the bound alone would learn z slowly: where images or sentences are paired.

    Numbers are learned quickly without a contrast. Views of the same numbers share more than the class, and a
    contrast would tell them apart sample by sample: on six views of UCI's digits it lowers the accuracy from
    0.97 to 0.84.
    """
    hard = any(modality.kind in ("image", "text") for modality in index.modalities.values())
    return hard and len(index.modalities) > 1


def _describe_alignment(index: ShardIndex) -> str:
    """The alignment section of `objective`, with a final line break."""
    photographs = [
        name
        for name, modality in index.modalities.items()
        if modality.kind == "image" and min(modality.shape[1:]) >= _LARGE_IMAGE
    ]
    augment = ", ".join(f"{_scalar(name)}: [flip, crop]" for name in photographs)
    return f"""\
  alignment:                # learns first, without decoders, what modalities share
    weight: {_ALIGNMENT["weight"]:g}
    pretrain: {_ALIGNMENT["pretrain"]:g}          # share of the steps
    augment: {{{augment}}}
"""


def likelihood_weight(modality: Modality) -> float:
    """s_n with which every modality contributes about the same number of nats."""
    if modality.kind == "categorical":
        nats = math.log(modality.num_categories)
    else:
        nats = math.prod(modality.shape) * _NATS_PER_ELEMENT.get(modality.kind, 1.0)
    return float(f"{min(_TARGET_NATS / nats, _MAX_WEIGHT):.2g}")


def _describe(name: str, modality: Modality) -> str:
    family = modality.likelihoods[0]
    scale = ", scale: 0.75" if family in ("laplace", "normal") else ""
    shape = "×".join(str(size) for size in modality.shape) or f"one of {modality.num_categories}"
    network = _network(modality)
    return f"""\
    {_scalar(name)}:  # {modality.kind}, {shape}{f"{chr(10)}      network: {network}" if network else ""}
      width: {_WIDTHS.get(modality.kind, _WIDTH)}
      likelihood: {{family: {family}{scale}, weight: {likelihood_weight(modality):g}}}"""


def _network(modality: Modality) -> str | None:
    """The family that learns fastest on a CPU, if it fits the modality; None is the default of the kind."""
    name = _NETWORKS.get(modality.kind)
    if name is None:
        return None
    try:
        network_family(name, modality, name)
    except UserError:
        return None
    return name


def _scalar(name: str) -> str:
    """A name as a YAML string, quoted if YAML reads something else, such as 2024, 2024-05-01 or no."""
    try:
        is_plain = yaml.safe_load(name) == name
    except (ValueError, yaml.YAMLError):
        is_plain = False
    return name if is_plain else _quote(name)


def _quote(text: object) -> str:
    """A text as a quoted YAML string."""
    return "'" + str(text).replace("'", "''") + "'"
