"""The commands: `cmvae COMMAND`, and `python launch/…` and `python tools/…` in a checkout.

Importing this imports no library that is slow to import: each command imports what it needs when it runs.
"""

from __future__ import annotations

from importlib import import_module
from typing import NoReturn

from cmvae.utils.process_exit import run_main

COMMANDS = {
    "pack": "pack data into shards: a table, a folder, or one of the published data sets",
    "inspect": "count, verify and draw what a shard folder holds",
    "train": "train a CMVAE, or the refiner of one",
    "restarts": "train from several seeds and choose one run without labels",
    "evaluate": "evaluate a trained run",
    "cluster": "assign packed data or the rows of a table to clusters, as a CSV table",
    "impute": "fill the missing cells of a table",
    "generate": "generate with a trained run, to files",
    "compare": "compare evaluated runs over seeds",
    "baselines": "k-means on each modality of packed data",
    "classifiers": "train the classifiers that evaluation needs for coherence",
    "frechet": "Fréchet distance between two folders of images",
    "register": "write a model for MLflow, to serve it",
    "push": "upload a model to the Hugging Face Hub, with a model card",
}
"""Name of a command, a module of this package, and what it does."""


def run(name: str) -> NoReturn:
    """Run a command with the arguments in `sys.argv` and end the process.

    Exit codes: 0 success, 2 an error of the user, 130 Ctrl-C; a command may have others.

    Args:
        name: a key of `COMMANDS`.
    """
    run_main(import_module(f"cmvae.commands.{name}").main)
