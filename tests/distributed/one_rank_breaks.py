"""Run by test_ranks.py under a launcher: training in which one term breaks on rank 1 alone, in step 3."""

import os
import runpy
import sys

import torch

from cmvae.training import cmvae_task as cmvae_task

original = cmvae_task.LogWeightTerms
calls = {"training": 0}


def broken(*, log_likelihood, **others):
    if torch.is_grad_enabled():  # not in a validation
        calls["training"] += 1
        if calls["training"] == 3 and os.environ["RANK"] == "1":
            log_likelihood = log_likelihood | {"m2": log_likelihood["m2"] * torch.nan}
    return original(log_likelihood=log_likelihood, **others)


cmvae_task.LogWeightTerms = broken
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
