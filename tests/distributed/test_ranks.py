"""Two real ranks on the CPU, launched as the documented configurations launch them."""

import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, run_cmvae, run_command
from safetensors.torch import load_file

from cmvae import CMVAE
from cmvae.clustering import find_cluster_means
from cmvae.config import load_config
from cmvae.data.reader import EvaluationLoader
from cmvae.models.encoding import encode_split
from cmvae.models.refiner import Refiner

STEPS = 4
SCRIPT = Path(__file__).with_name("train_steps.py")


def launch(configuration, *arguments, cwd=ROOT, ranks=2):
    return run_command(
        [
            "accelerate",
            "launch",
            f"--config_file={ROOT}/configs/accelerate/{configuration}.yaml",
            f"--num_processes={ranks}",
            "--main_process_port=0",
            *arguments,
        ],
        cwd,
    )


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, digits_shards):
    """Losses of one rank at batch 16, in fp32."""
    folder = tmp_path_factory.mktemp("one_rank")
    done = run_command([sys.executable, SCRIPT, *steps_arguments(folder, digits_shards, batch_size=16)], ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text())


def steps_arguments(folder, shards, batch_size, precision="fp32", missing="none"):
    return [
        ROOT / "configs/digits.yaml",
        folder,
        STEPS,
        missing,
        f"data.shards={shards}",
        f"train.batch_size={batch_size}",
        f"train.mixed_precision={precision}",
        # An accumulated or clipped gradient must not depend on the ranks either.
        "optimizer.max_grad_norm=2000",
        "objective.alignment={weight: 0}",
        # At a higher rate the first updates overshoot, and rounding becomes a difference of some percent.
        "optimizer.learning_rate=1.0e-3",
    ]


@pytest.mark.parametrize(
    ("configuration", "kind"),
    [
        ("ddp", "MULTI_CPU"),
        ("zero2", "DEEPSPEED"),
        pytest.param("zero1", "DEEPSPEED", marks=pytest.mark.faults),
        pytest.param("zero1_offload", "DEEPSPEED", marks=pytest.mark.faults),
        pytest.param("zero2_offload", "DEEPSPEED", marks=pytest.mark.faults),
        ("zero3", "DEEPSPEED"),
        pytest.param("zero3_offload", "DEEPSPEED", marks=pytest.mark.faults),
    ],
)
def test_two_ranks_give_the_losses_of_one_at_twice_the_batch(
    tmp_path, digits_shards, one_rank, configuration, kind
):
    done = launch(configuration, SCRIPT, *steps_arguments(tmp_path, digits_shards, batch_size=8))
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["world_size"], result["distributed_type"]) == (2, kind)
    assert len(result["losses"]) == STEPS
    assert result["losses"] == pytest.approx(one_rank["losses"], rel=1e-5)
    # The losses fall, so that equal losses mean equal updates.
    assert result["losses"][-1] < result["losses"][0] - 50
    assert result["export_difference"] < 1e-5


ALIGNED = ["objective.alignment={weight: 50, pretrain: 2}", "optimizer.learning_rate=1e-3"]


