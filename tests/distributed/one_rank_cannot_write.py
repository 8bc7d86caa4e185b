"""Run by test_ranks.py under a launcher: the storage fails for one rank in its second checkpoint.

one_rank_cannot_write.py RANK SCRIPT [arguments of SCRIPT …]
"""

import errno
import os
import runpy
import sys

from cmvae.training import checkpoint


def fail_at_second_call(owner, name):
    original, calls = getattr(owner, name), []

    def failing(*arguments):
        calls.append(name)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(*arguments)

    setattr(owner, name, failing)


if os.environ["RANK"] == sys.argv[1]:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") == "true":
        from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

        # Called once per checkpoint on rank 1, which has only its part of the optimizer to write.
        fail_at_second_call(TorchCheckpointEngine, "save")
    else:
        fail_at_second_call(checkpoint, "save_file")
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
