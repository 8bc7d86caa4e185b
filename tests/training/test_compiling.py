"""`train.compile`: the same training from compiled networks, and what it says where there can be none."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from refining import make_cmvae, make_refiner
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

from cmvae import CMVAE
from cmvae.config import ObjectiveConfig
from cmvae.data.index import ShardIndex
from cmvae.training.refiner_task import RefinerTask
from cmvae.training.run import compile_networks, run_training
from cmvae.training.tasks import CMVAETask, Task
from cmvae.utils.errors import UserError


@pytest.fixture
def backend(monkeypatch):
    """Traces networks and gradients as torch's own compiler does, which then generates code, for minutes."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_networks = Task.compile_networks
    monkeypatch.setattr(Task, "compile_networks", lambda task, mode=None: compile_networks(task, counter))
    yield counter
    torch._dynamo.reset()


def train(config, **arguments):
    return run_training(config, ShardIndex.load(config.data.shards), **arguments)


def test_a_compiled_training_is_the_same(experiment, backend):
    settings = ["train.max_steps=3", "objective.num_samples=2", "objective.decoder_checkpoint_above=48"]
    train(experiment(*settings))
    expected = load_file(experiment().run_dir / "export/model.safetensors")
    assert backend.frame_count == 0
    config = experiment(*settings, "train.compile=true")
    train(config, overwrite=True)
    assert backend.frame_count > 0
    found = load_file(config.run_dir / "export/model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: n + text
        )
    CMVAE.from_pretrained(config.run_dir / "export")
    # A run may go on compiled, or not compiled any more.
    train(experiment(*settings, "train.max_steps=4"), resume=True)


def test_all_networks_of_both_tasks_are_compiled():
    cmvae, refiner = make_cmvae(), make_refiner()
    of_cmvae = {*cmvae.encoders.values(), *cmvae.decoders.values()}
    tasks = {
        CMVAETask(cmvae, ObjectiveConfig()): set(),
        RefinerTask(refiner, cmvae): set(refiner.denoisers.values()),
    }
    for task, others in tasks.items():
        assert set(task.networks) == of_cmvae | others
        task.compile_networks("eager")
        assert all(network._compiled_call_impl is not None for network in task.networks)


def test_under_deepspeed_it_is_refused():
    ranks = SimpleNamespace(distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(UserError, match=r"train\.compile: under DeepSpeed .*train\.compile=false.*ddp\.yaml"):
        compile_networks(ranks, None)


def test_a_compiler_that_fails_is_told_with_the_remedy(experiment, monkeypatch):
    def no_compiler(graph, inputs):
        raise RuntimeError("no C++ compiler\nand much more")

    compile_networks = Task.compile_networks
    monkeypatch.setattr(Task, "compile_networks", lambda task, mode=None: compile_networks(task, no_compiler))
    with pytest.raises(UserError, match=r"^train\.compile: .*no C\+\+ compiler\. Set train\.compile=false$"):
        train(experiment("train.compile=true"))
    torch._dynamo.reset()


def test_cuda_graphs_are_a_mode_of_the_compiler(experiment, monkeypatch):
    """Without a GPU: what the compiler is asked for, and that every update begins a new graph."""
    asked, begun = [], []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda network, **arguments: asked.append(arguments["mode"])
    )
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: begun.append(True))
    train(experiment("train.compile=reduce-overhead", "train.max_steps=4", "train.checkpoint_every=null"))
    assert set(asked) == {"reduce-overhead"}
    assert len(begun) == 4
    asked.clear()
    train(experiment("train.compile=true", "train.max_steps=4"), overwrite=True)
    assert set(asked) == {None}
    assert len(begun) == 4
