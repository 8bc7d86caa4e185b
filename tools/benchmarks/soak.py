r"""Kill a short training repeatedly at random moments, and check that it ends like an undisturbed one.

    python tools/benchmarks/soak.py configs/digits.yaml --kills 200 [key=value …]

Every training runs in its own process, which gets SIGKILL after a random time and is resumed until it ends;
then the next one starts. The last checkpoint of each (weights, optimizer state and, if enabled, the average
of the weights) is compared with that of an undisturbed training, to the last bit. Choose settings that make
the training take a few seconds and write many checkpoints. Exit codes: 0 no difference, 1 a difference, 2 a
wrong argument or a training that ended with an error.
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
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Kill trainings at random moments and compare how they end.")
    parser.add_argument("config", help="YAML file of the experiment")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    parser.add_argument("--kills", type=int, default=200, help="number of kills (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default: %(default)s)")
    return parser.parse_intermixed_args()


class Soak:
    """Starts trainings in processes forked from a server that has imported everything."""

    def __init__(self, config: str, overrides: list[str], folder: Path) -> None:
        self.config, self.overrides, self.folder = config, overrides, folder
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["cmvae.training.run"])

    def start(self, name: str) -> BaseProcess:
        """Start or resume the training `name`."""
        settings = [*self.overrides, f"output_dir={self.folder / name}", "tracking.enabled=false"]
        process = self._processes.Process(target=_train, args=(self.config, settings, self.folder / "log"))
        process.start()
        return process

    def finish(self, name: str) -> None:
        """Run a training to its end.

        Raises:
            UserError: it ended with an error.
        """
        process = self.start(name)
        process.join()
        self.check(process)

    def check(self, process: BaseProcess) -> None:
        """Check the exit code of a training.

        Raises:
            UserError: the training ended with an error; holds the end of its output.
        """
        if process.exitcode != 0:
            output = (self.folder / "log").read_text(encoding="utf-8", errors="replace")[-3000:]
            raise UserError(f"a training ended with exit code {process.exitcode}: {output}")

    def outcome(self, name: str) -> dict[str, str]:
        """File → checksum of the last checkpoint, without the settings, which contain the folder."""
        manifest = self._last_checkpoint(name) / MANIFEST_NAME
        sums: dict[str, str] = json.loads(manifest.read_text(encoding="utf-8"))
        return {file: checksum for file, checksum in sums.items() if file != STATE_NAME}

    def differences(self, name: str, other: str) -> list[str]:
        """Files of the last checkpoint of `other` that differ in `name` or are missing there."""
        found = self.outcome(name)
        different = [file for file, checksum in self.outcome(other).items() if found.get(file) != checksum]
        folders = self._last_checkpoint(name), self._last_checkpoint(other)
        return [f"{name}: {file}" for file in different if not _hold_the_same(*(f / file for f in folders))]

    def _last_checkpoint(self, name: str) -> Path:
        return list_checkpoints(self.folder / name / "checkpoints")[-1]


def _hold_the_same(path: Path, other: Path) -> bool:
    """Whether two pickled states are equal to the last bit.

    Their bytes differ after a resume before all parameters have a state: equal keys are then two objects.
    """
    import torch

    if path.suffix != ".bin" or not path.exists():
        return False
    states = [torch.load(file, weights_only=True) for file in (path, other)]
    try:
        torch.testing.assert_close(*states, rtol=0, atol=0)
    except AssertionError:
        return False
    return True


def _train(config_file: str, settings: list[str], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    # Imported here, so that the parent process does not wait for torch.
    from cmvae.training.run import run_training

    config = load_config(config_file, settings)
    run_training(config, ShardIndex.load(config.data.shards), resume=True)


def soak(trial: Soak, kills: int, moments: random.Random) -> tuple[int, list[str]]:
    """Kill trainings `kills` times.

    Returns:
        The number of trainings that ended, and the files that differ from the undisturbed training.

    Raises:
        UserError: a training ended with an error.
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
    # The last training was killed; run it to its end.
    name = f"killed-{ended}"
    trial.finish(name)
    return ended + 1, differences + trial.differences(name, "undisturbed")


def main() -> int:
    """Run and report."""
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
