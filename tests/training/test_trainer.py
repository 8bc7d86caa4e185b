"""The loop in one process: it learns, stops, resumes bit-equal, and names what is not finite."""

import json
import os
import signal
import threading

import pytest
import torch
from safetensors.torch import load_file

from cmvae import CMVAE
from cmvae.clustering import find_cluster_means
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.models.encoding import encode_split
from cmvae.tracking import Tracker
from cmvae.training import checkpoint, train_split, trainer
from cmvae.training import cmvae_task as cmvae_task
from cmvae.training.checkpoint_folder import list_checkpoints
from cmvae.training.run import run_training
from cmvae.training.step_checks import NonFiniteError, StepCheck, StopRequest
from cmvae.training.tasks import CMVAETask
from cmvae.training.validation import load_validation
from cmvae.utils.errors import UserError


def train(config, **arguments):
    return run_training(config, ShardIndex.load(config.data.shards), **arguments)


def final_weights(config):
    return load_file(list_checkpoints(config.run_dir / "checkpoints")[-1] / "model.safetensors")


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def read_state(path):
    return json.loads((path / "state.json").read_text())["state"]


def test_a_run_leaves_checkpoints_config_and_an_export(experiment):
    config = experiment()
    assert train(config) is None
    assert [path.name for path in list_checkpoints(config.run_dir / "checkpoints")] == [
        "step-00000003",
        "step-00000006",
    ]
    # 160 samples make ten batches of 16.
    assert read_state(config.run_dir / "checkpoints/step-00000006") == {
        "epoch": 0,
        "batch": 6,
        "step": 6,
        "samples": 96,
        "validated_step": 0,
        "best_step": None,
        "best_loss": None,
    }
    assert (config.run_dir / "config.yaml").is_file()
    exported = CMVAE.from_pretrained(config.run_dir / "export")
    weights = final_weights(config)
    for name, tensor in exported.state_dict().items():
        if name != "cluster_prior.active":
            assert torch.equal(tensor, weights[f"model.{name}"]), name
    # The checkpoint goes on with all clusters, whatever the export has selected.
    assert weights["model.cluster_prior.active"].all()


def test_a_checkpoint_holds_the_state_of_its_step_though_it_is_written_later(
    experiment, tmp_path, monkeypatch
):
    """The thread starts to write the third step when the fifth has been computed."""
    config = experiment("train.ema_decay=0.9")
    short = experiment("train.ema_decay=0.9", "train.max_steps=3", f"output_dir={tmp_path / 'short'}")
    train(short)
    ahead = threading.Event()
    save_file, update = checkpoint.save_file, trainer.Trainer._update

    def save_late(*arguments):
        assert ahead.wait(60)
        save_file(*arguments)

    def note(trainer, *arguments):
        update(trainer, *arguments)
        if trainer.state.step == 5:
            ahead.set()

    monkeypatch.setattr(checkpoint, "save_file", save_late)
    monkeypatch.setattr(trainer.Trainer, "_update", note)
    train(config)
    found, expected = (run.run_dir / "checkpoints/step-00000003" for run in (config, short))
    for name in ("model.safetensors", "ema.safetensors"):
        assert_equal(load_file(found / name), load_file(expected / name))
    states = [torch.load(path / "optimizer.bin", weights_only=True)["state"] for path in (found, expected)]
    for number, state in states[1].items():
        assert_equal(states[0][number], state)
    assert read_state(found) == read_state(expected)


def test_the_last_validation_can_be_read_without_a_tracker(experiment, monkeypatch):
    logged = []
    monkeypatch.setattr(
        Tracker, "log_metrics", lambda tracker, metrics, step: logged.append((step, dict(metrics)))
    )
    config = experiment("train.validate_every=3")
    train(config)
    validations = [(step, metrics) for step, metrics in logged if "validation/bound" in metrics]
    assert [step for step, _ in validations] == [3, 6]
    saved = load_validation(config.run_dir)
    assert {f"validation/{name}": value for name, value in saved.items()} == validations[-1][1]
    (config.run_dir / "validation.json").write_text("[1]")
    with pytest.raises(UserError, match=r"validation\.json: cannot be read"):
        load_validation(config.run_dir)


