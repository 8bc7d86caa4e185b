"""Run under a launcher by the tests of other numbers of ranks: training that logs what each rank reads.

world_size_log.py LOG SCRIPT [arguments of SCRIPT …]

Appends (epoch, batch, keys, seed, places, loss) as lines of JSON to LOG-WORLDSIZE-RANK. With the variable
DIES_IN=N this process and its launcher are killed in the step after N.
"""

import json
import os
import runpy
import signal
import sys

from cmvae.training import trainer

log = f"{sys.argv[1]}-{os.environ.get('WORLD_SIZE', '1')}-{os.environ.get('RANK', '0')}"
next_batch, all_reduce_step_check = trainer.Trainer._next_batch, trainer.all_reduce_step_check
line = []


def remember_batch(loop, batches, part):
    batch = next_batch(loop, batches, part)
    line[:] = [loop.state.epoch, loop.state.batch, batch["key"], batch["_seed"], list(batch["_place"])]
    if str(loop.state.step) == os.environ.get("DIES_IN"):
        for process in (os.getppid(), os.getpid()):
            os.kill(process, signal.SIGKILL)
    return batch


def write_line(accelerator, loss, *others):
    with open(log, "a") as file:
        file.write(json.dumps([*line, loss.item()]) + "\n")
    return all_reduce_step_check(accelerator, loss, *others)


trainer.Trainer._next_batch = remember_batch
trainer.all_reduce_step_check = write_line
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