@pytest.fixture(scope="module")
def one_rank_aligned(tmp_path_factory, digits_shards):
    """As `one_rank`, two updates of the contrast alone, then both terms; half of every batch without m1."""
    folder = tmp_path_factory.mktemp("aligned")
    arguments = [*steps_arguments(folder, digits_shards, batch_size=16, missing="m1"), *ALIGNED]
    done = run_command([sys.executable, SCRIPT, *arguments], ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("configuration", ["ddp", pytest.param("zero2", marks=pytest.mark.faults), "zero3"])
def test_the_contrast_of_two_ranks_is_that_of_one_at_twice_the_batch(
    tmp_path, digits_shards, one_rank_aligned, configuration
):
    arguments = steps_arguments(tmp_path, digits_shards, batch_size=8, missing="m1")
    done = launch(configuration, SCRIPT, *arguments, *ALIGNED)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    # DeepSpeed's Adam counts the updates of all parameters together, torch's those of each: decoders, which
    # are not trained at first, then make a first step of another size.
    compared = 4 if configuration == "ddp" else 3
    expected = one_rank_aligned["losses"][:compared]
    assert result["losses"][:compared] == pytest.approx(expected, rel=1e-5)
    # The first two are of a contrast among sixteen, whatever each rank holds.
    assert result["losses"][0] == pytest.approx(math.log(16), abs=0.3)
    assert result["losses"][0] != result["losses"][1]
    assert result["losses"][2] > 100


@pytest.fixture(scope="module")
def one_rank_with_gaps(tmp_path_factory, digits_shards):
    """As `one_rank`, half of every batch without m1."""
    folder = tmp_path_factory.mktemp("gaps")
    arguments = steps_arguments(folder, digits_shards, batch_size=16, missing="m1")
    done = run_command([sys.executable, SCRIPT, *arguments], ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "result.json").read_text())


@pytest.mark.parametrize("configuration", ["ddp", "zero3"])
def test_a_modality_that_one_rank_never_sees_hangs_nothing(
    tmp_path, digits_shards, one_rank, one_rank_with_gaps, configuration
):
    """Items 10 and 7 of the design: DDP waits for every gradient, ZeRO-3 for every module."""
    arguments = steps_arguments(tmp_path, digits_shards, batch_size=8, missing="m1")
    done = launch(configuration, SCRIPT, *arguments)
    assert done.returncode == 0, done.stderr
    losses = json.loads((tmp_path / "result.json").read_text())["losses"]
    assert losses == pytest.approx(one_rank_with_gaps["losses"], rel=1e-5)
    assert losses[0] < 0.95 * one_rank["losses"][0], "a missing modality costs nothing"


def test_densities_stay_fp32_under_deepspeeds_bf16(tmp_path, digits_shards, one_rank):
    done = launch("zero2", SCRIPT, *steps_arguments(tmp_path, digits_shards, batch_size=8, precision="bf16"))
    assert done.returncode == 0, done.stderr
    losses = json.loads((tmp_path / "result.json").read_text())["losses"]
    # A bf16 loss near 2,000 is a multiple of 8; networks in bf16 alone move it by far less than a percent.
    assert losses == pytest.approx(one_rank["losses"], rel=2e-3)
    assert any(loss % 1 for loss in losses)


