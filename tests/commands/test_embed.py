"""Features of pretrained networks for new rows of a trained run, which record the network."""

from __future__ import annotations

import pytest
import torch
from new_rows import make_rows, read
from packing import write_csv
from pretrained import TORCHVISION_NAME, save_sentence_transformer, save_torchvision

from cmvae.config import ModalityConfig, ModelConfig, save_config
from cmvae.data.index import TABLE_NAME, ShardIndex
from cmvae.datasets.pretrained import load_network
from cmvae.models.cmvae import CMVAE


@pytest.fixture
def weights(tmp_path):
    return tmp_path / "weights.safetensors"


@pytest.fixture
def pack(call, tmp_path, weights):
    """`pack("--embed-only")` packs 30 rows with features of photos and captions; returns the shards."""
    write_csv(tmp_path / "base.csv", make_rows(30, tmp_path))
    photo, (caption, _) = save_torchvision(weights), save_sentence_transformer(tmp_path / "words")

    def run(*flags):
        code, said, err = call(
            "pack", "table", tmp_path / "base.csv", "--out", tmp_path / "shards", "--image", "photo",
            "--text", "caption", "--image-size", 8, "--min-count", 1, "--embed", f"photo={photo}",
            "--embed", f"caption={caption}", *flags,
        )  # fmt: skip
        assert code == 0, err
        assert "photo_features:" in said
        return tmp_path / "shards"

    return run


@pytest.fixture
def make_untrained(experiment, tmp_path):
    """`make_untrained(shards)` is the folder of a run on these shards that was not trained."""

    def make(shards):
        index = ShardIndex.load(shards)
        torch.manual_seed(0)
        modalities = {name: ModalityConfig(width=2) for name in index.modalities}
        config = ModelConfig(shared_dim=4, private_dim=4, num_clusters=6, modalities=modalities)
        run = tmp_path / "run"
        CMVAE(config, index.modalities).save_pretrained(run / "export")
        save_config(
            experiment(f"data.shards={shards}").model_copy(update={"model": config}), run / "config.yaml"
        )
        (run / TABLE_NAME).write_text(index.table.model_dump_json())
        return run

    return make


@pytest.mark.parametrize("flags", [(), ("--embed-only",)])
def test_new_rows_are_embedded_with_the_network_of_the_run(flags, pack, make_untrained, call, tmp_path):
    shards = pack(*flags)
    names = ["photo_features", "caption_features"]
    assert list(ShardIndex.load(shards).modalities) == (names if flags else ["photo", "caption", *names])
    run = make_untrained(shards)
    for data, out in ((shards, "packed.csv"), (tmp_path / "base.csv", "table.csv")):
        code, _, err = call("cluster", run, data, "--out", tmp_path / out)
        assert code == 0, err
    packed, direct = read(tmp_path / "packed.csv"), read(tmp_path / "table.csv")
    assert len(direct) == 30
    for one, other in zip(packed, direct, strict=True):
        assert one["key"] == other["key"]
        assert one["photo_features_cluster"] == other["photo_features_cluster"]
        assert one["caption_features_cluster"] == other["caption_features_cluster"]
        assert one["cluster"] == other["cluster"]
    code, _, err = call("pack", "table", tmp_path / "base.csv", "--out", tmp_path / "like", "--like", run)
    assert code == 0, err
    assert ShardIndex.load(tmp_path / "like").modalities == ShardIndex.load(shards).modalities
    code, _, err = call(
        "pack", "table", tmp_path / "base.csv", "--out", tmp_path / "no", "--like", run, "--embed-only"
    )
    assert code == 2
    assert "--embed-only: comes from the run with --like" in err


def test_other_weights_are_refused(pack, make_untrained, weights, call, tmp_path):
    run = make_untrained(pack())
    save_torchvision(weights, seed=1)
    load_network.cache_clear()
    code, _, err = call("cluster", run, tmp_path / "base.csv", "--out", tmp_path / "a.csv")
    assert code == 2
    assert f"torchvision:{TORCHVISION_NAME}@{weights}: its weights have SHA-256" in err
    # Shards of a table, a folder or tars that were embedded with other weights.
    code, _, err = call("cluster", run, pack("--force"), "--out", tmp_path / "b.csv")
    assert code == 2
    assert (
        f"modalities.photo_features.embedding: {{'kind': 'image', 'network': 'torchvision:{TORCHVISION_NAME}'"
        in err
    )
