"""`--launch`: what is started, what is refused, and how an error of a rank comes out."""

from __future__ import annotations

import argparse
import json
import os

import pytest
from commands import ROOT, run_cmvae, run_command

from cmvae.commands.launcher import Launch, add_launch_arguments, read_launch
from cmvae.utils.errors import UserError


@pytest.fixture
def read(monkeypatch):
    """`read("--launch", "ddp")` is what a command line asks for, in a process that no launcher started."""
    for name in ("LOCAL_RANK", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def parse(*arguments: str) -> Launch | None:
        parser = argparse.ArgumentParser()
        add_launch_arguments(parser)
        return read_launch(parser.parse_args(arguments))

    return parse


def test_without_launch_the_command_runs_here(read):
    assert read() is None
    assert "ACCELERATE_USE_CPU" not in os.environ


@pytest.mark.parametrize(("name", "use_cpu"), [("cpu", "true"), ("gpu", "false")])
def test_one_process_needs_no_launcher(read, name, use_cpu):
    assert read("--launch", name) is None
    assert os.environ["ACCELERATE_USE_CPU"] == use_cpu


def test_a_rank_does_not_launch_again(read, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert read("--launch", "ddp") is None


def test_the_launch_file_says_how_many_ranks_unless_a_flag_does(read):
    assert read("--launch", "ddp").world_size == 2
    assert read("--launch", "ddp", "--num-processes", "5").world_size == 5


def test_shipped_deepspeed_settings_are_found_from_anywhere(read, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (flag,) = (flag for flag in read("--launch", "zero3").flags if "deepspeed" in flag)
    with open(flag.partition("=")[2]) as file:
        assert json.load(file)["zero_optimization"]["stage"] == 3
    own = (ROOT / "configs/accelerate/zero3.yaml").read_text().replace("configs/deepspeed/zero3", "mine")
    (tmp_path / "own.yaml").write_text(own)
    assert "--deepspeed_config_file=mine.json" in read("--launch", "own.yaml").flags


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--num-processes", "2"], "--num-processes: only used with --launch NAME"),
        (["--launch", "cpu", "--num-processes", "2"], "--launch cpu starts one process"),
        (["--launch", "nonsense"], "nonsense: no such file, and no launch file has this name"),
        (["--launch", "list.yaml"], "distributed_type and num_processes missing"),
        (["--launch", "broken.yaml"], "cannot be read as YAML"),
    ],
)
def test_flags_that_do_not_fit_are_refused(read, monkeypatch, tmp_path, arguments, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.yaml").write_text("- 1")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(UserError, match=expected):
        read(*arguments)


def test_what_accelerate_refuses_is_told_in_a_line(experiment_file, tmp_path):
    (tmp_path / "odd.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 2\nnum_gpus: 2\n")
    done = run_cmvae("train", experiment_file, "--launch", "odd.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --launch odd.yaml: refused by accelerate: ")
    assert "num_gpus" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_error_of_the_ranks_is_the_last_thing_on_the_screen(experiment_file, tmp_path):
    """One that only the ranks can find: the number of samples that they have between them."""
    launch = ["--launch", "ddp", "--num-processes", "2"]
    done = run_cmvae("train", experiment_file, "train.batch_size=100", *launch, folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: train.batch_size: ")
    assert "Traceback" not in done.stderr


def test_accelerate_launch_of_one_process_prints_the_error_alone():
    flags = ["--config_file", "configs/accelerate/cpu.yaml"]
    done = run_command(
        ["accelerate", "launch", *flags, "launch/train.py", "configs/digits.yaml", "seed=x"], ROOT
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: configs/digits.yaml with seed=x: seed: 'x' does not fit")


def test_accelerate_launch_of_several_ranks_ends_with_the_error():
    """torchrun's report cannot be switched off; the error is the root cause that it names at its end."""
    flags = ["--config_file", "configs/accelerate/ddp.yaml", "--main_process_port", "0"]
    done = run_command(
        ["accelerate", "launch", *flags, "launch/train.py", "configs/digits.yaml", "seed=x"], ROOT
    )
    assert done.returncode == 1
    *_, error, border = done.stderr.splitlines()
    assert "configs/digits.yaml with seed=x: seed: 'x' does not fit" in error
    assert set(border) == {"="}