@pytest.mark.parametrize(
    "configuration",
    [
        "ddp",
        "zero2",
        "zero3",
        *(pytest.param(f"zero{stage}_offload", marks=pytest.mark.faults) for stage in (1, 2, 3)),
    ],
)
def test_the_documented_training_runs_and_resumes_on_two_ranks(tmp_path, experiment_file, configuration):
    train = [ROOT / "launch/train.py", experiment_file, "train.batch_size=8", "train.validate_every=2"]
    # DeepSpeed's JSON is named relative to the checkout.
    stopped = launch(configuration, *train, "train.max_steps=3")
    assert stopped.returncode == 0, stopped.stderr
    run = tmp_path / "run"
    # The first validation is the best so far.
    saved = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert saved == ["step-00000002", "step-00000003"]
    shutil.rmtree(run / "export")
    # The installed command finds both files by name, in any folder.
    flags = ["--launch", configuration, "--num-processes", 2, "--resume"]
    done = run_cmvae("train", *train[1:], *flags, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    state = json.loads((run / "checkpoints/step-00000006/state.json").read_text())
    assert state["state"].items() >= {"epoch": 0, "batch": 6, "step": 6, "samples": 96}.items()
    assert state["world_size"] == 2
    exported = CMVAE.from_pretrained(run / "export")
    assert all(weight.isfinite().all() for weight in exported.parameters())
    assert exported.cluster_prior.means.abs().max() > 0
    assert load_file(run / "export/model.safetensors")["cluster_prior.logits"].abs().max() > 0

    refused = run_command(
        [sys.executable, ROOT / "launch/train.py", experiment_file, "train.batch_size=8", "--resume"], ROOT
    )
    assert refused.returncode == 2
    how = "train.global_batch_size=16" if configuration == "ddp" else f"--launch {configuration[:5]}"
    assert how in refused.stderr


@pytest.mark.parametrize("configuration", [pytest.param("zero2", marks=pytest.mark.faults), "zero3"])
def test_refitted_clusters_reach_the_export_on_two_ranks(tmp_path, experiment_file, configuration):
    settings = ["train.max_steps=2", "optimizer.learning_rate=1e-9", "objective.refit_clusters_at=1"]
    train = [ROOT / "launch/train.py", experiment_file, "train.batch_size=8", *settings]
    done = launch(configuration, *train)
    assert done.returncode == 0, done.stderr
    config = load_config(tmp_path / "run/config.yaml")
    model = CMVAE.from_pretrained(tmp_path / "run/export")
    loader = EvaluationLoader(
        config.data.shards, split="train", modalities=model.modality_names, batch_size=64
    )
    split = encode_split(model, loader)
    means = model.cluster_prior.means.detach()
    expected = torch.from_numpy(find_cluster_means(split.shared_loc, split.present, num_clusters=len(means)))
    torch.testing.assert_close(means, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("configuration", ["ddp", pytest.param("zero2", marks=pytest.mark.faults)])
def test_a_broken_term_on_one_rank_stops_both_and_is_named(tmp_path, experiment_file, configuration):
    script = Path(__file__).with_name("one_rank_breaks.py")
    done = launch(
        configuration,
        script,
        ROOT / "launch/train.py",
        experiment_file,
        "train.batch_size=8",
        "train.checkpoint_every=1",
    )
    assert done.returncode != 0
    # The launcher may end the other rank before it has said the same.
    assert "error: not finite: log_likelihood/m2, bound, loss" in done.stderr, done.stderr
    # Two updates were sound; the third never happened.
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        "step-00000001",
        "step-00000002",
    ]


@pytest.mark.parametrize(
    ("configuration", "rank"), [("ddp", 0), pytest.param("zero2", 1, marks=pytest.mark.faults)]
)
def test_a_checkpoint_that_one_rank_cannot_write_is_left_out_by_all(
    tmp_path, experiment_file, configuration, rank
):
    """Both ranks log it and go on; what comes later is complete and can be resumed."""
    train = [ROOT / "launch/train.py", experiment_file, "train.batch_size=8", "train.checkpoint_every=2"]
    script = Path(__file__).with_name("one_rank_cannot_write.py")
    done = launch(configuration, script, str(rank), *train)
    assert done.returncode == 0, done.stderr
    for log in ("rank-0.log", "rank-1.log"):
        warned = [
            line for line in (tmp_path / "run/logs" / log).read_text().splitlines() if "no check" in line
        ]
        assert len(warned) == 1
        assert f"no checkpoint of step 4: rank {rank}: OSError: [Errno 5]" in warned[0]
        assert warned[0].endswith("the last one is of step 2")
    folder = tmp_path / "run/checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000006"]
    done = launch(configuration, *train, "train.max_steps=8", "--resume")
    assert done.returncode == 0, done.stderr
    assert "at epoch 0, step 6" in done.stdout
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000006", "step-00000008"]


