"""What all ranks learn about a step together: finite terms, a request to stop, what was saved meanwhile."""

from __future__ import annotations

import signal
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType

import torch
from accelerate import Accelerator
from torch import Tensor

from cmvae.utils.errors import UserError


class NonFiniteError(UserError):
    """A term of the loss or the gradient is not finite on some rank; raised on all ranks alike."""

    def __init__(self, names: str) -> None:
        super().__init__(
            f"not finite: {names}. All ranks stopped, and no checkpoint was written since. Look at the "
            "curves of these terms; a lower optimizer.learning_rate, an optimizer.max_grad_norm or "
            "train.mixed_precision=fp32 may help. Continue from the last checkpoint with --resume"
        )


class StopRequest:
    """Whether the process was asked to stop: signal handlers set it, the loop reads it in every step."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @classmethod
    @contextmanager
    def listening(cls) -> Iterator[StopRequest]:
        """Catch SIGTERM and SIGINT once; a second one has its usual effect.

        Only the main thread of a process can catch signals; in another one nothing is caught.
        """
        request = cls()
        if threading.current_thread() is not threading.main_thread():
            yield request
            return
        usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def restore() -> None:
            for number, handler in usual.items():
                signal.signal(number, handler)

        def note(number: int, frame: FrameType | None) -> None:
            request.signal = signal.Signals(number)
            restore()

        for number in usual:
            signal.signal(number, note)
        try:
            yield request
        finally:
            restore()


class StepCheck:
    """The result of one check on all ranks; only reading it waits for a GPU.

    Args:
        names: of the values that must be finite.
        flags: (number of names + 2,), the same on all ranks: nonzero where a value is not finite, then the
            number of the signal that some rank received, or zero, then minus the smallest
            `Checkpointer.num_finished` of all ranks, or zero.
    """

    def __init__(self, names: Sequence[str], flags: Tensor) -> None:
        self._names = names
        self._flags = flags.to("cpu", non_blocking=True)
        self._copied = None
        if flags.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> tuple[signal.Signals | None, int]:
        """The signal that some rank received, or None, and the smallest `Checkpointer.num_finished`.

        Raises:
            NonFiniteError: a value is not finite.
        """
        if self._copied is not None:
            self._copied.synchronize()
        *not_finite, caught, finished = self._flags.tolist()
        broken = [name for name, flag in zip(self._names, not_finite, strict=True) if flag]
        if broken:
            raise NonFiniteError(", ".join(broken))
        return signal.Signals(caught) if caught else None, -finished


class StepChecks:
    """The checks of a training in order, read here and nowhere else.

    On a CPU each is read when it is added, so before the update. A GPU would idle meanwhile: there the loop
    calls `read` after the next forward pass, and before anything is written down.

    Args:
        late: whether checks wait to be read.
    """

    def __init__(self, late: bool) -> None:
        self.signal: signal.Signals | None = None
        """What some rank was asked to stop by, as far as checks were read."""
        self.num_finished = 0
        """The smallest `Checkpointer.num_finished` of all ranks, as far as checks were read."""
        self._late = late
        self._unread: deque[StepCheck] = deque()

    def add(self, check: StepCheck) -> None:
        """Add a check; on a CPU it is read, with the errors of `read`."""
        self._unread.append(check)
        if not self._late:
            self.read()

    def read(self) -> None:
        """Read all checks that were added.

        Raises:
            NonFiniteError: a value is not finite.
        """
        while self._unread:
            caught, num_finished = self._unread.popleft().read()
            self.signal = caught or self.signal
            self.num_finished = max(self.num_finished, num_finished)


def reads_late(device: torch.device) -> bool:
    """Whether the checks of a step are read after the next forward pass."""
    return device.type != "cpu"


def all_reduce_step_check(
    accelerator: Accelerator,
    loss: Tensor,
    report: Mapping[str, Tensor],
    stop: StopRequest,
    num_finished: int = 0,
) -> StepCheck:
    """Check on all ranks whether every term is finite and whether to stop; must be called on all ranks.

    Args:
        accelerator: the ranks.
        loss: of this rank.
        report: terms of this rank by name, (B,) each.
        stop: whether this rank was asked to stop.
        num_finished: `Checkpointer.num_finished` of this rank.
    """
    names = [*report, "loss"]
    finite = torch.stack([value.isfinite().all() for value in (*report.values(), loss.detach())])
    flags = torch.zeros(len(names) + 2, dtype=torch.int32, device=loss.device)
    flags[:-2] = (~finite).int()
    flags[-2].fill_(stop.signal or 0)
    flags[-1].fill_(-num_finished)
    if accelerator.num_processes > 1:
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
    return StepCheck(names, flags)
