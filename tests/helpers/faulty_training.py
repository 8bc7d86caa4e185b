"""Trainings with injected faults, in processes forked from one that has imported everything."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from commands import ROOT
from safetensors.torch import load_file

from cmvae.config import load_config
from cmvae.data.index import ShardIndex
from cmvae.training.checkpoint_folder import list_checkpoints

# Modules imported before the fork need not be imported in every process.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["cmvae.training.run", "sklearn.metrics", "sklearn.cluster", "faulty_training"]
)

Fault = Callable[[], None]
"""Called in the process before the training: replaces the function that fails."""


def die(*_: object) -> None:
    """Kill this process, as `kill -9` does."""
    os.kill(os.getpid(), signal.SIGKILL)


def replace(owner: Any, name: str, replacement: Callable[..., object], at_call: int) -> None:
    """Replace call number `at_call` of `owner.name` by `replacement(original, *arguments)`."""
    original, calls = getattr(owner, name), []

    def replaced(*arguments, **named):
        calls.append(name)
        if len(calls) == at_call:
            return replacement(original, *arguments, **named)
        return original(*arguments, **named)

    setattr(owner, name, replaced)


def die_before(module: str, name: str, at_call: int, num_saves: int = 0) -> None:
    """Kill the process instead of call number `at_call` of `name` in `module` or `module:Class`.

    A training continues while a checkpoint is written: with `num_saves`, wait until so many are complete.
    """
    path, _, owner = module.partition(":")
    target = importlib.import_module(path)
    owned = getattr(target, owner) if owner else target
    complete = signal_save(num_saves) if num_saves else None

    def wait_and_die(*_: object) -> None:
        if complete is not None:
            complete.wait()
        die()

    replace(owned, name, wait_and_die, at_call)


def signal_save(num_saves: int) -> threading.Event:
    """Set the returned event as soon as so many checkpoints are complete."""
    from cmvae.training import checkpoint

    complete = threading.Event()

    def note(original, *arguments):
        original(*arguments)
        complete.set()

    replace(checkpoint, "thin_out", note, num_saves)
    return complete


@dataclass(frozen=True)
class Training:
    """A tiny version of `configs/digits.yaml`: a run in `folder`, its output and sample keys beside it."""

    folder: Path
    shards: Path
    overrides: tuple[str, ...] = ()

    @property
    def settings(self) -> list[str]:
        """Overrides of the YAML file."""
        return [
            f"output_dir={self.folder}",
            f"data.shards={self.shards}",
            "model.shared_dim=4",
            "model.private_dim=4",
            "model.num_clusters=6",
            *(f"model.modalities.m{n}.width=2" for n in range(3)),
            "optimizer.schedule=constant",
            "train.batch_size=16",
            "train.mixed_precision=fp32",
            "train.log_every=2",
            "train.validate_every=null",
            "evaluation.batch_size=32",
            "tracking.enabled=false",
            *self.overrides,
        ]

    def start(self, fault: Fault | None = None, resume: bool = False) -> BaseProcess:
        """Start the training in a process, or resume it."""
        process = _processes.Process(target=_train, args=(self, fault, resume))
        process.start()
        return process

    def run(self, fault: Fault | None = None, resume: bool = False, timeout: float = 120) -> int:
        """Run until the process ends and return its exit code, −N after signal N."""
        process = self.start(fault, resume)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(self.log)
        return process.exitcode

    @property
    def log(self) -> str:
        """Output of the last process."""
        return self.folder.with_suffix(".log").read_text()

    @property
    def steps(self) -> list[int]:
        """Steps of the existing checkpoints."""
        found = list_checkpoints(self.folder / "checkpoints")
        return [int(path.name.removeprefix("step-")) for path in found]

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint of a step."""
        return self.folder / f"checkpoints/step-{step:08d}"

    @property
    def consumed_keys(self) -> list[list[str]]:
        """Sample keys of every batch, in order. Batches that were read again after a kill must be equal."""
        batches: dict[tuple[int, int], list[str]] = {}
        for line in self.folder.with_suffix(".keys").read_text().splitlines():
            epoch, number, keys = json.loads(line)
            earlier = batches.setdefault((epoch, number), keys)
            assert earlier == keys, "a batch has other samples when it is read again"
        return [batches[place] for place in sorted(batches)]

    @property
    def final_state(self) -> dict[str, Any]:
        """Content of the last checkpoint: weights, average, optimizer and counters."""
        last = self.checkpoint(self.steps[-1])
        state: dict[str, Any] = {"counters": json.loads((last / "state.json").read_text())["state"]}
        for path in last.iterdir():
            if path.suffix == ".safetensors":
                state[path.name] = load_file(path)
            elif path.suffix in (".bin", ".pt"):
                # Safe to unpickle: written by this test.
                state[path.name] = torch.load(path, weights_only=False)
        return state


def assert_same_end(found: Training, expected: Training) -> None:
    """Check that two runs end with bit-identical states and have read the same samples."""
    state = expected.final_state
    assert {"model.safetensors", "optimizer.bin"} <= state.keys()
    assert _difference(found.final_state, state) is None
    assert found.consumed_keys == expected.consumed_keys


def _difference(found: Any, expected: Any, place: str = "") -> str | None:
    """Path of the first difference between two nested states, or None."""
    if isinstance(expected, torch.Tensor):
        return None if torch.equal(found, expected) else place
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            return place
        parts = [(found[key], expected[key], f"{place}/{key}") for key in expected]
        return next((where for where in (_difference(*part) for part in parts) if where is not None), None)
    return None if repr(found) == repr(expected) else place


def _train(training: Training, fault: Fault | None, resume: bool) -> None:
    descriptor = os.open(training.folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    _record_keys(training.folder.with_suffix(".keys"))
    if fault is not None:
        fault()
    from cmvae.training.run import run_training
    from cmvae.utils.errors import UserError
    from cmvae.utils.process_exit import exit_process

    config = load_config(ROOT / "configs/digits.yaml", training.settings)
    try:
        stopped_by = run_training(config, ShardIndex.load(config.data.shards), resume=resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        exit_process(2)
    exit_process(128 + stopped_by if stopped_by else 0)


def _record_keys(path: Path) -> None:
    """Write the sample keys of each batch to `path` as soon as the loader yields it."""
    from cmvae.data.reader import TrainingLoader

    original = TrainingLoader.epoch_batches

    def recorded(loader, epoch, skip_batches=0):
        for number, batch in enumerate(original(loader, epoch, skip_batches), start=skip_batches):
            with path.open("a") as file:
                file.write(json.dumps([epoch, number, batch["key"]]) + "\n")
            yield batch

    TrainingLoader.epoch_batches = recorded