@pytest.mark.parametrize("configuration", ["ddp", pytest.param("zero3", marks=pytest.mark.faults)])
def test_wrong_gradients_in_bf16_on_one_rank_make_both_take_fp32(tmp_path, experiment_file, configuration):
    weights = []
    for script, precision in (("one_rank_lacks_bf16.py", "auto"), (None, "fp32")):
        folder = tmp_path / precision
        done = launch(
            configuration,
            *([] if script is None else [Path(__file__).with_name(script)]),
            ROOT / "launch/train.py",
            experiment_file,
            "train.batch_size=8",
            "train.max_steps=2",
            f"train.mixed_precision={precision}",
            f"output_dir={folder}",
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("auto takes fp32") == (script is not None), done.stderr
        assert ("rank 1: " in done.stderr) == (script is not None)
        weights.append(load_file(folder / "export/model.safetensors"))
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("configuration", ["ddp", pytest.param("zero2", marks=pytest.mark.faults)])
def test_damaged_samples_are_skipped_on_two_ranks_and_stop_both_above_the_bound(
    tmp_path, experiment_file, damaged_shards, configuration
):
    settings = ["train.batch_size=8", "train.max_steps=10", "data.on_error=skip"]
    train = [ROOT / "launch/train.py", experiment_file, f"data.shards={damaged_shards}", *settings]
    done = launch(configuration, *train)
    assert done.returncode == 0, done.stderr
    logs = [(tmp_path / f"run/logs/rank-{rank}.log").read_text() for rank in range(2)]
    assert sum(log.count("skipped a sample: ") for log in logs) == 3
    stopped = launch(configuration, *train, "data.max_skipped=2", "--overwrite")
    assert stopped.returncode != 0
    assert "error: data.max_skipped: 3 damaged samples" in stopped.stderr
    assert not (tmp_path / "run/export").exists()


def test_what_a_validation_skips_is_counted_over_both_ranks(tmp_path, experiment_file, digits_shards):
    """Neither rank has more than the bound; the parts of two ranks begin and end with a damaged sample."""
    folder = tmp_path / "damaged"
    shutil.copytree(digits_shards, folder)
    index = json.loads((folder / "index.json").read_text())
    (entry,) = index["splits"]["validation"]["shards"]
    content = (folder / entry["name"]).read_bytes()
    first, last = content.index(b"PNG"), content.rindex(b"PNG")
    for place in (first, last):
        content = content[:place] + b"GIF" + content[place + 3 :]
    (folder / entry["name"]).write_bytes(content)
    settings = [f"data.shards={folder}", "data.on_error=skip", "data.max_skipped=1", "train.batch_size=8"]
    stopped = launch("ddp", ROOT / "launch/train.py", experiment_file, *settings)
    assert stopped.returncode != 0
    assert "error: data.max_skipped: 2 damaged samples" in stopped.stderr, stopped.stderr


def test_ranks_that_do_not_find_each_other_are_refused(tmp_path, experiment_file):
    """Two processes that think they are alone would train two models: item 7 of the design."""
    done = run_command(
        [sys.executable, ROOT / "launch/train.py", experiment_file],
        ROOT,
        WORLD_SIZE="2",
        RANK="0",
        ACCELERATE_USE_CPU="false",
    )
    assert done.returncode != 0
    assert not (tmp_path / "run/export").exists()


def test_an_evaluation_on_two_ranks_gives_the_figures_of_one(tmp_path, experiment_file, quadrants_shards):
    shards = f"data.shards={quadrants_shards}"
    trained = run_command([sys.executable, ROOT / "launch/train.py", experiment_file, shards], ROOT)
    assert trained.returncode == 0, trained.stderr
    evaluate = [ROOT / "launch/evaluate.py", tmp_path / "run", "num_generated=70", "likelihood_samples=6"]
    folder = tmp_path / "run/evaluation"

    def read():
        return [json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "protocol")]

    alone = run_command([sys.executable, *evaluate], ROOT)
    assert alone.returncode == 0, alone.stderr
    one, one_protocol = read()
    shutil.rmtree(folder)
    done = launch("ddp", *evaluate, "batch_size=7")
    assert done.returncode == 0, done.stderr
    two, two_protocol = read()
    assert {name.split("/")[0] for name in one} == {
        "clustering",
        "clustering_all",
        "coherence",
        "fidelity",
        "frechet",
        "likelihood",
        "probe",
    }
    assert two == pytest.approx(one, rel=1e-5, abs=1e-6)
    assert two_protocol == one_protocol
    assert done.stdout.count("likelihood/joint ") == 1, "one rank prints"


