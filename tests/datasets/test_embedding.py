"""Features of networks beside or instead of images and texts, against the networks called by hand."""

from __future__ import annotations

import argparse
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from packing import read, write_csv
from PIL import Image
from pretrained import TORCHVISION_NAME, WORDS, save_sentence_transformer, save_torchvision
from safetensors.torch import save_file
from webdataset import TarWriter

from cmvae.datasets import webdataset
from cmvae.datasets.columns import BoxedFile
from cmvae.datasets.embedding import embed_request, embed_source
from cmvae.datasets.pretrained import load_network
from cmvae.modalities import Embedding, VectorModality
from cmvae.utils.errors import UserError

FLAGS = "--image photo --text caption --min-count 1"


@pytest.fixture
def table(tmp_path):
    """Ten rows with five different photos, of which one row has none and one has no caption."""
    rng = np.random.default_rng(0)
    for number in range(5):
        pixels = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    rows = [
        {
            "photo": "" if number == 3 else f"{number % 5}.png",
            "caption": "" if number == 4 else f"a {WORDS[1 + number % 3]} thing",
        }
        for number in range(10)
    ]
    return write_csv(tmp_path / "table.csv", rows)


def embed(table, *texts, flags=FLAGS, **settings):
    return embed_source(read(table, flags), [embed_request(text) for text in texts], **settings)


def vectors(source, name):
    column = source.columns[name]
    return {row: column.read(row) for row in range(len(source.keys)) if column.has(row)}


def test_features_of_timm_are_those_before_its_classifier(table, tmp_path):
    timm = pytest.importorskip("timm", reason="not in the extra `dev`, see pyproject.toml")
    torch.manual_seed(0)
    by_hand = timm.create_model("test_vit").eval()
    save_file(by_hand.state_dict(), tmp_path / "weights.safetensors")
    source = embed(table, f"photo=timm:test_vit@{tmp_path / 'weights.safetensors'}")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(by_hand))
    with torch.no_grad():
        for row, vector in vectors(source, "photo_features").items():
            image = transform(Image.open(tmp_path / f"{row % 5}.png"))[None]
            expected = by_hand.forward_head(by_hand.forward_features(image), pre_logits=True)[0]
            np.testing.assert_allclose(vector, expected, rtol=1e-3, atol=1e-4)
    assert source.modalities["photo_features"].embedding.version == timm.__version__


def test_features_of_torchvision_are_what_its_classifier_sees(table, tmp_path):
    from torchvision import models

    torch.manual_seed(0)
    by_hand = models.get_model(TORCHVISION_NAME).eval()
    torch.save(by_hand.state_dict(), tmp_path / "weights.pth")
    source = embed(table, f"photo=torchvision:{TORCHVISION_NAME}@{tmp_path / 'weights.pth'}", only=True)
    assert list(source.columns) == ["caption", "photo_features"]
    assert source.table.columns["photo_features"] == ("photo",)
    seen: list[torch.Tensor] = []
    by_hand.fc.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    transform = models.get_model_weights(TORCHVISION_NAME).DEFAULT.transforms()
    with torch.no_grad():
        by_hand(transform(Image.open(tmp_path / "2.png"))[None])
    found = vectors(source, "photo_features")
    assert sorted(found) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    for row in (2, 7):
        np.testing.assert_allclose(found[row], seen[0][0], rtol=1e-3, atol=1e-4)

    modality = source.modalities["photo_features"]
    assert isinstance(modality, VectorModality)
    assert modality.optional
    of_train = np.stack([found[row] for row in source.splits["train"].tolist() if row in found])
    np.testing.assert_allclose(modality.mean, of_train.mean(axis=0), atol=1e-5)
    assert modality.embedding is not None
    assert modality.embedding.network == f"torchvision:{TORCHVISION_NAME}"
    assert modality.embedding.weights == str(tmp_path / "weights.pth")


def test_features_of_sentences_see_the_words_as_they_are(table, tmp_path):
    network, words = save_sentence_transformer(tmp_path / "words")
    # Words that are too rare for the vocabulary of the modality are still words to the network.
    source = embed(table, f"caption={network}", flags="--image photo --text caption --min-count 9")
    found = vectors(source, "caption_features")
    assert sorted(found) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    for row, vector in found.items():
        places = [WORDS.index(word) for word in ("a", WORDS[1 + row % 3], "thing")]
        np.testing.assert_allclose(vector, words[places].mean(dim=0), rtol=1e-5)


