"""Coherence at every validation of a training, for learning curves."""

from __future__ import annotations

from typing import cast

from accelerate import Accelerator
from torch import nn

from cmvae.config import CMVAEExperiment
from cmvae.data.index import ShardIndex
from cmvae.evaluation.classifiers import check_classifiers
from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.feature_networks import FeatureNetworks, load_feature_networks
from cmvae.evaluation.generative import measure_generated, read_reference
from cmvae.models.cmvae import CMVAE
from cmvae.utils.errors import UserError

_METRICS = ("coherence/conditional", "coherence/unconditional")


class ValidationCoherence:
    """Measures the coherence of a CMVAE while it is trained, on the validation split.

    Before the end of a training no clusters are selected, so unconditional samples come from the mixture as
    it is trained. Noise is a function of the sample, so that curves show the model alone.

    Args:
        config: the experiment.
        index: index of `config.data.shards`.
        num_samples: number of validation samples to generate from, and of unconditional samples.

    Raises:
        UserError: an image modality has no classifier.
    """

    def __init__(self, config: CMVAEExperiment, index: ShardIndex, num_samples: int) -> None:
        self._shards, self._index, self._num_samples = config.data.shards, index, num_samples
        self._settings = config.evaluation.model_copy(
            update={"split": "validation", "num_generated": num_samples}
        )
        self._networks: FeatureNetworks | None = None
        images = [name for name in config.model.modalities if "generative" in index.modalities[name].metrics]
        try:
            check_classifiers(self._shards, index, images)
        except UserError as error:
            raise UserError(f"train.coherence_samples: {error}, or set it to null") from error

    def __call__(self, task: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Measure the model of a task; must be called on all ranks.

        Args:
            task: a module in evaluation mode with the CMVAE as `model`.
            accelerator: the ranks.

        Returns:
            `coherence/conditional` and `coherence/unconditional`, where the modalities have classifiers.

        Raises:
            UserError: the classifiers cannot be used, or the model generates values that are not finite.
        """
        model = cast(CMVAE, task.model)
        context = EvaluationContext(model, self._shards, self._index, self._settings, accelerator)
        if self._networks is None:
            self._networks, left_out = load_feature_networks(context, {"coherence"})
            if not self._networks.classified:
                reason = left_out.get("coherence", "no modality has a classifier")
                raise UserError(f"train.coherence_samples: {reason}, or set it to null")
        reference = read_reference(context, self._networks, {"coherence"}, self._num_samples)
        metrics = measure_generated(context, reference, max_sources=1).metrics
        return {name: metrics[name] for name in _METRICS if name in metrics}