def test_figures_and_texts_that_fail_do_not_end_a_training(experiment, monkeypatch, caplog):
    """One warning each; checkpoints, metrics and the export are written."""
    from cmvae.visualize.previews import CrossModal

    monkeypatch.setattr(CrossModal, "draw", lambda made: 1 / 0)
    monkeypatch.setattr(CrossModal, "write", lambda made: {}["none"])
    config = experiment("train.validate_every=3")
    assert train(config) is None
    assert len(list_checkpoints(config.run_dir / "checkpoints")) == 2
    assert load_validation(config.run_dir)["loss"]
    assert (config.run_dir / "export" / "model.safetensors").is_file()
    messages = [record.getMessage() for record in caplog.records if record.name == "cmvae.utils.attempts"]
    figures = [message for message in messages if "figure cross_modal: failed (ZeroDivisionError" in message]
    assert len(figures) == 2
    assert len(messages) == 4


def test_training_lowers_the_loss(experiment, monkeypatch):
    bounds = []
    original = trainer.Meter.add
    monkeypatch.setattr(
        trainer.Meter,
        "add",
        lambda meter, report, *rest: (
            bounds.append(report["bound"].mean().item()),
            original(meter, report, *rest),
        ),
    )
    train(experiment("train.max_steps=60", "optimizer.learning_rate=0.003", "train.checkpoint_every=null"))
    assert sum(bounds[-10:]) / 10 > sum(bounds[:10]) / 10 + 100


@pytest.mark.parametrize(
    "setting",
    [
        "train.gradient_accumulation_steps=1",
        "train.gradient_accumulation_steps=2",
        # Between a checkpoint and the update that follows it, and later.
        "objective.refit_clusters_at=[3,5]",
        # The first phase ends after a resume, and at one.
        "objective.alignment={weight: 10, pretrain: 5, augment: {m0: [flip, crop]}}",
        "objective.alignment={weight: 10, pretrain: 3}",
    ],
)
def test_stop_and_resume_is_bit_equal(experiment, tmp_path, setting):
    settings = ["train.max_steps=8", "train.epochs=null", setting]
    whole = experiment(*settings, f"output_dir={tmp_path / 'whole'}", "train.checkpoint_every=null")
    train(whole)
    parts = experiment(*settings, f"output_dir={tmp_path / 'parts'}", "train.max_steps=3")
    train(parts)
    parts = experiment(*settings, f"output_dir={tmp_path / 'parts'}", "train.validate_every=2")
    train(parts, resume=True)
    reached = [read_state(list_checkpoints(run.run_dir / "checkpoints")[-1]) for run in (parts, whole)]
    for counter in ("epoch", "batch", "step", "samples"):
        assert reached[0][counter] == reached[1][counter]
    assert_equal(final_weights(parts), final_weights(whole))


def test_clusters_are_refitted_at_the_step_that_is_asked_for(experiment, monkeypatch):
    config = experiment("train.max_steps=3", "objective.refit_clusters_at=2", "optimizer.learning_rate=1e-9")
    seen = []
    update = trainer.Trainer._update

    def watched(self, *arguments):
        seen.append(self.task.model.cluster_prior.means.detach().clone())
        return update(self, *arguments)

    monkeypatch.setattr(trainer.Trainer, "_update", watched)
    train(config)
    torch.testing.assert_close(seen[1], seen[0], rtol=0, atol=1e-6)
    assert (seen[2] - seen[1]).abs().max() > 0.01
    model = CMVAE.from_pretrained(config.run_dir / "export")
    loader = EvaluationLoader(
        config.data.shards, split="train", modalities=model.modality_names, batch_size=64
    )
    split = encode_split(model, loader)
    expected = find_cluster_means(split.shared_loc, split.present, num_clusters=len(seen[2]))
    torch.testing.assert_close(seen[2], torch.from_numpy(expected), rtol=0, atol=2e-3)


def test_the_best_checkpoint_is_kept_and_survives_a_resume(experiment, monkeypatch):
    losses = iter([5.0, 3.0, 4.0, 3.5, 9.0, 9.0])
    original = trainer.Trainer.validate
    monkeypatch.setattr(
        trainer.Trainer, "validate", lambda trainer: {**original(trainer), "loss": next(losses)}
    )
    often = ["train.validate_every=2", "train.checkpoint_every=1", "train.keep_checkpoints=1"]
    config = experiment(*often, "train.max_steps=7")
    folder = config.run_dir / "checkpoints"
    train(config)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000004", "step-00000007"]
    config = experiment(*often, "train.max_steps=9")
    train(config, resume=True)
    # The validation after seven steps was that of the export; the one after eight is the fifth.
    state = read_state(folder / "step-00000009")
    assert (state["best_step"], state["best_loss"], state["validated_step"]) == (4, 3.0, 8)
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000004", "step-00000009"]


