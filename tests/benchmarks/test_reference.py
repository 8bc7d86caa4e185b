"""The plain way of training gives the numbers of the fast one."""

import pytest
import torch
from reference import ReferenceTask, build_reference_optimizer

from cmvae.config import ModalityConfig, ModelConfig, ObjectiveConfig, OptimizerConfig
from cmvae.modalities import ImageModality
from cmvae.models.cmvae import CMVAE, channels_last
from cmvae.training.optimization import build_optimizer
from cmvae.training.tasks import CMVAETask

NAMES = ("a", "b", "c")
MODALITY = ImageModality(shape=(3, 16, 16))


@pytest.mark.parametrize(
    "objective", [ObjectiveConfig(beta=2.5), ObjectiveConfig(name="dreg", num_samples=3)]
)
@pytest.mark.parametrize("names", [NAMES, NAMES[:1]])
def test_loss_and_gradients_are_those_of_the_library(objective, names):
    torch.manual_seed(0)
    modalities = {name: ModalityConfig(width=4) for name in names}
    config = ModelConfig(shared_dim=5, private_dim=4, num_clusters=6, modalities=modalities)
    model = CMVAE(config, dict.fromkeys(names, MODALITY))
    batch = {name: torch.rand(7, 3, 16, 16) for name in names}
    batch |= {"valid": torch.ones(7, dtype=torch.bool), "mask": torch.ones(7, len(names), dtype=torch.bool)}
    batch |= {"_seed": 0, "_place": range(7)}
    reference = ReferenceTask(model, objective)
    calls = []
    for name, decoder in reference.model.decoders.items():
        decoder.register_forward_hook(lambda _, inputs, __, name=name: calls.append((name, len(inputs[0]))))
    losses, gradients = [], []
    for task in (channels_last(CMVAETask(model, objective)), reference):
        loss, _ = task(batch)
        loss.backward()
        losses.append(loss)
        gradients.append({name: p.grad for name, p in task.model.encoders.named_parameters()})
    assert sorted(calls) == sorted((name, 7 * objective.num_samples) for name in names for _ in names)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    for name, expected in gradients[0].items():
        assert (gradients[1][name] - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_upsampling_comes_before_convolving_and_pooling_after_it():
    config = ModelConfig(modalities={"a": ModalityConfig(width=4)}, num_clusters=2)
    reference = ReferenceTask(CMVAE(config, {"a": MODALITY}), ObjectiveConfig())
    kinds = [type(module).__name__ for module in reference.model.modules()]
    # Two halvings, in a decoder and in two trunks of an encoder.
    assert (kinds.count("Upsample"), kinds.count("AvgPool2d")) == (2, 4)
    assert not {"UpsampledConv", "PooledConv"} & set(kinds)


def test_the_optimizer_makes_the_same_updates_and_is_not_fused():
    config = OptimizerConfig(learning_rate=0.1, amsgrad=True, weight_decay=0.01)
    updated = []
    for build in (build_optimizer, build_reference_optimizer):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        optimizer = build(layer, config)
        for _ in range(3):
            layer(torch.ones(2, 4)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        updated.append(layer.weight.detach())
    assert not optimizer.defaults["fused"]
    torch.testing.assert_close(updated[1], updated[0], rtol=1e-5, atol=1e-6)
