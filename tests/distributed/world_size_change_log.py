"""Run by test_world_size_change.py under a launcher: training that logs what each rank read.

world_size_change_log.py LOG SCRIPT [arguments of SCRIPT …]

Appends (epoch, batch, keys, seed, places) as lines of JSON to LOG-RANK. The noise is zero: ranks of another
number have other samples at a place.
"""

import json
import os
import runpy
import sys

from cmvae.training.cmvae_task import CMVAETask, LatentNoise
from cmvae.training.trainer import Trainer

log = f"{sys.argv[1]}-{os.environ.get('RANK', '0')}"
draw_noise, next_batch = CMVAETask.draw_noise, Trainer._next_batch


def without_noise(task, generators, seed):
    noise = draw_noise(task, generators, seed)
    return LatentNoise(noise.shared * 0, noise.private * 0, noise.cross_shifts)


def logged(trainer, batches, part):
    batch = next_batch(trainer, batches, part)
    with open(log, "a") as file:
        state = trainer.state
        line = [state.epoch, state.batch, batch["key"], batch["_seed"], list(batch["_place"])]
        file.write(json.dumps(line) + "\n")
    return batch


CMVAETask.draw_noise = without_noise
Trainer._next_batch = logged
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