def test_a_signal_does_not_wait_for_a_validation_which_follows_on_resume(experiment, monkeypatch):
    validated = []
    validate, update = trainer.Trainer.validate, trainer.Trainer._update
    monkeypatch.setattr(
        trainer.Trainer,
        "validate",
        lambda trainer: (validated.append(trainer.state.step), validate(trainer))[1],
    )

    def signal_in_third_step(trainer, *arguments):
        if trainer.state.step == 3 and not validated.count(4):
            os.kill(os.getpid(), signal.SIGTERM)
        return update(trainer, *arguments)

    monkeypatch.setattr(trainer.Trainer, "_update", signal_in_third_step)
    config = experiment("train.validate_every=2")
    assert train(config) == signal.SIGTERM
    assert validated == [2]
    assert train(config, resume=True) is None
    assert validated == [2, 4, 6]


def test_the_same_seed_gives_the_same_run_for_any_number_of_workers(experiment, tmp_path):
    runs = [
        experiment(f"output_dir={tmp_path / name}", f"data.num_workers={workers}", f"seed={seed}")
        for name, workers, seed in (("a", 0, 0), ("b", 2, 0), ("c", 0, 1))
    ]
    for config in runs:
        train(config)
    assert_equal(final_weights(runs[0]), final_weights(runs[1]))
    assert not torch.equal(
        *(final_weights(config)["model.cluster_prior.means"] for config in (runs[0], runs[2]))
    )


