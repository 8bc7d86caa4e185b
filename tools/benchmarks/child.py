"""Process of a single job, so that its peak memory is its own.

Protocol: a line of JSON on standard input names the job, every further line runs it once, and each is
    answered
with a line of JSON. At the end of the input the answer holds the facts of the job and its peak memory.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from job import Job

MODULES = {
    "update": "training",
    "ceiling": "training",
    "shards": "reading",
    "selection": "inference",
    "refining": "inference",
    "evaluation": "inference",
}
"""Job → module. Only the module of the job is imported, because imports count as memory."""


def main() -> None:
    """Serve the parent process."""
    answers, sys.stdout = sys.stdout, sys.stderr

    def answer(content: dict[str, Any]) -> None:
        print(json.dumps(content), file=answers, flush=True)

    from cmvae.utils.errors import UserError

    request = json.loads(sys.stdin.readline())
    try:
        job = _builder(request["job"])(**request["arguments"])
        for _ in range(request["warm_up"]):
            job.run()
    except UserError as error:
        answer({"error": str(error)})
        return
    answer({"ready": True})
    for _ in sys.stdin:
        answer(job.measure())
    peak = peak_memory()
    facts = job.facts | (job.afterwards() if job.afterwards is not None else {})
    answer({"num_items": job.num_items, "facts": facts, "peak_memory_bytes": peak})


def _builder(name: str) -> Callable[..., Job]:
    module = import_module(MODULES[name])
    builder: Callable[..., Job] = getattr(module, f"{name}_job")
    return builder


def peak_memory() -> int:
    """Peak memory in bytes: of tensors on a GPU, or else the main memory of this process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    # On Linux `ru_maxrss` of a child starts at that of its parent. Not every kernel has VmHWM.
    own = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE) if status.exists() else None
    if own is not None:
        return int(own[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


if __name__ == "__main__":
    main()
