"""Run by test_ranks.py under a launcher: training in which one term breaks on rank 1 alone, in step 3."""

import os
import runpy
import sys

import torch

from cmvae.tasks import CMVAETask

original = CMVAETask._log_likelihood
calls = {"training": 0}


def broken(task, modality, *arguments):
    value = original(task, modality, *arguments)
    if task.training and modality == "m2":
        calls["training"] += 1
        if calls["training"] == 3 and os.environ["RANK"] == "1":
            return value * torch.nan
    return value


CMVAETask._log_likelihood = broken
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
