"""A config to start from, for data that nobody has tuned one for: it trains as it is."""

from __future__ import annotations

import math
import re
from pathlib import Path

from cmvae.data.schema import ModalitySchema, ShardIndex
from cmvae.kinds import KINDS

# What a good decoder wins over a constant one, in nats an element, about: pixels at Laplace's scale of 0.75,
# standardised numbers at the Normal's (at most 1 / (2 · 0.75²)), words, yes or no.
_NATS_PER_ELEMENT = {"image": 0.27, "vector": 0.9, "text": 3.0, "binary": 0.5}
_TARGET_NATS = 200.0
"""What every modality is to be worth: that of an image of 3×16×16 with weight 1, as in configs/digits.yaml.
The published CUBICC settings do likewise: 32 / (3·64·64) for the image, 5 for the caption."""
_MAX_WEIGHT = 50.0
"""More would have a few numbers learned by heart."""
_UNKNOWN_CLUSTERS = 20
_BATCH_SIZE = 64
_EPOCHS = 100
_MIN_STEPS, _MAX_STEPS = 2000, 20_000
_WIDTHS = {"image": 16, "text": 32}
_WIDTH = 64
"""Of what is neither: hidden units."""


def write_starter_config(index: ShardIndex, shards: Path) -> str:
    """YAML of an experiment on packed data, with a word on what to change first.

    Args:
        index: what was packed.
        shards: where it lies, as the command line says it.
    """
    # Of a run and its folder: a data set may be called anything.
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", index.name).strip("_.-") or "experiment"
    num_train = index.splits["train"].num_samples
    batch_size = min(_BATCH_SIZE, num_train)
    steps = min(max(_EPOCHS * num_train // batch_size, _MIN_STEPS), _MAX_STEPS)
    steps = round(steps, -2)
    if index.class_names is not None:
        clusters, reason = 2 * len(index.class_names), "twice as many as there are labels"
    else:
        clusters, reason = _UNKNOWN_CLUSTERS, "more than you expect"
    # Convolutions gain from bf16; small layers do not, and numbers would only lose digits.
    has_images = any(schema.kind == "image" for schema in index.modalities.values())
    precision = "auto" if has_images else "fp32"
    modalities = "\n".join(_describe(key, schema) for key, schema in index.modalities.items())
    return f"""\
# {name}: a start for data that nobody has tuned yet, written by tools/make_shards.py.
# If clusters split what belongs together, make objective.beta larger; if they merge what does not, make it
# smaller, or model.num_clusters larger; if one modality is generated badly, its likelihood.weight. Trust no
# single run: add seed=1 name=… to the command. cmvae/config.py explains every key.
name: {name}
seed: 0

data:
  shards: {_quote(shards)}
  num_workers: 0            # reader processes; 1 or more where decoding large images holds training up

model:
  family: normal
  shared_dim: 32
  private_dim: 16
  num_clusters: {max(2, clusters)}          # {reason}; the selection drops what is not needed
  cluster_mean_range: 0.1   # near each other at first, so that all of them take part
  modalities:
{modalities}

objective: {{name: iwae, num_samples: 1, beta: 2.5}}

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


def likelihood_weight(schema: ModalitySchema) -> float:
    """s_n by which a modality is worth as many nats as any other, so that none drowns the rest."""
    if schema.kind == "categorical":
        nats = math.log(len(schema.categories or ()))
    else:
        nats = math.prod(schema.shape) * _NATS_PER_ELEMENT.get(schema.kind, 1.0)
    return float(f"{min(_TARGET_NATS / nats, _MAX_WEIGHT):.2g}")


def _describe(name: str, schema: ModalitySchema) -> str:
    family = KINDS[schema.kind].likelihoods[0]
    scale = ", scale: 0.75" if family in ("laplace", "normal") else ""
    shape = "×".join(str(size) for size in schema.shape) or f"one of {len(schema.categories or ())}"
    return f"""\
    {name}:  # {schema.kind}, {shape}
      width: {_WIDTHS.get(schema.kind, _WIDTH)}
      likelihood: {{family: {family}{scale}, weight: {likelihood_weight(schema):g}}}"""


def _quote(path: Path) -> str:
    """A path as YAML, whatever is in it."""
    return "'" + str(path).replace("'", "''") + "'"