@pytest.mark.parametrize("cross_sources", ["all", 1])
def test_accumulation_equals_one_large_batch(experiment, tmp_path, monkeypatch, cross_sources):
    """Two batches of 16 and one of 32 give the same update: the same noise at the same place."""

    class FirstSamples:
        """The same 32 samples in the same order, in batches of any size."""

        batches_per_epoch = 2

        def __init__(self, location, *, modalities, batch_size, **_):
            self.arguments = {"location": location, "split": "train", "modalities": modalities}
            self.batch_size = batch_size

        def epoch_batches(self, epoch, skip_batches=0):
            yield from EvaluationLoader(**self.arguments, batch_size=self.batch_size)

    monkeypatch.setattr(train_split, "TrainingLoader", FirstSamples)
    common = ["train.max_steps=1", "train.checkpoint_every=null", f"objective.cross_sources={cross_sources}"]
    two = experiment(*common, f"output_dir={tmp_path / 'two'}", "train.gradient_accumulation_steps=2")
    one = experiment(*common, f"output_dir={tmp_path / 'one'}", "train.batch_size=32")
    train(two)
    train(one)
    ones, twos = final_weights(one), final_weights(two)
    for name, tensor in ones.items():
        torch.testing.assert_close(
            twos[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, n=name: n + text
        )


@pytest.fixture(params=[False, True], ids=["at_once", "a_step_later"])
def when_read(request, monkeypatch):
    """The checks of a step are read at once, as on a CPU, or a step later, as on a GPU."""
    monkeypatch.setattr(trainer, "reads_late", lambda device: request.param)
    return "later" if request.param else "at once"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_leaves(experiment, monkeypatch, number, when_read):
    config = experiment("train.max_steps=1000", "train.checkpoint_every=null")
    update = trainer.Trainer._update

    def update_then_signal(trainer, *arguments):
        if trainer.state.step == 4:
            os.kill(os.getpid(), number)
        return update(trainer, *arguments)

    monkeypatch.setattr(trainer.Trainer, "_update", update_then_signal)
    before = signal.getsignal(number)
    assert train(config) == number
    assert signal.getsignal(number) == before
    saved = "step-00000005" if when_read == "at once" else "step-00000006"
    assert [path.name for path in list_checkpoints(config.run_dir / "checkpoints")] == [saved]
    assert not (config.run_dir / "export").exists()


def test_a_second_signal_has_its_usual_effect():
    with StopRequest.listening() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_reading_a_step_later_changes_nothing(experiment, monkeypatch):
    train(experiment("train.gradient_accumulation_steps=2"))
    expected = load_file(experiment().run_dir / "export/model.safetensors")
    monkeypatch.setattr(trainer, "reads_late", lambda device: True)
    passes, read_after = [], []
    forward, read = CMVAETask.forward, StepCheck.read

    def count_pass(task, batch):
        passes.extend(["training"] * task.training)
        return forward(task, batch)

    def count_read(check):
        read_after.append(len(passes))
        return read(check)

    monkeypatch.setattr(CMVAETask, "forward", count_pass)
    monkeypatch.setattr(StepCheck, "read", count_read)
    train(experiment("train.gradient_accumulation_steps=2"), overwrite=True)
    # The losses of twelve passes, and a gradient after every second. Curves are written after passes 4, 8
    # and 12, a checkpoint after 6 and 12.
    assert read_after == [2, 3, 3, 4, 4, 4, 6, 6, 6, 8, 8, 8, 10, 11, 11, 12, 12, 12]
    found = load_file(experiment().run_dir / "export/model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.usefixtures("when_read")
def test_a_non_finite_term_is_named_and_never_reaches_a_checkpoint(experiment, monkeypatch):
    config = experiment()
    original = cmvae_task.LogWeightTerms
    steps = []

    def broken(*, log_likelihood, **others):
        if torch.is_grad_enabled():  # not in a validation
            steps.append(len(steps))
        if len(steps) == 5:
            log_likelihood = log_likelihood | {"m1": log_likelihood["m1"] * torch.nan}
        return original(log_likelihood=log_likelihood, **others)

    monkeypatch.setattr(cmvae_task, "LogWeightTerms", broken)
    with pytest.raises(NonFiniteError, match=r"log_likelihood/m1, bound, loss") as caught:
        train(config)
    assert "m0" not in str(caught.value)
    last = list_checkpoints(config.run_dir / "checkpoints")[-1]
    assert last.name == "step-00000003"
    assert all(tensor.isfinite().all() for tensor in load_file(last / "model.safetensors").values())


@pytest.mark.usefixtures("when_read")
def test_a_non_finite_gradient_never_reaches_a_checkpoint(experiment, monkeypatch):
    config = experiment("train.checkpoint_every=1")
    original = CMVAETask.forward
    passes = []

    def broken(task, batch):
        loss, report = original(task, batch)
        passes.extend(["training"] * task.training)
        if task.training and len(passes) == 3:
            loss = loss + (task.model.cluster_prior.means * 0).sqrt().sum()  # finite, its gradient is not
        return loss, report

    monkeypatch.setattr(CMVAETask, "forward", broken)
    with pytest.raises(NonFiniteError, match="gradient"):
        train(config)
    assert [path.name[-1] for path in list_checkpoints(config.run_dir / "checkpoints")] == ["1", "2"]


def test_resume_refuses_what_cannot_change_and_names_it(experiment):
    train(experiment())
    with pytest.raises(UserError, match=r"optimizer\.learning_rate was 0\.002 and is now 0\.1"):
        train(experiment("optimizer.learning_rate=0.1"), resume=True)


def test_a_run_may_go_on_for_longer_unless_its_schedule_depends_on_the_length(experiment):
    train(experiment("optimizer.schedule=cosine"))
    with pytest.raises(UserError, match=r"max_steps was 6 and is now 8; with optimizer\.schedule: cosine"):
        train(experiment("optimizer.schedule=cosine", "train.max_steps=8"), resume=True)
    share = "objective.alignment={weight: 1, pretrain: 0.5}"
    train(experiment(share), overwrite=True)
    with pytest.raises(UserError, match=r"is now 8; with a fraction in objective\.alignment\.pretrain"):
        train(experiment(share, "train.max_steps=8"), resume=True)
    train(experiment(), overwrite=True)
    config = experiment("train.max_steps=8")
    train(config, resume=True)
    assert list_checkpoints(config.run_dir / "checkpoints")[-1].name == "step-00000008"


def test_resume_without_a_checkpoint_starts_anew(experiment):
    assert train(experiment(), resume=True) is None


def test_only_the_newest_checkpoints_are_kept_and_unfinished_ones_do_not_count(experiment):
    config = experiment("train.checkpoint_every=1", "train.keep_checkpoints=2")
    folder = config.run_dir / "checkpoints"
    for unfinished in (".step-00009999.partial", ".step-00009998.deleted"):
        (folder / unfinished).mkdir(parents=True)
    train(config, resume=True)
    assert all(path.name.startswith("step-") for path in folder.iterdir())
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000005", "step-00000006"]


def test_overwrite_deletes_the_earlier_run(experiment):
    config = experiment()
    (config.run_dir / "export").mkdir(parents=True)
    (config.run_dir / "export/old").touch()
    train(config, overwrite=True)
    assert not (config.run_dir / "export/old").exists()