def test_an_evaluation_under_deepspeed_is_refused(tmp_path, experiment_file):
    (tmp_path / "run").mkdir()
    shutil.copy(experiment_file, tmp_path / "run/config.yaml")
    done = launch("zero2", ROOT / "launch/evaluate.py", tmp_path / "run")
    assert done.returncode != 0
    assert "configs/accelerate/ddp.yaml" in done.stderr


def test_a_refiner_trains_on_two_ranks_with_an_average_and_resumes(tmp_path, refiner_file):
    train = [ROOT / "launch/train.py", refiner_file, "train.batch_size=8"]
    cmvae, run = tmp_path / "cmvae/export/model.safetensors", tmp_path / "refiner"
    before = cmvae.read_bytes()
    stopped = launch("zero2", *train, "train.max_steps=3", "train.validate_every=2")
    assert stopped.returncode == 0, stopped.stderr
    first = load_file(run / "export/model.safetensors")
    done = launch("zero2", *train, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    exported = load_refiner(run)
    assert any(not torch.equal(tensor, first[name]) for name, tensor in exported.items())
    checkpoint = run / "checkpoints/step-00000006"
    average = load_file(checkpoint / "ema.safetensors")
    assert {f"refiner.{name}" for name in exported} == average.keys()
    assert all(torch.equal(tensor, average[f"refiner.{name}"]) for name, tensor in exported.items())
    assert json.loads((checkpoint / "state.json").read_text())["state"]["step"] == 6
    assert cmvae.read_bytes() == before


def test_a_refiner_trains_spread_over_two_ranks_without_an_average(tmp_path, refiner_file):
    train = [ROOT / "launch/train.py", refiner_file, "train.batch_size=8", "train.max_steps=2"]
    refused = launch("zero3", *train)
    assert refused.returncode != 0
    assert "error: train.ema_decay: under ZeRO-3 no rank has whole weights to average" in refused.stderr
    assert not (tmp_path / "refiner").exists()
    done = launch("zero3", *train, "train.ema_decay=null")
    assert done.returncode == 0, done.stderr
    assert load_refiner(tmp_path / "refiner")["denoisers.shared.unet.conv_in.weight"].numel() > 0
    assert not (tmp_path / "refiner/checkpoints/step-00000002/ema.safetensors").exists()


def load_refiner(run):
    """The weights of an export that is whole and finite."""
    exported = load_file(run / "export/model.safetensors")
    shapes = {
        name: tensor.shape for name, tensor in Refiner.from_pretrained(run / "export").state_dict().items()
    }
    assert {name: tensor.shape for name, tensor in exported.items()} == shapes
    return exported


def test_an_evaluation_of_a_refiner_on_two_ranks_gives_the_figures_of_one(
    tmp_path, make_cmvae_run, refiner_file, quadrants_shards
):
    shards = f"data.shards={quadrants_shards}"
    cmvae = make_cmvae_run(shards)
    settings = [shards, f"cmvae={cmvae}", "refiner.sharing=per_modality", "train.max_steps=1"]
    trained = run_command([sys.executable, ROOT / "launch/train.py", refiner_file, *settings], ROOT)
    assert trained.returncode == 0, trained.stderr
    evaluate = [ROOT / "launch/evaluate.py", tmp_path / "refiner", "num_generated=70"]
    folder, found = tmp_path / "refiner/evaluation", []
    for ranks in (1, 2):
        if ranks == 1:
            done = run_command([sys.executable, *evaluate], ROOT)
        else:
            done = launch("ddp", *evaluate, "batch_size=7")
        assert done.returncode == 0, done.stderr
        found.append([json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "protocol")])
        shutil.rmtree(folder)
    (one, one_protocol), (two, two_protocol) = found
    assert {name.split("/")[1] for name in one if name.startswith("refined/")} == {
        "coherence",
        "fidelity",
        "frechet",
    }
    # Convolutions of other batches round differently, and the solver carries that on.
    assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
    assert two_protocol == one_protocol
