"""Trainings in processes of their own, each with a fault built in, forked from one that has all imports."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
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

# What is imported before a fork is there in every process at once.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["cmvae.training.run", "sklearn.metrics", "sklearn.cluster", "faulty_training"]
)

Fault = Callable[[], None]
"""Called in the process before the training: it replaces what is to fail."""


def die(*_: object) -> None:
    """What `kill -9` does, at this very place."""
    os.kill(os.getpid(), signal.SIGKILL)


def replace(owner: Any, name: str, replacement: Callable[..., object], at_call: int) -> None:
    """Have `owner.name` do what `replacement(original, *arguments)` does, in its call number `at_call`."""
    original, calls = getattr(owner, name), []

    def replaced(*arguments, **named):
        calls.append(name)
        if len(calls) == at_call:
            return replacement(original, *arguments, **named)
        return original(*arguments, **named)

    setattr(owner, name, replaced)


def die_before(module: str, name: str, at_call: int) -> None:
    """Kill the process instead of a call, number `at_call`, of `module` or `module:Class`."""
    path, _, owner = module.partition(":")
    target = importlib.import_module(path)
    replace(getattr(target, owner) if owner else target, name, die, at_call)


@dataclass(frozen=True)
class Training:
    """`configs/digits.yaml`, made tiny: a run in `folder`, its output and its samples beside it."""

    folder: Path
    shards: Path
    overrides: tuple[str, ...] = ()

    @property
    def settings(self) -> list[str]:
        """Everything that is other than in the YAML."""
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
        """Begin, or go on."""
        process = _processes.Process(target=_train, args=(self, fault, resume))
        process.start()
        return process

    def run(self, fault: Fault | None = None, resume: bool = False, timeout: float = 120) -> int:
        """Go to the end, of whatever kind; the exit code, negative for a signal."""
        process = self.start(fault, resume)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise TimeoutError(self.log)
        return process.exitcode

    @property
    def log(self) -> str:
        """What the last process said."""
        return self.folder.with_suffix(".log").read_text()

    @property
    def steps(self) -> list[int]:
        """Of the checkpoints that there are."""
        found = list_checkpoints(self.folder / "checkpoints")
        return [int(path.name.removeprefix("step-")) for path in found]

    def checkpoint(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"checkpoints/step-{step:08d}"

    @property
    def consumed_keys(self) -> list[list[str]]:
        """The keys of every batch that counts, in order: a batch that was lost with a kill was read again."""
        batches: dict[tuple[int, int], list[str]] = {}
        for line in self.folder.with_suffix(".keys").read_text().splitlines():
            epoch, number, keys = json.loads(line)
            earlier = batches.setdefault((epoch, number), keys)
            assert earlier == keys, "a batch that was read again has other samples"
        return [batches[place] for place in sorted(batches)]

    @property
    def final_state(self) -> dict[str, Any]:
        """What it ends with: weights, average, optimizer and counters."""
        last = self.checkpoint(self.steps[-1])
        state: dict[str, Any] = {"counters": json.loads((last / "state.json").read_text())["state"]}
        for path in last.iterdir():
            if path.suffix == ".safetensors":
                state[path.name] = load_file(path)
            elif path.suffix in (".bin", ".pt"):
                # Written by this test's own training, moments ago.
                state[path.name] = torch.load(path, weights_only=False)
        return state


def assert_same_end(found: Training, expected: Training) -> None:
    """Everything that two runs end with is equal, to the bit, and so are the samples that they took."""
    state = expected.final_state
    assert {"model.safetensors", "optimizer.bin"} <= state.keys()
    assert _difference(found.final_state, state) is None
    assert found.consumed_keys == expected.consumed_keys


def _difference(found: Any, expected: Any, place: str = "") -> str | None:
    """Where two nested states differ first, or None."""
    if isinstance(expected, torch.Tensor):
        return None if torch.equal(found, expected) else place
    if isinstance(expected, dict):
        if found.keys() != expected.keys():
            return place
        parts = [(found[key], expected[key], f"{place}/{key}") for key in expected]
        return next((where for where in (_difference(*part) for part in parts) if where is not None), None)
    # Everything else, once its arrays are lists, has an equality of its own.
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
    from cmvae.utils.process_exit import leave

    config = load_config(ROOT / "configs/digits.yaml", training.settings)
    try:
        stopped_by = run_training(config, ShardIndex.load(config.data.shards), resume=resume)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        leave(2)
    leave(128 + stopped_by if stopped_by else 0)


def _record_keys(path: Path) -> None:
    """Write down which samples each batch of this process has, as soon as it is handed out."""
    from cmvae.data.reader import TrainingLoader

    original = TrainingLoader.epoch_batches

    def recorded(loader, epoch, skip_batches=0):
        for number, batch in enumerate(original(loader, epoch, skip_batches), start=skip_batches):
            with path.open("a") as file:
                file.write(json.dumps([epoch, number, batch["key"]]) + "\n")
            yield batch

    TrainingLoader.epoch_batches = recorded
