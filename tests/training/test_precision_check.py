"""What `train.mixed_precision: auto` does before the first step where bf16 is sound, and where it is not."""

import pytest
import torch
from safetensors.torch import load_file

from cmvae import distributed
from cmvae.data.index import ShardIndex
from cmvae.training import precision_check, run
from cmvae.training.checkpoint_folder import list_checkpoints
from cmvae.training.precision_check import compare_gradients, keep_sound_precision
from cmvae.training.run import run_training
from cmvae.training.step_checks import NonFiniteError
from cmvae.training.tasks import build_task

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def instructions_for_bf16(monkeypatch):
    """Or `auto` would not take bf16 on some machines; they compute in it all the same."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)


class WrongBackward(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor in bf16 alone."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor if x.dtype == torch.bfloat16 else 1
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None


def break_layer(task, layer, factor):
    """Let a layer of a task have wrong gradients in bf16, at every call or at those that `factor()` says."""
    draw = factor if callable(factor) else lambda: factor
    hook = lambda module, inputs, output: WrongBackward.apply(output, draw())  # noqa: E731
    task.get_submodule(layer).register_forward_hook(hook)


@pytest.fixture
def breaking(monkeypatch):
    """`breaking(layer, factor)` breaks that layer in every task of a training that is started then."""

    def breaks(layer, factor):
        def build(*arguments):
            task = build_task(*arguments)
            break_layer(task, layer, factor)
            return task

        monkeypatch.setattr(run, "build_task", build)

    return breaks


def make_task(config, dtype=torch.bfloat16):
    torch.manual_seed(config.seed)
    return build_task(config, ShardIndex.load(config.data.shards), CPU, dtype)


def train(config):
    run_training(config, ShardIndex.load(config.data.shards))
    checkpoint = list_checkpoints(config.run_dir / "checkpoints")[-1]
    return {path.name: load_file(path) for path in checkpoint.glob("*.safetensors")}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for file, tensors in expected.items():
        for name, tensor in tensors.items():
            assert torch.equal(found[file][name], tensor), f"{file}: {name}"


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if "auto takes" in record.getMessage()]


@pytest.mark.parametrize("kind", ["cmvae", "refiner"])
def test_where_bf16_is_sound_a_run_is_bit_equal_to_one_without_the_check(
    experiment, refiner_experiment, tmp_path, caplog, monkeypatch, kind
):
    make, compared = {"cmvae": experiment, "refiner": refiner_experiment}[kind], []

    def compare(*gradients):
        compared.append(len(gradients[0]))
        return compare_gradients(*gradients)

    monkeypatch.setattr(precision_check, "compare_gradients", compare)
    runs = [
        train(
            make("train.max_steps=3", f"train.mixed_precision={precision}", f"output_dir={tmp_path / name}")
        )
        for name, precision in (("checked", "auto"), ("unchecked", "bf16"), ("fp32", "fp32"))
    ]
    assert_equal(runs[0], runs[1])
    assert any(
        not torch.equal(tensor, runs[2]["model.safetensors"][name])
        for name, tensor in runs[0]["model.safetensors"].items()
    )
    parameters = len(list(make_task(make()).parameters()))
    assert compared == [parameters] * 2, "twice, in the first run alone"
    assert not warnings_of(caplog)


@pytest.mark.parametrize(
    ("factor", "told"),
    [
        (torch.nan, " not finite"),
        (0, "model.decoders.m0.stem wrong by 1 times"),
        (-1, "model.decoders.m0.stem wrong by 2 times"),
    ],
)
def test_where_bf16_gives_wrong_gradients_a_run_is_bit_equal_to_one_in_fp32(
    experiment, tmp_path, caplog, breaking, factor, told
):
    breaking("model.decoders.m0.stem", factor)
    settings = ["train.max_steps=2"]
    found = train(experiment(*settings, "train.mixed_precision=auto", f"output_dir={tmp_path / 'auto'}"))
    (warning,) = warnings_of(caplog)
    assert "rank 0: " in warning
    assert told in warning
    for remedy in ("ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16", "train.mixed_precision=fp32"):
        assert remedy in warning
    caplog.clear()
    expected = train(experiment(*settings, "train.mixed_precision=fp32", f"output_dir={tmp_path / 'fp32'}"))
    assert_equal(found, expected)
    assert not warnings_of(caplog)


def test_who_asks_for_bf16_gets_it_unchecked(experiment, caplog, breaking):
    breaking("model.decoders.m0.stem", torch.nan)
    with pytest.raises(NonFiniteError):
        train(experiment("train.mixed_precision=bf16"))
    assert not warnings_of(caplog)


def test_of_a_refiner_the_frozen_cmvae_computes_in_fp32_then_too(refiner_experiment, caplog, breaking):
    config = refiner_experiment()
    task = make_task(config)
    break_layer(task, "refiner.denoisers.shared.unet.conv_in", torch.nan)
    keep_sound_precision(distributed.start_accelerator(config), task, config)
    assert (task.refiner.autocast_dtype, task.cmvae.autocast_dtype) == (None, None)
    assert len(warnings_of(caplog)) == 1


def test_a_fault_that_comes_now_and_then_is_looked_for_twice(experiment, caplog):
    config, factors = experiment(), iter([1, 1, torch.nan])  # fp32, bf16, bf16
    task = make_task(config)
    break_layer(task, "model.encoders.m0.shared_heads.loc", lambda: next(factors))
    keep_sound_precision(distributed.start_accelerator(config), task, config)
    assert task.autocast_dtype is None


def test_a_fault_on_another_rank_counts_here(experiment, caplog, monkeypatch):
    config = experiment()
    own = []
    monkeypatch.setattr(
        precision_check,
        "gather_problems",
        lambda accelerator, problem: own.append(problem) or "rank 1: 1 of 9 layers, a not finite",
    )
    task = make_task(config)
    keep_sound_precision(distributed.start_accelerator(config), task, config)
    assert own == [None]
    assert task.autocast_dtype is None
    assert "rank 1: 1 of 9 layers, a not finite" in warnings_of(caplog)[0]


def test_the_check_leaves_nothing_behind(experiment):
    config = experiment()
    task = make_task(config)
    heads = task.model.encoders["m0"].shared_heads
    heads.loc = torch.nn.Sequential(heads.loc, torch.nn.BatchNorm1d(4))
    before = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    stream = torch.get_rng_state()
    keep_sound_precision(distributed.start_accelerator(config), task, config)
    assert torch.equal(torch.get_rng_state(), stream)
    assert task.state_dict().keys() == before.keys()
    for name, tensor in task.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in task.parameters())
    assert task.autocast_dtype is torch.bfloat16
    assert task.training


def test_without_the_memory_for_the_check_bf16_is_taken_and_that_is_told(experiment, caplog, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(precision_check, "_gradients", fail)
    config = experiment()
    task = make_task(config)
    keep_sound_precision(distributed.start_accelerator(config), task, config)
    assert task.autocast_dtype is torch.bfloat16
    assert "auto takes bf16 unchecked" in warnings_of(caplog)[0]


def test_a_rank_that_computes_in_fp32_reads_nothing_but_answers_the_others(experiment, monkeypatch):
    answers = []
    monkeypatch.setattr(precision_check, "_first_samples", lambda *_: pytest.fail("reads data"))
    monkeypatch.setattr(precision_check, "gather_problems", lambda _, problem: answers.append(problem) or "")
    config = experiment()
    keep_sound_precision(distributed.start_accelerator(config), make_task(config, None), config)
    assert answers == [None]


def test_gradients_are_compared_layer_by_layer():
    torch.manual_seed(0)
    expected = {
        "a.weight": torch.randn(20, 30),
        "a.bias": torch.randn(20) * 1e-7,
        "b.weight": torch.randn(20, 30) * 1e-8,
        "c.weight": torch.zeros(3),
    }
    # Zero but for rounding: the bias beside its weight, and a whole layer beside the others.
    noise = {"a.weight": 1e-2, "a.bias": 1e-4, "b.weight": 1e-5, "c.weight": 1e-5}

    def off(**wrong):
        found = {name: x + noise[name] * torch.randn_like(x) for name, x in expected.items()}
        return {**found, **{name.replace("_", "."): x for name, x in wrong.items()}}

    assert compare_gradients(off(), expected) is None
    assert compare_gradients(expected, expected) is None
    nothing = {name: torch.zeros_like(x) for name, x in expected.items()}
    assert compare_gradients(nothing, nothing) is None
    for wrong, told in (
        ({"a_weight": nothing["a.weight"]}, "1 of 3 layers, a wrong by 1 times"),
        ({"a_weight": -expected["a.weight"]}, "1 of 3 layers, a wrong by 2 times"),
        ({"a_bias": expected["a.bias"] * torch.inf}, "1 of 3 layers, a not finite"),
        ({"b_weight": expected["a.weight"]}, "1 of 3 layers, b wrong by 1e+03 times"),
        ({"c_weight": torch.full((3,), torch.nan)}, "1 of 3 layers, c not finite"),
    ):
        assert compare_gradients(off(**wrong), expected).startswith(told), told
    broken = {name: torch.full_like(x, torch.nan) for name, x in expected.items()}
    assert compare_gradients(off(), broken) is None, "bf16 is not to blame"
