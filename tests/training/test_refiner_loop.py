"""Training a refiner in one process: average, export, stop and resume, and the CMVAE that it belongs to."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from cmvae.data.index import ShardIndex
from cmvae.models.export import WEIGHTS_NAME, weights_sha256
from cmvae.models.refiner import Refiner
from cmvae.training import trainer
from cmvae.training.checkpoint_folder import list_checkpoints
from cmvae.training.optimization import EMA_NAME
from cmvae.training.refiner_task import RefinerTask
from cmvae.training.run import average_weights, run_training
from cmvae.utils.errors import UserError
from cmvae.visualize import grids


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Pictures are made, but not laid out: that would take most of the time."""
    monkeypatch.setattr(grids, "cross_modal_grid", lambda *_, **__: Figure())


def train(config, **arguments):
    return run_training(config, ShardIndex.load(config.data.shards), **arguments)


def last_checkpoint(config, name):
    return load_file(list_checkpoints(config.run_dir / "checkpoints")[-1] / name)


def exported(config):
    weights = load_file(config.run_dir / "export" / WEIGHTS_NAME)
    return {f"refiner.{name}": tensor for name, tensor in weights.items()}


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def differ(first, second):
    return any(not torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_validation_and_export_take_the_average_and_training_goes_on_from_the_weights(
    refiner_experiment, monkeypatch
):
    config = refiner_experiment("train.validate_every=4")
    validated, original = [], trainer.Trainer.validate

    def validate(trainer):
        state = trainer.accelerator.unwrap_model(trainer.module).state_dict()
        validated.append({name: tensor.clone() for name, tensor in state.items()})
        return original(trainer)

    monkeypatch.setattr(trainer.Trainer, "validate", validate)
    cmvae_before = (config.cmvae / "export" / WEIGHTS_NAME).read_bytes()
    assert train(config) is None
    average, weights = last_checkpoint(config, EMA_NAME), last_checkpoint(config, WEIGHTS_NAME)
    # The networks have no buffers: all their state is averaged.
    assert_equal(exported(config), average)
    assert differ(average, weights)
    assert len(validated) == 2
    assert_equal(validated[-1], average)
    assert differ(validated[0], average)
    refiner = Refiner.from_pretrained(config.run_dir / "export")
    assert refiner.cmvae_sha256 == weights_sha256(config.cmvae / "export")
    assert refiner.config == config.refiner
    assert (config.cmvae / "export" / WEIGHTS_NAME).read_bytes() == cmvae_before


def test_without_an_average_the_weights_themselves_are_exported(refiner_experiment):
    config = refiner_experiment("train.ema_decay=null")
    train(config)
    checkpoint = list_checkpoints(config.run_dir / "checkpoints")[-1]
    assert not (checkpoint / EMA_NAME).exists()
    assert_equal(exported(config), load_file(checkpoint / WEIGHTS_NAME))


def test_a_cmvae_can_be_averaged_too(experiment):
    config = experiment("train.ema_decay=0.9")
    train(config)
    average, weights = last_checkpoint(config, EMA_NAME), last_checkpoint(config, WEIGHTS_NAME)
    export = {f"model.{n}": x for n, x in load_file(config.run_dir / "export" / WEIGHTS_NAME).items()}
    # The clusters are found at the end, and are no weights.
    assert export.keys() - average.keys() == {"model.cluster_prior.active", "model.cluster_prior.scale"}
    assert_equal({name: export[name] for name in average}, average)
    assert differ(average, weights)


def test_the_average_is_of_all_updates_by_its_rule(refiner_experiment, monkeypatch):
    """The checkpoints of every step hold the weights: from them the average, in double precision."""
    config = refiner_experiment("train.checkpoint_every=1", "train.keep_checkpoints=10")
    start = {}
    original = trainer.Trainer.fit

    def fit(trainer):
        start.update({name: x.detach().double() for name, x in trainer.task.state_dict().items()})
        return original(trainer)

    monkeypatch.setattr(trainer.Trainer, "fit", fit)
    train(config)
    average = start
    for n, checkpoint in enumerate(list_checkpoints(config.run_dir / "checkpoints")):
        decay = (1 + n) / (10 + n)
        weights = load_file(checkpoint / WEIGHTS_NAME)
        average = {name: decay * x + (1 - decay) * weights[name].double() for name, x in average.items()}
    assert n == 5
    for name, tensor in exported(config).items():
        torch.testing.assert_close(tensor.double(), average[name], rtol=1e-5, atol=1e-7)


def test_training_lowers_the_loss(refiner_experiment, monkeypatch):
    losses, original = [], trainer.Meter.add

    def add(meter, report, *rest):
        losses.append(report["denoising_loss"].mean().item())
        original(meter, report, *rest)

    monkeypatch.setattr(trainer.Meter, "add", add)
    train(refiner_experiment("train.max_steps=40", "train.batch_size=8", "train.checkpoint_every=null"))
    assert sum(losses[-10:]) < 0.85 * sum(losses[:10])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stop_and_resume_is_bit_equal(refiner_experiment, tmp_path, precision):
    settings = ["train.max_steps=6", f"train.mixed_precision={precision}"]
    # Neither validations nor reader processes change what a step draws.
    others = ["train.checkpoint_every=null", "train.validate_every=2", "data.num_workers=2"]
    whole = refiner_experiment(*settings, f"output_dir={tmp_path / 'whole'}", *others)
    train(whole)
    parts = [*settings, f"output_dir={tmp_path / 'parts'}"]
    train(refiner_experiment(*parts, "train.max_steps=3"))
    config = refiner_experiment(*parts)
    train(config, resume=True)
    assert_equal(last_checkpoint(config, WEIGHTS_NAME), last_checkpoint(whole, WEIGHTS_NAME))
    assert_equal(last_checkpoint(config, EMA_NAME), last_checkpoint(whole, EMA_NAME))
    assert_equal(exported(config), exported(whole))


def test_validating_more_often_changes_no_training(refiner_experiment, tmp_path):
    runs = [
        refiner_experiment(
            f"train.validate_every={every}", "train.max_steps=3", f"output_dir={tmp_path / str(every)}"
        )
        for every in ("null", 1)
    ]
    for config in runs:
        train(config)
    assert_equal(exported(runs[0]), exported(runs[1]))


def test_pictures_are_drawn_without_dropout(refiner_experiment, monkeypatch):
    modes, original = [], RefinerTask.show

    def show(task, *arguments):
        modes.append([module.training for module in task.modules()])
        return original(task, *arguments)

    monkeypatch.setattr(RefinerTask, "show", show)
    train(refiner_experiment("train.validate_every=3"))
    assert len(modes) == 2
    assert not any(any(training) for training in modes)


def test_a_training_goes_on_with_the_cmvae_that_it_began_with_alone(
    refiner_experiment, make_cmvae_run, tmp_path
):
    train(refiner_experiment("train.max_steps=3"))
    make_cmvae_run(seed=1)
    with pytest.raises(UserError, match=r"step-00000003: belongs to .*the CMVAE is not the one"):
        train(refiner_experiment(), resume=True)
    make_cmvae_run(seed=0)
    assert train(refiner_experiment(), resume=True) is None


def test_a_checkpoint_without_its_average_is_refused(refiner_experiment):
    train(refiner_experiment("train.max_steps=3"))
    config = refiner_experiment()
    with pytest.raises(UserError, match=r"train\.ema_decay was 0\.9 and is now None"):
        train(refiner_experiment("train.ema_decay=null"), resume=True)
    (config.run_dir / "checkpoints/step-00000003" / EMA_NAME).unlink()
    with pytest.raises(UserError, match=r"step-00000003: ema\.safetensors is missing"):
        train(config, resume=True)


def test_a_damaged_average_is_refused(refiner_experiment):
    train(refiner_experiment("train.max_steps=3"))
    config = refiner_experiment()
    path = config.run_dir / "checkpoints/step-00000003" / EMA_NAME
    whole = load_file(path)
    save_file(dict(list(whole.items())[1:]), path)
    with pytest.raises(UserError, match=r"step-00000003: ema\.safetensors"):
        train(config, resume=True)


def test_a_missing_or_damaged_cmvae_is_named(refiner_experiment):
    config = refiner_experiment()
    weights = config.cmvae / "export" / WEIGHTS_NAME
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(UserError, match="cmvae/export: damaged export"):
        train(config)
    shutil.rmtree(config.cmvae / "export")
    with pytest.raises(UserError, match=r"cmvae/export/model\.safetensors: missing"):
        train(config)
    assert not config.run_dir.exists()


def test_no_average_under_zero_3():
    module = torch.nn.Linear(2, 2)

    def accelerator(stage):
        plugin = None if stage is None else SimpleNamespace(zero_stage=stage)
        return SimpleNamespace(
            state=SimpleNamespace(deepspeed_plugin=plugin), unwrap_model=lambda wrapped: wrapped
        )

    with pytest.raises(
        UserError, match=r"train\.ema_decay: under ZeRO-3 .*zero2\.yaml.*train\.ema_decay=null"
    ):
        average_weights(accelerator(3), module, 0.9)
    assert average_weights(accelerator(3), module, None) is None
    for stage in (None, 1, 2):
        assert average_weights(accelerator(stage), module, 0.9) is not None
