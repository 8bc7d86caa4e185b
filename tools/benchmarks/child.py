"""The process that one job has to itself: what it keeps in memory is then its own.

Reads from standard input a line of JSON that says which job, then a line for every time that it shall run;
answers each with a line of JSON. At the end of the input it tells what the job was about, and the memory that
it took.
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
    "folder": "reading",
    "selection": "generating",
    "refining": "generating",
    "evaluation": "generating",
}
"""Where each job is."""


def main() -> None:
    """Serve one parent."""
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
    peak_memory = _peak_memory()
    afterwards = getattr(job, "afterwards", None)  # the jobs of another checkout may have none
    facts = job.facts | (afterwards() if afterwards is not None else {})
    answer({"num_items": job.num_items, "facts": facts, "peak_memory_bytes": peak_memory})


def _builder(name: str) -> Callable[..., Job]:
    # Only what is asked for: another checkout may lack the others.
    module = import_module(MODULES[name])
    builder: Callable[..., Job] = getattr(module, f"{name}_job")
    return builder


def _peak_memory() -> int:
    """Bytes that tensors took on a GPU, or all that this process took of the main memory."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    # On Linux `ru_maxrss` of a child begins at what its parent took. Not every kernel tells this one.
    own = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE) if status.exists() else None
    if own is not None:
        return int(own[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


if __name__ == "__main__":
    main()
