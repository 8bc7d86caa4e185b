"""`cmvae generate` and `cluster` hold one part in memory: what lives after each part does not grow."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Mapping
from contextlib import suppress

import numpy as np
import pytest
import torch

from cmvae.commands.generated_files import GenerationFolder
from cmvae.commands.parts import PartFolder
from cmvae.config import ModalityConfig, ModelConfig, save_config
from cmvae.datasets.base import Sample
from cmvae.datasets.writer import write_shards
from cmvae.modalities import Modality, VectorModality
from cmvae.models.cmvae import CMVAE

NUM_PARTS, PART, DIMENSIONS = 6, 1000, 64
# A part's values in fp32; as text or Python objects they take more.
PART_BYTES = PART * DIMENSIONS * 4


class Vectors:
    """A source for `write_shards`: noise, in shards of one part."""

    name = "vectors"
    class_names = None
    settings: Mapping[str, str] = {}
    modalities: Mapping[str, Modality] = {
        "v": VectorModality(shape=(DIMENSIONS,), mean=(0.0,) * DIMENSIONS, std=(1.0,) * DIMENSIONS)
    }
    split_sizes: Mapping[str, int] = {"test": NUM_PARTS * PART}

    def sample(self, split, index):
        return Sample({"v": np.random.default_rng(index).normal(size=DIMENSIONS).astype(np.float32)}, None)


@pytest.fixture
def vector_run(experiment, tmp_path):
    """The folder of a run with an untrained model of the vectors."""
    torch.manual_seed(0)
    config = ModelConfig(
        shared_dim=4, private_dim=4, num_clusters=6, modalities={"v": ModalityConfig(width=2)}
    )
    run = tmp_path / "runs" / "vectors"
    CMVAE(config, Vectors.modalities).save_pretrained(run / "export")
    save_config(experiment().model_copy(update={"model": config}), run / "config.yaml")
    return run


@pytest.fixture
def live_bytes(monkeypatch):
    """`live_bytes(PartFolder)` becomes a list of what is alive after each part: tensors, arrays, objects."""

    def measure(folder_class):
        found = []
        write = folder_class.write

        def write_and_measure(*arguments):
            write(*arguments)
            gc.collect()
            storages = {}
            for x in gc.get_objects():
                # Tensors of a compiler or an exporter have no storage.
                with suppress(RuntimeError):
                    if type(x) is torch.Tensor:
                        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            found.append(sum(storages.values()) + tracemalloc.get_traced_memory()[0])

        monkeypatch.setattr(folder_class, "write", write_and_measure)
        tracemalloc.start()
        return found

    yield measure
    tracemalloc.stop()


def check(found):
    assert len(found) == NUM_PARTS
    # Not the sum: an import on the way is no growth per part. Kept parts would add more than one each.
    assert np.median(np.diff(found)) < PART_BYTES / 4


def test_generated_samples_are_not_kept(vector_run, call, live_bytes, tmp_path):
    found = live_bytes(GenerationFolder)
    code, _, err = call("generate", vector_run, "--num", NUM_PARTS * PART, "--out", tmp_path / "out")
    assert code == 0, err
    check(found)


def test_clustered_samples_are_not_kept(vector_run, call, live_bytes, tmp_path):
    write_shards(Vectors(), tmp_path / "shards", shard_size=PART)
    found = live_bytes(PartFolder)
    code, _, err = call("cluster", vector_run, tmp_path / "shards", "--out", tmp_path / "clusters.csv")
    assert code == 0, err
    check(found)
    assert len((tmp_path / "clusters.csv").read_text().splitlines()) == NUM_PARTS * PART + 1
