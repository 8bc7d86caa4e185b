"""A config to start from, for data that nobody has tuned one for: it trains as it is."""

from __future__ import annotations

import math
import re
from pathlib import Path

from cmvae.data.index import ShardIndex
from cmvae.modalities import Modality
from cmvae.models.networks import network_family
from cmvae.utils.errors import UserError

# What a good decoder wins over a constant one, in nats an element, about: pixels at Laplace's scale of 0.75,
# standardised numbers at the Normal's (at most 1 / (2 · 0.75²)), words, yes or no.
_NATS_PER_ELEMENT = {"image": 0.27, "vector": 0.9, "text": 3.0, "binary": 0.5}
_TARGET_NATS = 200.0
"""What every modality is to be worth: that of an image of 3×16×16 with weight 1, as in configs/digits.yaml.
The published CUBICC settings do likewise: 32 / (3·64·64) for the image, 5 for the caption."""
_MAX_WEIGHT = 50.0
"""More would have a few numbers learned by heart."""
_CLUSTERS = 20
"""To start from. The number of labels is not asked: it would tell what the model is to find."""
_BATCH_SIZE = 64
_EPOCHS, _MAX_EPOCHS, _MIN_STEPS = 100, 150, 2000
"""Few samples are seen more often, but not so often that they are learned by heart."""
_MAX_STEPS = 20_000
_ALIGNED_BATCH_SIZE = 128
"""The contrast tells samples of a batch apart: more of them tell more."""
_ALIGNED_MAX_STEPS = 2000
_ALIGNMENT = {"weight": 500.0, "pretrain": 0.5}
_NETWORKS = {"image": "strided", "text": "bag_of_words"}
_WIDTHS = {"image": 64, "text": 16}
_WIDTH = 64
"""Of what is neither: hidden units."""
_LARGE_IMAGE = 48
"""Pixels a side from which a photograph shows the same thing when it is mirrored or cropped."""


def write_starter_config(index: ShardIndex, shards: Path) -> str:
    """YAML of an experiment on packed data, with a word on what to change first.

    Args:
        index: what was packed.
        shards: where it lies, as the command line says it.
    """
    # Of a run and its folder: a data set may be called anything.
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", index.name).strip("_.-") or "experiment"
    num_train = index.splits["train"].num_samples
    aligns = needs_alignment(index)
    batch_size = min(_ALIGNED_BATCH_SIZE if aligns else _BATCH_SIZE, num_train)
    epoch = num_train / batch_size
    steps = max(_EPOCHS * epoch, min(_MIN_STEPS, _MAX_EPOCHS * epoch))
    steps = min(math.ceil(steps / 100) * 100, _ALIGNED_MAX_STEPS if aligns else _MAX_STEPS)
    # Decoding a picture from every other modality takes most of the time; numbers cost next to nothing.
    cross_sources = "1" if aligns and len(index.modalities) > 2 else "all"
    alignment = _describe_alignment(index) if aligns else ""
    # Convolutions gain from bf16; small layers do not, and numbers would only lose digits.
    has_images = any(modality.kind == "image" for modality in index.modalities.values())
    precision = "auto" if has_images else "fp32"
    modalities = "\n".join(_describe(key, modality) for key, modality in index.modalities.items())
    return f"""\
# {name}: a start for data that nobody has tuned yet, written by cmvae pack.
# If you know how many clusters there are, set clusters.num_clusters, or ask for them afterwards:
# cmvae cluster … --num-clusters K. If one modality is generated badly, make its likelihood.weight larger.
# Trust no single run: add seed=1 name=… to the command. cmvae/config.py explains every key.
name: {name}
seed: 0

data:
  shards: {_quote(shards)}
  num_workers: 0            # reader processes; 1 or more where decoding large images holds training up

model:
  family: normal
  shared_dim: 32
  private_dim: 16
  num_clusters: {_CLUSTERS}          # more than you expect; those that are not needed are merged
  assign_by: joint
  cluster_mean_range: 0.1   # near each other at first, so that all of them take part
  modalities:
{modalities}

objective:
  name: iwae
  num_samples: 1
  beta: 2.5
  cross_sources: {cross_sources}
{alignment}
clusters:
  criterion: stability      # the largest number that halves of the data agree about
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
    """Whether z would be learned slowly from the bound alone: where photographs or sentences are paired.

    Numbers are learned quickly without a contrast. Views of the same numbers share more than the class, and a
    contrast would tell them apart sample by sample: on six views of UCI's digits it lowers the accuracy from
    0.97 to 0.84.
    """
    hard = any(modality.kind in ("image", "text") for modality in index.modalities.values())
    return hard and len(index.modalities) > 1


def _describe_alignment(index: ShardIndex) -> str:
    """The contrast's part of `objective`, with a line break."""
    photographs = [
        name
        for name, modality in index.modalities.items()
        if modality.kind == "image" and min(modality.shape[1:]) >= _LARGE_IMAGE
    ]
    augment = ", ".join(f"{name}: [flip, crop]" for name in photographs)
    return f"""\
  alignment:                # what modalities share, learned first, without decoders
    weight: {_ALIGNMENT["weight"]:g}
    pretrain: {_ALIGNMENT["pretrain"]:g}          # share of the steps
    augment: {{{augment}}}
"""


def likelihood_weight(modality: Modality) -> float:
    """s_n by which a modality is worth as many nats as any other, so that none drowns the rest."""
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
    {name}:  # {modality.kind}, {shape}{f"{chr(10)}      network: {network}" if network else ""}
      width: {_WIDTHS.get(modality.kind, _WIDTH)}
      likelihood: {{family: {family}{scale}, weight: {likelihood_weight(modality):g}}}"""


def _network(modality: Modality) -> str | None:
    """The family that learns fastest on a processor, where the modality fits it; None is that of its kind."""
    name = _NETWORKS.get(modality.kind)
    if name is None:
        return None
    try:
        network_family(name, modality, name)
    except UserError:
        return None
    return name


def _quote(path: Path) -> str:
    """A path as YAML, whatever is in it."""
    return "'" + str(path).replace("'", "''") + "'"
