"""`cmvae frechet` on folders of images."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cmvae.data.reader import EvaluationLoader


def test_folders_are_compared_in_the_features_of_a_classifier(quadrants_shards, tmp_path, call, caplog):
    (batch,) = EvaluationLoader(quadrants_shards, split="test", modalities=["m0"], batch_size=90)
    for name, images in (("same", batch["m0"]), ("dark", batch["m0"] // 4)):
        (tmp_path / name).mkdir()
        pixels = np.ascontiguousarray(images.numpy().transpose(0, 2, 3, 1))
        for key, image in zip(batch["key"], pixels, strict=True):
            Image.fromarray(image).save(tmp_path / name / f"{key}.png")
    same, dark = tmp_path / "same", tmp_path / "dark"
    flags = ["--classifier", quadrants_shards, "--modality", "m0"]

    distances = []
    for folder in (same, dark):
        code, output, _ = call("frechet", folder, quadrants_shards, *flags)
        assert code == 0
        text, _, number = output.strip().rpartition(": ")
        assert text == "Fréchet distance in classifier features"
        distances.append(float(number))
    assert distances[0] == pytest.approx(0, abs=1e-3)
    assert distances[1] > 1
    assert "90 samples for 32 features" in caplog.text

    Image.new("RGB", (9, 8)).save(dark / "zebra.png")
    for arguments, reason in (
        ([dark, same, *flags], "zebra.png: is 8×9"),
        ([same, same, "--classifier", quadrants_shards], "needs --modality"),
        ([tmp_path / "nothing", same, *flags], "nothing: no such folder"),
    ):
        code, _, errors = call("frechet", *arguments)
        assert code == 2
        assert errors.startswith("error: ")
        assert reason in errors


def test_pictures_of_another_size_than_the_classifier_reads_are_refused(quadrants_shards, tmp_path, call):
    Image.new("RGB", (8, 9)).save(tmp_path / "a.png")
    code, _, errors = call(
        "frechet", tmp_path, tmp_path, "--classifier", quadrants_shards, "--modality", "m0"
    )
    assert code == 2
    assert "pictures are 9×8, but the classifier of m0 reads 8×8" in errors
