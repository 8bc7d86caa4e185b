r"""Kill a short training again and again, at random moments, and see whether it ends as if nothing was.

    python tools/benchmarks/soak.py configs/digits.yaml --kills 200 [key=value …]

Every training is a process of its own that gets SIGKILL after a random time and is resumed, as often as it
takes to reach its end; then the next one begins. Of each end the weights, the optimizer's state, the random
streams and the average of the weights, if there is one, are compared with those of an undisturbed training,
byte by byte. Give settings that make the training take a few seconds and write many checkpoints. Exit codes:
0 no difference, 1 a difference, 2 something that you can mend, or a training that ended with an error.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

from cmvae.config import load_config
from cmvae.data.index import ShardIndex
from cmvae.training.checkpoint_folder import MANIFEST_NAME, list_checkpoints
from cmvae.training.state import STATE_NAME
from cmvae.utils.errors import UserError
from cmvae.utils.process_exit import run_main
from cmvae.utils.progress import progress_bar


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Kill trainings at random moments and compare how they end.")
    parser.add_argument("config", help="the experiment, a YAML file in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--kills", type=int, default=200, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    return parser.parse_intermixed_args()


class Soak:
    """A training that is started over and over, in processes forked from one that has everything imported."""

    def __init__(self, config: str, overrides: list[str], folder: Path) -> None:
        self.config, self.overrides, self.folder = config, overrides, folder
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["cmvae.training.run"])

    def start(self, name: str) -> BaseProcess:
        """Begin the training `name`, or go on with it."""
        settings = [*self.overrides, f"output_dir={self.folder / name}", "tracking.enabled=false"]
        process = self._processes.Process(target=_train, args=(self.config, settings, self.folder / "log"))
        process.start()
        return process

    def finish(self, name: str) -> None:
        """Let a training go to its end.

        Raises:
            UserError: it does not get there by itself.
        """
        process = self.start(name)
        process.join()
        self.check(process)

    def check(self, process: BaseProcess) -> None:
        """Raise if a training ended with an error of its own.

        Raises:
            UserError: with what it said last.
        """
        if process.exitcode != 0:
            last = (self.folder / "log").read_text(encoding="utf-8", errors="replace")[-3000:]
            raise UserError(f"a training ended with exit code {process.exitcode}: {last}")

    def outcome(self, name: str) -> dict[str, str]:
        """Checksums of a last checkpoint, but for its settings, in which the folder stands."""
        manifest = list_checkpoints(self.folder / name / "checkpoints")[-1] / MANIFEST_NAME
        sums: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8"))
        return {file: checksum for file, checksum in sums.items() if file != STATE_NAME}

    def differences(self, name: str, other: str) -> list[str]:
        """Files of the last checkpoint of `other` that `name` has not, or has otherwise."""
        found = self.outcome(name)
        return [
            f"{name}: {file}" for file, checksum in self.outcome(other).items() if found.get(file) != checksum
        ]


def _train(config_file: str, settings: list[str], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    # Imported where it is needed: this process's parent must not wait for torch.
    from cmvae.training.run import run_training

    config = load_config(config_file, settings)
    run_training(config, ShardIndex.load(config.data.shards), resume=True)


def soak(trial: Soak, kills: int, moments: random.Random) -> tuple[int, list[str]]:
    """Kill trainings `kills` times.

    Returns:
        How many trainings ended meanwhile, and the files that were other than the undisturbed training's.

    Raises:
        UserError: a training ended with an error of its own.
    """
    trial.finish("warm-up")
    began = time.monotonic()
    trial.finish("undisturbed")
    seconds = time.monotonic() - began
    print(f"undisturbed: {seconds:.1f} s; compared: {', '.join(sorted(trial.outcome('undisturbed')))}")

    differences: list[str] = []
    ended = killed = 0
    with progress_bar(total=kills, desc="kills") as progress:
        while killed < kills:
            name = f"killed-{ended}"
            process = trial.start(name)
            process.join(moments.uniform(0, seconds))
            process.kill()
            process.join()
            if process.exitcode == -signal.SIGKILL:
                killed += 1
                progress.update()
                continue
            trial.check(process)
            differences += trial.differences(name, "undisturbed")
            ended += 1
    # The last one was killed, too, and has to show how it ends.
    name = f"killed-{ended}"
    trial.finish(name)
    return ended + 1, differences + trial.differences(name, "undisturbed")


def main() -> int:
    """Soak and report."""
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        trial = Soak(arguments.config, arguments.overrides, Path(folder))
        trainings, differences = soak(trial, arguments.kills, random.Random(arguments.seed))
    print(f"{arguments.kills} kills of {trainings} trainings, {len(differences)} differences")
    for difference in differences:
        print(f"differs: {difference}", file=sys.stderr)
    return 1 if differences else 0


if __name__ == "__main__":
    run_main(main)
