"""Run by test_world_size_change.py under a launcher: training that notes which samples each rank read.

world_size_change_log.py LOG SCRIPT [arguments of SCRIPT …]

Appends (epoch, batch, keys) as lines of JSON to LOG-RANK. The noise is zero, so that it does not depend on
the ranks.
"""

import json
import os
import runpy
import sys

from cmvae.training.cmvae_task import CMVAETask, LatentNoise
from cmvae.training.trainer import Trainer

log = f"{sys.argv[1]}-{os.environ.get('RANK', '0')}"
draw_noise, batches = CMVAETask.draw_noise, Trainer._batches


def without_noise(task, batch_size, device):
    noise = draw_noise(task, batch_size, device)
    return LatentNoise(noise.shared * 0, noise.private * 0, noise.cross_shifts)


def noted(trainer):
    for batch in batches(trainer):
        with open(log, "a") as file:
            state = trainer.state
            file.write(json.dumps([state.epoch, state.batch, batch["key"]]) + "\n")
        yield batch


CMVAETask.draw_noise = without_noise
Trainer._batches = noted
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
