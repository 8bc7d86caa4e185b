"""Ranks that die, hang or are told to leave, under the launcher, as the documented commands start them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT, run_command
from safetensors.torch import load_file
from torch import equal

FAULTS = Path(__file__).with_name("rank_faults.py")
TRAIN = ROOT / "launch/train.py"


def launch(*arguments, ranks=2, port=0, options=()):
    return [
        "accelerate",
        "launch",
        f"--config_file={ROOT}/configs/accelerate/ddp.yaml",
        f"--num_processes={ranks}",
        f"--main_process_port={port}",
        *options,
        *arguments,
    ]


def weights(run, step):
    return load_file(run / f"checkpoints/step-{step:08d}/model.safetensors")


def assert_equal_weights(first, second):
    assert first.keys() == second.keys()
    assert all(equal(tensor, second[name]) for name, tensor in first.items())


def wait_for(path, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.faults
def test_torchrun_restarts_ranks_that_go_on_by_themselves(tmp_path, experiment_file):
    """Rank 1 is killed in step 5; --max_restarts starts both again, without --resume."""
    settings = ["train.batch_size=8", "train.checkpoint_every=1"]
    whole = run_command(launch(TRAIN, experiment_file, *settings, f"output_dir={tmp_path / 'whole'}"), ROOT)
    assert whole.returncode == 0, whole.stderr
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        # With the store of the first start, restarted ranks look for those that are gone.
        port = chosen.getsockname()[1]
    restarting = {"port": port, "options": ["--max_restarts=1", "--rdzv_backend=c10d"]}
    command = launch(FAULTS, "die", TRAIN, experiment_file, *settings, **restarting)
    done = run_command(command, ROOT, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert_equal_weights(weights(tmp_path / "run", 6), weights(tmp_path / "whole", 6))


@pytest.mark.faults
def test_a_dead_rank_ends_the_run_and_resume_loses_nothing(tmp_path, experiment_file):
    settings = ["train.batch_size=8", "train.checkpoint_every=1"]
    began = time.monotonic()
    done = run_command(launch(FAULTS, "die", TRAIN, experiment_file, *settings), ROOT)
    assert done.returncode == 1
    assert time.monotonic() - began < 90
    done = run_command(launch(TRAIN, experiment_file, *settings, "--resume"), ROOT)
    assert done.returncode == 0, done.stderr


@pytest.mark.faults
@pytest.mark.parametrize(("fault", "state"), [("hang", "alive"), ("freeze", "silent for")])
def test_a_rank_that_stands_still_is_named(tmp_path, experiment_file, fault, state):
    """Rank 1 sleeps in its reader, or is stopped like a machine that went away."""
    settings = ["train.batch_size=8", "train.checkpoint_every=1", "train.hang_timeout=8"]
    done = run_command(launch(FAULTS, fault, TRAIN, experiment_file, *settings), ROOT, timeout=150)
    assert done.returncode == 1
    log = (tmp_path / "run/logs/rank-0.log").read_text()
    assert "no progress for 8 s (train.hang_timeout)" in log
    assert "Rank 1 (" in log
    assert f", {state}" in log
    assert ") is behind: it is " in log
    assert "Rank 0 (" not in log, "that it waits is no fault of its own"
    assert "This is rank 0, " in log


@pytest.mark.faults
@pytest.mark.parametrize(
    ("command", "code"),
    [(launch(TRAIN), 1), ([sys.executable, "-m", "cmvae.commands", "train", "--launch=ddp"], 75)],
    ids=["accelerate", "cmvae"],
)
def test_sigterm_to_the_launcher_saves(tmp_path, experiment_file, command, code):
    """What a scheduler does: torchrun hands the signal on, and its ranks have 30 s to leave."""
    settings = ["train.batch_size=8", "train.max_steps=100000", "train.checkpoint_every=20"]
    arguments = [*command, experiment_file, *settings]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        [str(part) for part in arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "run/checkpoints/step-00000020", process)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    stdout, _ = process.communicate(timeout=60)
    assert time.monotonic() - sent < 30
    assert process.returncode == code
    assert "SIGTERM: saved at step" in stdout
    newest = sorted((tmp_path / "run/checkpoints").iterdir())[-1]
    reached = json.loads((newest / "state.json").read_text())["state"]["step"]
    assert f"saved at step {reached}." in stdout
    assert not (tmp_path / "run/export").exists()


def test_another_number_of_ranks_or_setting_is_refused_before_torch_is_imported(tmp_path, experiment_file):
    trained = run_command([sys.executable, TRAIN, experiment_file, "train.max_steps=3"], ROOT)
    assert trained.returncode == 0, trained.stderr
    resume = [sys.executable, "-X", "importtime", TRAIN, experiment_file, "--resume"]
    for arguments, environment, expected in (
        (
            [],
            {"WORLD_SIZE": "4"},
            "written by 1 rank(s) with a global batch of 16 samples; this run has 4 rank(s) with another "
            "one. Set train.global_batch_size=16",
        ),
        (["train.batch_size=8"], {}, "train.batch_size was 16 and is now 8. Set it back"),
    ):
        done = run_command([*resume, *arguments], ROOT, **environment)
        assert done.returncode == 2
        assert expected in done.stderr
        assert "|   torch\n" not in done.stderr
        assert not [line for line in done.stderr.splitlines() if line.endswith(" torch")]


@pytest.mark.faults
def test_a_restarted_worker_resumes_and_does_not_overwrite(tmp_path, experiment_file):
    train = [sys.executable, TRAIN, experiment_file]
    assert run_command([*train, "train.max_steps=3"], ROOT).returncode == 0
    again = run_command([*train, "--overwrite"], ROOT, TORCHELASTIC_RESTART_COUNT="1")
    assert again.returncode == 0, again.stderr
    assert "resumed from" in again.stdout
