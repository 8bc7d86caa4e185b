"""Counters of a run, the record of a checkpoint, and whether a run can resume from it; imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from cmvae.config import ExperimentConfig, flatten, is_resumable
from cmvae.training.checkpoint_folder import list_checkpoints
from cmvae.utils.errors import UserError

STATE_NAME = "state.json"

_BATCH_SIZE, _GLOBAL_BATCH_SIZE = "train.batch_size", "train.global_batch_size"
_LENGTH = ("train.epochs", "train.max_steps")


@dataclass
class TrainState:
    """Counters of one run. A batch is one forward pass of every rank, a step one optimizer update."""

    epoch: int = 0
    batch: int = 0
    """Batches of this epoch that every rank has consumed."""
    step: int = 0
    samples: int = 0
    """Samples consumed by all ranks together."""
    validated_step: int = 0
    """Step of the last validation between two updates."""
    best_step: int | None = None
    """Step of the validation with the lowest loss."""
    best_loss: float | None = None

    def record_validation(self, loss: float) -> None:
        """Record a validation at this step; it is the best so far if no earlier one had this loss or less."""
        self.validated_step = self.step
        if self.best_loss is None or not loss >= self.best_loss:
            self.best_step, self.best_loss = self.step, loss


@dataclass(frozen=True)
class CheckpointRecord:
    """`state.json` of a checkpoint."""

    state: TrainState
    world_size: int
    """Number of ranks that wrote it."""
    zero_stage: int
    """Stage of ZeRO; 0 if every rank has all weights and the whole optimizer."""
    frozen_hashes: dict[str, str]
    """Hashes of weights that are used but not trained, by name."""
    settings: dict[str, object]
    """The experiment, flattened."""

    def write(self, checkpoint: Path) -> None:
        """Write `state.json` into a checkpoint."""
        (checkpoint / STATE_NAME).write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, checkpoint: Path) -> CheckpointRecord:
        """Read the record of a checkpoint.

        Raises:
            UserError: it is missing or damaged.
        """
        path = checkpoint / STATE_NAME
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(**content | {"state": TrainState(**content["state"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: cannot be read: {error}. Delete this checkpoint") from error

    def check_resume(self, checkpoint: Path, config: ExperimentConfig, world_size: int) -> None:
        """Refuse settings, or a number of ranks, that cannot change within a run.

        Args:
            checkpoint: path of this record's checkpoint, for the message.
            config: the experiment that is to resume.
            world_size: its number of ranks.

        Raises:
            UserError: names the first such setting, or says how to launch.
        """
        now = flatten(config)
        same_batch = _global_batch(now, world_size) == _global_batch(self.settings, self.world_size)
        if world_size != self.world_size:
            self._check_world_size_change(checkpoint, world_size, same_batch)
        length_decides = _what_the_length_decides(now)
        for key in sorted(self.settings.keys() | now.keys()):
            before = self.settings.get(key)
            if before == now.get(key) or is_resumable(type(config), key):
                continue
            if key in (_BATCH_SIZE, _GLOBAL_BATCH_SIZE) and same_batch:
                continue
            reason = ""
            if key in _LENGTH:
                if length_decides is None:
                    continue
                reason = f"; {length_decides}"
            raise UserError(
                f"{checkpoint}: {key} was {before!r} and is now {now.get(key)!r}{reason}. Set it back to "
                "resume, or start a new run with output_dir=…"
            )

    def _check_world_size_change(self, checkpoint: Path, world_size: int, same_batch: bool) -> None:
        """Ranks of another number may resume if each has everything, and with the same global batch."""
        written = f"{checkpoint}: written by {self.world_size} rank(s)"
        if self.zero_stage:
            raise UserError(
                f"{written} under ZeRO-{self.zero_stage}, which shards the optimizer over them; this run has "
                f"{world_size}. Launch the same number: cmvae train CONFIG … --launch zero{self.zero_stage} "
                f"--num-processes {self.world_size} --resume"
            )
        global_batch = _global_batch(self.settings, self.world_size)
        if global_batch % world_size:
            raise UserError(
                f"{written} with a global batch of {global_batch} samples, which the {world_size} ranks of "
                f"this run cannot share evenly. Launch it with --num-processes {self.world_size} as before, "
                f"or another divisor of {global_batch}"
            )
        if not same_batch:
            raise UserError(
                f"{written} with a global batch of {global_batch} samples; this run has {world_size} rank(s) "
                f"with another one. Set {_GLOBAL_BATCH_SIZE}={global_batch} to keep it on any number of ranks"
            )


def _global_batch(settings: Mapping[str, object], world_size: int) -> int:
    """Samples of all ranks in one forward pass."""
    return int(str(settings[_GLOBAL_BATCH_SIZE] or world_size * int(str(settings[_BATCH_SIZE]))))


def _what_the_length_decides(settings: Mapping[str, object]) -> str | None:
    """Why a run with these settings cannot be made longer, or None."""
    schedule = settings["optimizer.schedule"]
    if schedule != "constant":
        return f"with optimizer.schedule: {schedule} the length determines every learning rate"
    if 0 < float(str(settings.get("objective.alignment.pretrain", 0))) < 1:
        return "with a fraction in objective.alignment.pretrain the length determines when decoders begin"
    return None


def check_newest(config: ExperimentConfig, world_size: int) -> None:
    """Refuse in the first second what a resume would refuse after its imports.

    A record that cannot be read is ignored: the checkpoint is damaged, and an earlier one is used.

    Raises:
        UserError: the run cannot resume with this number of ranks or these settings.
    """
    for checkpoint in reversed(list_checkpoints(config.run_dir / "checkpoints")):
        try:
            record = CheckpointRecord.read(checkpoint)
        except UserError:
            continue
        record.check_resume(checkpoint, config, world_size)
        return
