r"""Time how long a checkpoint stops a training.

    python tools/benchmarks/checkpoints.py configs/polymnist_cpu.yaml [--saves 5] [key=value …]

The training is built as `cmvae train` builds it, on one rank, and makes one update with a gradient of zero,
so that Adam has its states. Then it writes checkpoints in both ways in turns: waiting until each is complete,
as a run does at its end, and in the background, as it does in between. The table has the median and the range
of the wall time and of the CPU time of the process. The latter leaves out waiting for the disk and for other
processes on the machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from cmvae.config import load_config
from cmvae.data.index import ShardIndex
from cmvae.distributed import start_accelerator
from cmvae.training.checkpoint import Checkpointer
from cmvae.training.checkpoint_folder import list_checkpoints
from cmvae.training.optimization import build_optimizer
from cmvae.training.run import average_weights
from cmvae.training.tasks import build_task
from cmvae.utils.arguments import positive_integer
from cmvae.utils.process_exit import run_main
from cmvae.utils.tables import markdown_table


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Time how long a checkpoint stops a training.")
    parser.add_argument("config", metavar="configs/NAME.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument(
        "--saves", type=positive_integer, default=5, metavar="N", help="of each way (default: %(default)s)"
    )
    return parser.parse_intermixed_args()


def build_checkpointer(config_path: str, overrides: list[str]) -> Checkpointer:
    """The checkpointer of a training after one update."""
    config = load_config(config_path, overrides)
    accelerator = start_accelerator(config)
    task = build_task(config, ShardIndex.load(config.data.shards), accelerator.device, None)
    module, optimizer = accelerator.prepare(task, build_optimizer(task, config.optimizer))
    for parameter in task.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    average = average_weights(accelerator, module, config.train.ema_decay)
    return Checkpointer(accelerator, config, task, module, optimizer, average)


def measure(function: Callable[[], None]) -> tuple[float, float]:
    """Seconds of wall time and of CPU time of the process."""
    began, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - began, time.process_time() - cpu


def main() -> int:
    """Measure and print the table."""
    arguments = parse_arguments()
    ways: dict[str, list[tuple[float, float]]] = {"waiting": [], "in the background": []}
    with tempfile.TemporaryDirectory(prefix="checkpoints-") as folder:
        checkpointer = build_checkpointer(arguments.config, [*arguments.overrides, f"output_dir={folder}"])
        for _ in range(arguments.saves + 1):
            for way, save in zip(ways, (checkpointer.save, checkpointer.start_save), strict=True):
                checkpointer.state.step += 1
                ways[way].append(measure(save))
                checkpointer.wait()
        newest = list_checkpoints(Path(folder) / "checkpoints")[-1]
        size = sum(file.stat().st_size for file in newest.iterdir())
    rows = []
    for way, measured in ways.items():
        # The first ones allocate memory that later ones use again.
        columns = list(zip(*measured[1:], strict=True))
        rows.append([way, *(f"{median(c):.3f} ({min(c):.3f}–{max(c):.3f})" for c in columns)])
    print(markdown_table([f"{size / 1e6:.1f} MB", "seconds", "CPU seconds"], rows))
    return 0


if __name__ == "__main__":
    run_main(main)
