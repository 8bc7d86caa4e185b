"""The contrast of two ranks knows the groups of both."""

import socket

import torch
from linear_model import linear_model

from cmvae.config import ObjectiveConfig
from cmvae.training.cmvae_task import CMVAETask

# A group of three on both ranks and one of two on the second.
GROUPS = torch.tensor([7, -1, 7, 2**62, 7, -1, 1, 1])


def losses(part):
    """Of the samples in `part`, among those of all ranks."""
    model = linear_model(("a", "b"), 3)
    task = CMVAETask(model, ObjectiveConfig(alignment={"weight": 1.0})).train()
    torch.manual_seed(1)
    inputs = {name: torch.randn(8, 1, 1, 3)[part] for name in ("a", "b")}
    mask = torch.ones(8, 2, dtype=torch.bool)[part]
    return task._contrast(inputs, model.encode(inputs), mask, GROUPS[part], []).detach()


def rank_losses(rank, port, folder):
    store = f"tcp://localhost:{port}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    torch.save(losses(slice(4 * rank, 4 * rank + 4)), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_ranks_give_the_contrast_of_one(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(rank_losses, (port, tmp_path), nprocs=2, start_method="fork")
    found = torch.cat([torch.load(tmp_path / f"{rank}.pt") for rank in range(2)])
    torch.testing.assert_close(found, losses(slice(None)))
