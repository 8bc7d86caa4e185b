"""Any number of ranks gives the same run, also one that changes on the way."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import ROOT, run_command
from safetensors.torch import load_file

from cmvae.utils.seeds import derive_seed

LOGGED = Path(__file__).with_name("world_size_log.py")
TRAIN = ROOT / "launch/train.py"
GLOBAL_BATCH = 16
"""Ten of these make an epoch."""
SETTINGS = [
    f"train.global_batch_size={GLOBAL_BATCH}",
    "train.checkpoint_every=1",
    "train.ema_decay=0.9",
    "train.log_every=1",
]


def train(folder, experiment_file, way, ranks, steps):
    """A training of `ranks` ranks up to a step, which must end well."""
    launch = ["accelerate", "launch", f"--config_file={ROOT}/configs/accelerate/{way}.yaml"]
    command = (
        [sys.executable] if way is None else [*launch, f"--num_processes={ranks}", "--main_process_port=0"]
    )
    settings = [*SETTINGS, f"output_dir={folder / 'run'}", f"train.max_steps={steps}"]
    if way == "zero3":
        settings.append("train.ema_decay=null")
    folder.mkdir(exist_ok=True)
    done = run_command(
        [*command, LOGGED, folder / "log", TRAIN, experiment_file, *settings, "--resume"], ROOT
    )
    assert done.returncode == 0, done.stderr


def read_steps(folder, pattern="log-*"):
    """By (epoch, batch), in order: keys, what their noise is a function of, and the loss, over all ranks."""
    found = {}
    for log in sorted(folder.glob(pattern)):
        for line in log.read_text().splitlines():
            epoch, batch, keys, seed, places, loss = json.loads(line)
            step = found.setdefault((epoch, batch), ([], [], []))
            step[0].extend(keys)
            step[1].extend((seed, place) for place in places)
            step[2].append(loss)
    return [
        (number, keys, streams, sum(losses) / len(losses))
        for number, (keys, streams, losses) in sorted(found.items())
    ]


def assert_same_steps(found, expected):
    for (number, keys, streams, loss), other in zip(found, expected, strict=True):
        assert (number, keys, streams) == other[:3]
        assert loss == pytest.approx(other[3], rel=1e-4)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of a run of one process, made by the first test that needs it."""
    return tmp_path_factory.mktemp("alone")


@pytest.fixture
def one_rank(alone, experiment_file):
    """Twelve steps of one process, over the end of an epoch."""
    if not (alone / "run").exists():
        train(alone, experiment_file, None, 1, 12)
    steps = read_steps(alone)
    assert [number for number, *_ in steps] == [(0, n) for n in range(1, 11)] + [(1, 1), (1, 2)]
    assert len({key for (epoch, _), keys, *_ in steps for key in keys if epoch == 0}) == 160
    for step, (_, _, streams, _) in enumerate(steps):
        assert streams == [(derive_seed(0, "step", step), place) for place in range(GLOBAL_BATCH)]
    # The losses fall, so that equal losses mean equal updates.
    assert steps[-1][3] < 0.97 * steps[0][3]
    return steps


@pytest.mark.parametrize(
    "parts",
    [
        [("ddp", 2, 4), (None, 1, 12)],
        pytest.param([("ddp", 4, 4), ("ddp", 2, 7), (None, 1, 12)], marks=pytest.mark.faults),
        pytest.param([(None, 1, 4), ("ddp", 4, 12)], marks=pytest.mark.faults),
        pytest.param([("zero2", 2, 12)], marks=pytest.mark.faults),
        pytest.param([("zero2", 4, 12)], marks=pytest.mark.faults),
        pytest.param([("zero3", 2, 12)], marks=pytest.mark.faults),
        pytest.param([("zero3", 4, 12)], marks=pytest.mark.faults),
    ],
    ids=lambda parts: "-".join(f"{way or 'alone'}{ranks}" for way, ranks, _ in parts),
)
def test_a_run_of_other_ranks_is_that_of_one(tmp_path, experiment_file, alone, one_rank, parts):
    for way, ranks, steps in parts:
        train(tmp_path, experiment_file, way, ranks, steps)
    assert_same_steps(read_steps(tmp_path), one_rank)
    if parts[-1][0] in (None, "ddp"):
        first = end_of_training(alone, 11)
        for expected, begun, reached in zip(
            end_of_training(alone, 12), first, end_of_training(tmp_path, 12), strict=True
        ):
            # Sums over other parts of a batch round differently.
            assert (reached - expected).norm() < 0.02 * (expected - begun).norm()