def test_images_in_tars_are_embedded_as_files_are(table, tmp_path):
    network = save_torchvision(tmp_path / "weights.safetensors")
    with TarWriter(str(tmp_path / "photos.tar")) as writer:
        for number in range(10):
            writer.write({"__key__": f"p{number}", "png": (tmp_path / f"{number % 5}.png").read_bytes()})
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    webdataset.add_arguments(parser)
    arguments = parser.parse_args([str(tmp_path / "photos.tar"), "--image", "png", "--out", "photos"])
    source = embed_source(webdataset.from_arguments(arguments), [embed_request(f"image={network}")])
    in_tar, in_files = vectors(source, "image_features"), embed(table, f"photo={network}")
    assert sorted(in_tar) == list(range(10))
    for row in (0, 1, 2, 4, 9):
        expected = in_files.columns["photo_features"].read(row)
        np.testing.assert_allclose(in_tar[row], expected, rtol=1e-4, atol=1e-5)


def test_a_network_sees_the_box_of_a_photograph(tmp_path):
    name, _, weights = save_torchvision(tmp_path / "weights.safetensors").partition("@")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    # A square of 20 pixels, with a tenth more, around (30, 25).
    boxed = BoxedFile(tmp_path / "photo.png", (20.0, 15.0, 20.0, 20.0))
    features, damaged = load_network(name, weights).embed([boxed, pixels[14:36, 19:41], pixels])
    assert not damaged
    np.testing.assert_allclose(features[0], features[1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(features[0], features[2], atol=1e-2)


def test_a_damaged_image_is_named_or_skipped(table, tmp_path):
    network = save_torchvision(tmp_path / "weights.safetensors")
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"photo: row-000004: .*2\.png: cannot be read as an image"):
        embed(table, f"photo={network}")
    source = embed(table, f"photo={network}", on_error="skip", only=True)
    with pytest.raises(UserError, match=r"2\.png: cannot be read as an image"):
        source.sample("train", list(source.splits["train"]).index(2))


def test_weights_with_code_are_refused(table, tmp_path):
    class Code:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "weights.pth").write_bytes(pickle.dumps({"state_dict": Code()}))
    with pytest.raises(UserError, match=r"weights\.pth: cannot be loaded"):
        embed(table, f"photo=torchvision:{TORCHVISION_NAME}@{tmp_path / 'weights.pth'}")
    assert not (tmp_path / "ran").exists()


def test_wrong_requests_say_what_is_wrong(table, tmp_path, monkeypatch):
    network = save_torchvision(tmp_path / "weights.safetensors")
    with pytest.raises(UserError, match="no modality 'image'; there are photo, caption"):
        embed(table, f"image={network}")
    with pytest.raises(UserError, match=r"modalities of kind image .* which are: photo"):
        embed(table, f"caption={network}")
    with pytest.raises(UserError, match="photo=…: is given 2 times"):
        embed(table, f"photo={network}", f"photo=torchvision:{TORCHVISION_NAME}")
    with pytest.raises(UserError, match="--embed-only: there is nothing to pack instead"):
        embed(table, only=True)
    with pytest.raises(UserError, match=r"missing\.safetensors: no such file"):
        embed(table, f"photo=torchvision:{TORCHVISION_NAME}@missing.safetensors")
    with pytest.raises(UserError, match="torchvision:no_such_network: cannot be loaded"):
        embed(table, "photo=torchvision:no_such_network")
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: cannot be loaded"):
        embed(table, f"photo=torchvision:{TORCHVISION_NAME}@{tmp_path / 'other.safetensors'}")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"pip install 'cmvae\[embed\]'"):
        embed(table, "caption=sentence-transformers:words")
    for text in ("photo", "photo=timm", "photo=keras:net", "=timm:net", "photo=timm:../net"):
        with pytest.raises(argparse.ArgumentTypeError, match="LIBRARY:NETWORK"):
            embed_request(text)


def test_an_index_cannot_name_other_networks():
    known = {"of": "photo", "kind": "image", "weights": None, "version": "1", "sha256": "0" * 64}
    assert Embedding(network="timm:resnet50.a1_in1k", **known)
    for network in ("timm:hf-hub:user/net", "os:system", "timm:local-dir:/data", "sentence-transformers:"):
        with pytest.raises(ValueError, match="network"):
            Embedding(network=network, **known)
