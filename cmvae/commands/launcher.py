"""Start a command on several ranks with accelerate's launcher: `--launch zero2 --num-processes 2`."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cmvae.commands.shipped import find_deepspeed_file, find_launch_file
from cmvae.utils.arguments import non_negative_integer, positive_integer
from cmvae.utils.errors import UserError
from cmvae.utils.process_exit import stopped_code

if TYPE_CHECKING:  # slow to import
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_FLAGS = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
"""Flags of the command that accelerate's launcher has under the same names."""


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--launch`, and how many ranks there are and where."""
    group = parser.add_argument_group(
        "several ranks",
        "Not needed for ranks that torchrun or `accelerate launch` started: they find each other.",
    )
    group.add_argument(
        "--launch",
        metavar="NAME",
        help="start ranks with accelerate: cpu, gpu, ddp, zero1, zero2, zero3, the same with _offload, "
        "multi_node, or a config file of accelerate",
    )
    group.add_argument("--num-processes", type=positive_integer, metavar="N", help="ranks on all machines")
    group.add_argument("--num-machines", type=positive_integer, metavar="N", help="of multi_node")
    group.add_argument("--machine-rank", type=non_negative_integer, metavar="R", help="of this machine")
    group.add_argument("--main-process-ip", metavar="HOST", help="address of machine 0")
    group.add_argument("--main-process-port", type=positive_integer, metavar="PORT", help="free on machine 0")


@dataclass(frozen=True)
class Launch:
    """Ranks to start."""

    name: str
    """What `--launch` says."""
    world_size: int
    flags: list[str]
    """For accelerate's launcher."""

    def run(self, command: str) -> int:
        """Start the ranks, each with the arguments in `sys.argv`, and wait for them.

        Args:
            command: a key of `COMMANDS`.

        Returns:
            The exit code: 0, that of the rank that failed first, or that of a signal.

        Raises:
            UserError: accelerate refuses the launch file, or the rank that failed first raised this error.
        """
        from accelerate.commands.launch import launch_command, launch_command_parser
        from torch.distributed.elastic.multiprocessing.api import SignalException
        from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

        arguments = [*self.flags, "--module", "cmvae.commands", command, *sys.argv[1:]]
        try:
            launch_command(launch_command_parser().parse_args(arguments))
        except ChildFailedError as error:
            return _explain(error)
        except SignalException as stopped:
            # The launcher has passed the signal on and waited for the ranks.
            return stopped_code(stopped.sigval)
        except (ValueError, ConnectionError) as error:
            raise UserError(f"--launch {self.name}: refused by accelerate: {error}") from error
        return 0


def read_launch(arguments: argparse.Namespace) -> Launch | None:
    """The ranks that `--launch` asks for; None if this process is to run the command itself.

    It is where there is no `--launch`, where a launcher has started it, and where the launch file asks for a
    single process.

    Raises:
        UserError: there is no such launch file, or it and the flags do not fit each other.
    """
    flags = {name: value for name in _FLAGS if (value := getattr(arguments, name)) is not None}
    if arguments.launch is None:
        for name in flags:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}: only used with --launch NAME. Add --launch ddp, or leave it out")
    if arguments.launch is None or "LOCAL_RANK" in os.environ:
        return None
    file = find_launch_file(arguments.launch)
    settings = _read(file)
    world_size = int(flags.get("num_processes", settings["num_processes"]))
    if settings["distributed_type"] == "NO":
        if world_size > 1:
            raise UserError(
                f"--num-processes {world_size}: --launch {arguments.launch} starts one process. Leave "
                "--num-processes out, or take --launch ddp"
            )
        # As accelerate's launcher tells its child; without a child, signals and exit codes pass unchanged.
        os.environ["ACCELERATE_USE_CPU"] = str(settings.get("use_cpu", False)).lower()
        return None
    flags["config_file"] = file
    if flags.get("num_machines", settings.get("num_machines", 1)) == 1:
        # Any port that is free: several trainings may share the machine.
        flags.setdefault("main_process_port", 0)
    deepspeed_file = (settings.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if deepspeed_file is not None:
        flags["deepspeed_config_file"] = find_deepspeed_file(deepspeed_file, file)
    return Launch(arguments.launch, world_size, [f"--{name}={value}" for name, value in flags.items()])


def _read(file: Path) -> dict[str, Any]:
    """The settings of a launch file; accelerate checks those that are not used here."""
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--launch {file}: cannot be read as YAML: {error}") from error
    missing = {"distributed_type", "num_processes"} - set(settings if isinstance(settings, dict) else ())
    if missing:
        raise UserError(
            f"--launch {file}: {' and '.join(sorted(missing))} missing. Write a file for accelerate with "
            "`accelerate config --config_file FILE`, or take a shipped one, such as --launch ddp"
        )
    return settings


def _explain(error: ChildFailedError) -> int:
    """Say why the ranks failed, below everything that they and the launcher printed; the exit code.

    Raises:
        UserError: that of the rank that failed first.
    """
    rank, failure = error.get_first_failure()
    if failure.exitcode == 2 and Path(failure.error_file).is_file():
        raise UserError(failure.message)
    if failure.exitcode in (os.EX_TEMPFAIL, 130):
        return failure.exitcode  # stopped by a signal, after a checkpoint
    what = failure.message if failure.exitcode < 0 else f"exit code {failure.exitcode}"
    print(f"error: rank {rank} failed first: {what}. The reason is in its output above", file=sys.stderr)
    return failure.exitcode if failure.exitcode > 0 else 1