@pytest.mark.faults
def test_a_lost_machine_is_done_without(tmp_path, experiment_file, one_rank):
    """Two agents of torchrun with a rank each; one is killed with its rank, and is not replaced."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    settings = [*SETTINGS, f"output_dir={tmp_path / 'run'}", "train.max_steps=12", "--resume"]

    def start(is_host, **environment):
        # The time that the first agent waits for the second, and that one waits for a replacement.
        conf = f"is_host={is_host},last_call_timeout=20"
        agent = [
            "torchrun",
            "--nnodes=1:2",
            "--nproc-per-node=1",
            "--max-restarts=3",
            "--local-addr=127.0.0.1",
        ]
        rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-conf={conf}"]
        return subprocess.Popen(
            [*map(str, [*agent, *rendezvous, LOGGED, tmp_path / "log", TRAIN, experiment_file, *settings])],
            cwd=ROOT,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "ACCELERATE_USE_CPU": "true",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            stderr=subprocess.PIPE,
            text=True,
        )

    staying, leaving = start(1), start(0, DIES_IN="5")
    try:
        _, errors = staying.communicate(timeout=240)
        assert leaving.wait(timeout=10) == -signal.SIGKILL
    finally:
        for agent in (staying, leaving):
            agent.kill()
    assert staying.returncode == 0, errors
    together, alone_again = read_steps(tmp_path, "log-2-*"), read_steps(tmp_path, "log-1-*")
    # The rank that stays may have begun the step in which the other one dies.
    assert_same_steps(together[:5], one_rank[:5])
    assert_same_steps(alone_again, one_rank[5:])


def end_of_training(folder, step):
    """All weights, all of their averages, and all of Adam's states, as one vector each."""
    checkpoint = folder / f"run/checkpoints/step-{step:08d}"
    weights = load_file(checkpoint / "model.safetensors")
    average = load_file(checkpoint / "ema.safetensors")
    optimizer = torch.load(checkpoint / "optimizer.bin", weights_only=True)["state"]
    vectors = [
        [weights[name] for name in sorted(weights, key=lambda name: name.removeprefix("module."))],
        [average[name] for name in sorted(average)],
        *([optimizer[n][key] for n in sorted(optimizer)] for key in ("exp_avg", "exp_avg_sq")),
    ]
    return [torch.cat([tensor.flatten().double() for tensor in vector]) for vector in vectors]


def test_what_cannot_be_handed_over_is_refused_in_the_first_second(tmp_path, experiment_file):
    """The records are those of checkpoints; nothing but `state.json` is read."""
    train(tmp_path, experiment_file, None, 1, 2)
    record = tmp_path / "run/checkpoints/step-00000002/state.json"
    written = json.loads(record.read_text())
    command = [sys.executable, TRAIN, experiment_file, "--resume", f"output_dir={tmp_path / 'run'}"]

    def refusal(changed, ranks, *batch):
        record.write_text(json.dumps(written | changed))
        done = run_command([*command, *SETTINGS[1:], *batch], ROOT, WORLD_SIZE=str(ranks))
        assert done.returncode == 2
        return done.stderr

    assert "Set train.global_batch_size=16 to keep it" in refusal({}, 2, "train.batch_size=16")
    assert "which the 3 ranks of this run cannot share evenly" in refusal({}, 3, SETTINGS[0])
    told = refusal({"zero_stage": 2, "world_size": 2}, 4, SETTINGS[0])
    assert "written by 2 rank(s) under ZeRO-2" in told
    assert "cmvae train CONFIG … --launch zero2 --num-processes 2 --resume" in told
