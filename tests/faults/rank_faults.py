"""Run by test_launched.py under a launcher: rank 1 fails in its fifth step, the first time it gets there.

rank_faults.py die|hang|freeze SCRIPT [arguments of SCRIPT …]
"""

import os
import runpy
import signal
import sys
import time

from cmvae.data.reader import TrainingLoader

FAULTS = {
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "hang": lambda: time.sleep(1000),
    "freeze": lambda: os.kill(os.getpid(), signal.SIGSTOP),
}
fault = FAULTS[sys.argv[1]]
original = TrainingLoader.epoch_batches


def failing(loader, epoch, skip_batches=0):
    for number, batch in enumerate(original(loader, epoch, skip_batches), start=skip_batches):
        if number == 4 and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            fault()
        yield batch


TrainingLoader.epoch_batches = failing
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
