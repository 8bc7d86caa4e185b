"""On a GPU nothing in an update waits for the device: told from its operations, on a CPU."""

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from mixed import mixed_model
from refining import make_cmvae, make_refiner
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmvae.config import ObjectiveConfig, OptimizerConfig
from cmvae.data.batch import to_device
from cmvae.training.meters import Meter
from cmvae.training.optimization import build_optimizer
from cmvae.training.refiner_task import RefinerTask
from cmvae.training.step_checks import StopRequest, all_reduce_step_check
from cmvae.training.tasks import CMVAETask

B = 6
# Their result, or the size of it, is read by the CPU; `multinomial` checks its probabilities there.
READ = {"_local_scalar_dense", "nonzero", "masked_select", "multinomial", "equal", "unique_dim", "_unique2"}
# What Python makes of its own numbers: a GPU gets it by a copy that waits.
BROUGHT = {"lift_fresh"}


class Waits(TorchDispatchMode):
    """Collects the operations for which a GPU, or Python for it, would wait."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        by_bool = name in ("index", "index_put", "index_put_") and any(
            isinstance(place, torch.Tensor) and place.dtype == torch.bool for place in args[1]
        )
        if name in READ | BROUGHT or by_bool:
            shapes = [tuple(leaf.shape) for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            self.found.append((name, shapes))
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[[0, 2]],
        lambda x: x[x > 0],
        lambda x: x.new_tensor(2.0),
        lambda x: torch.tensor([1, 2], device=x.device),
        lambda x: x.multinomial(1),
        lambda x: x.nonzero(),
    ],
)
def test_what_waits_is_found(wait):
    x = torch.ones(3, 4)
    with Waits() as waits:
        wait(x)
    assert waits.found


def cmvae_task(**objective):
    return CMVAETask(mixed_model(), ObjectiveConfig(**objective))


def refiner_task(source):
    return RefinerTask(make_refiner(conditioning={"source": source}), make_cmvae())


def stored_batch(modalities):
    """Whole numbers are in the range of every kind."""
    torch.manual_seed(0)
    batch = {
        name: torch.zeros(B, *modality.shape).to(getattr(torch, modality.dtype))
        for name, modality in modalities.items()
    }
    mask = torch.ones(B, len(modalities), dtype=torch.bool)
    mask[1, 0] = mask[2:4, 1] = False
    return batch | {"mask": mask, "valid": torch.ones(B, dtype=torch.bool), "_seed": 0, "_place": range(B)}


@pytest.mark.parametrize(
    "make_task",
    [
        lambda: cmvae_task(num_samples=1),
        lambda: cmvae_task(num_samples=1, cross_sources=2),
        lambda: cmvae_task(name="dreg", num_samples=3, decoder_checkpoint_above=8),
        lambda: refiner_task("any"),
        lambda: refiner_task("self"),
    ],
)
def test_no_update_waits(make_task, monkeypatch):
    # torch's looks for numbers out of range, but not on a GPU.
    monkeypatch.setattr(
        F, "one_hot", lambda x, num_classes: (x[..., None] == torch.arange(num_classes)).long()
    )
    task = make_task().train()
    optimizer = build_optimizer(task, OptimizerConfig())
    raw, accelerator, meter = stored_batch(task.modalities), Accelerator(cpu=True), Meter()

    def update():
        loss, report = task(to_device(raw, task.modalities, torch.device("cpu")))
        check = all_reduce_step_check(accelerator, loss, report, StopRequest())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        meter.add(report, B)
        return check

    update()  # copies tables to the device, once
    with Waits() as waits:
        check = update()
    assert waits.found == []
    assert check.read() == (None, 0)
