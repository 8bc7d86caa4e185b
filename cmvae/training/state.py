"""Counters of a run, the record of a checkpoint, and whether a run can resume from it; imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cmvae.config import ExperimentConfig, flatten
from cmvae.data.plan import WorldSizeChange
from cmvae.training.checkpoint_folder import list_checkpoints
from cmvae.utils.errors import UserError

STATE_NAME = "state.json"

# What a run may change when it goes on: what it reports, how long it trains, and what it
# makes of damaged data. A CMVAE may move: whether it
# is the same is told by its hash.
CHANGEABLE = re.compile(
    r"name|output_dir|cmvae|refiner\.sampler\..*|tracking\..*|evaluation\..*"
    r"|data\.(shards|num_workers|cache_megabytes|on_error|max_skipped)"
    r"|train\.(compile|log_every|validate_every|checkpoint_every|keep_checkpoints|hang_timeout)"
)
_BATCH_SIZE = "train.batch_size"
_LENGTH = re.compile(r"train\.(epochs|max_steps)")


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
    """Step of the last validation between updates."""
    best_step: int | None = None
    """Step of the validation with the lowest loss."""
    best_loss: float | None = None
    world_size_changes: list[WorldSizeChange] = field(default_factory=list)
    """Where the number of ranks changed, in the order of time."""

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TrainState:
        """The inverse of `dataclasses.asdict`.

        Raises:
            TypeError: a counter is not one of these.
        """
        # A checkpoint from before there were world_size_changes has none.
        world_size_changes = [
            WorldSizeChange(**handover) for handover in content.get("world_size_changes", [])
        ]
        return cls(**{**content, "world_size_changes": world_size_changes})


@dataclass(frozen=True)
class CheckpointRecord:
    """`state.json` of a checkpoint."""

    state: TrainState
    world_size: int
    """Ranks that wrote it."""
    zero_stage: int
    """ZeRO's stage; 0 where every rank has all weights and the whole optimizer."""
    frozen_hashes: dict[str, str]
    """Hashes of what is not trained but must be the same, by name."""
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
            return cls(**content | {"state": TrainState.from_json(content["state"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path}: cannot be read: {error}. Delete this checkpoint") from error

    def check_resume(self, checkpoint: Path, now: Mapping[str, object], world_size: int) -> None:
        """Refuse to go on with settings, or a number of ranks, that cannot change within a run.

        Args:
            checkpoint: where the record is from, for the message.
            now: the experiment that wants to go on, flattened.
            world_size: ranks that want to go on.

        Raises:
            UserError: names the first such setting, or says how to launch.
        """
        if world_size != self.world_size:
            self._check_handover(checkpoint, now, world_size)
        length_decides = _what_the_length_decides(now)
        for key in sorted(self.settings.keys() | now.keys()):
            before = self.settings.get(key)
            if before == now.get(key) or CHANGEABLE.fullmatch(key):
                continue
            if key == _BATCH_SIZE and world_size != self.world_size:
                continue
            reason = ""
            if _LENGTH.fullmatch(key):
                if length_decides is None:
                    continue
                reason = f"; {length_decides}"
            raise UserError(
                f"{checkpoint}: {key} was {before!r} and is now {now.get(key)!r}{reason}. Set it back to go "
                "on, or start a new run with output_dir=…"
            )

    def _check_handover(self, checkpoint: Path, now: Mapping[str, object], world_size: int) -> None:
        """Another number of ranks may go on where each has everything, and with the same global batch."""
        wrote = f"{checkpoint}: written by {self.world_size} rank(s)"
        if self.zero_stage:
            raise UserError(
                f"{wrote} under ZeRO-{self.zero_stage}, which shared the optimizer among them; this run has "
                f"{world_size}. Go on with as many: accelerate launch --config_file "
                f"configs/accelerate/zero{self.zero_stage}.yaml --num_processes {self.world_size} "
                "launch/train.py CONFIG … --resume"
            )
        global_batch = self.world_size * int(str(self.settings[_BATCH_SIZE]))
        if world_size * int(str(now[_BATCH_SIZE])) == global_batch:
            return
        if global_batch % world_size:
            raise UserError(
                f"{wrote} with {global_batch} samples a batch between them, which this run's {world_size} "
                f"cannot share evenly. Launch it with --num_processes {self.world_size} as before, or "
                f"another divisor of {global_batch}"
            )
        raise UserError(
            f"{wrote} with {global_batch} samples a batch between them; this run has {world_size} rank(s). "
            f"Give {_BATCH_SIZE}={global_batch // world_size} to go on with the same global batch, or launch "
            f"it with --num_processes {self.world_size} as before"
        )


def _what_the_length_decides(settings: Mapping[str, object]) -> str | None:
    """Why a run with these settings cannot go on for longer; None if it can."""
    schedule = settings["optimizer.schedule"]
    if schedule != "constant":
        return f"with optimizer.schedule: {schedule} the length decides every learning rate"
    if 0 < float(str(settings.get("objective.alignment.pretrain", 0))) < 1:
        return "with a share in objective.alignment.pretrain the length decides when decoders begin"
    return None


def check_newest(config: ExperimentConfig, world_size: int) -> None:
    """Refuse in the first second what a resume would refuse after its imports.

    A record that cannot be read is passed over: the checkpoint is damaged, and the one before it counts.

    Raises:
        UserError: the run cannot go on with this number of ranks, or with these settings.
    """
    for checkpoint in reversed(list_checkpoints(config.run_dir / "checkpoints")):
        try:
            record = CheckpointRecord.read(checkpoint)
        except UserError:
            continue
        record.check_resume(checkpoint, flatten(config), world_size)
        return
