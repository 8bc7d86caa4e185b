"""Run by test_ranks.py under a launcher: training where bf16 gives gradients of NaN on rank 1 alone."""

import os
import runpy
import sys

import torch

from cmvae.training import precision_check

original = precision_check._gradients


def broken(task, batch, dtype):
    found = original(task, batch, dtype)
    if os.environ["RANK"] == "1" and dtype is not None:
        found = {name: gradient * torch.nan for name, gradient in found.items()}
    return found


precision_check._gradients = broken
torch.cpu._is_avx512_bf16_supported = lambda: True
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
