"""Fréchet distances against the closed form between Gaussians and scipy's matrix square root."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm

from cmvae.evaluation import image_folder
from cmvae.evaluation.frechet import FrechetDistance, load_inception, refusal, to_bytes, warn_if_few
from cmvae.evaluation.image_folder import folder_distance, read_images
from cmvae.utils.errors import UserError


def samples_with(mean, covariance, num_samples, seed):
    """Samples whose own mean and covariance are exactly these."""
    white = np.random.default_rng(seed).normal(size=(num_samples, len(mean)))
    white -= white.mean(axis=0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white.T))).T
    return white @ np.linalg.cholesky(covariance).T + mean


def test_gaussians_with_diagonal_covariances_have_a_closed_form():
    mean_a, mean_b = np.array([0.0, 1.0, -2.0]), np.array([0.5, 1.0, 3.0])
    std_a, std_b = np.array([1.0, 2.0, 0.1]), np.array([1.5, 0.3, 0.1])
    real = samples_with(mean_a, np.diag(std_a**2), 50, seed=0)
    generated = samples_with(mean_b, np.diag(std_b**2), 80, seed=1)
    expected = np.sum((mean_a - mean_b) ** 2) + np.sum((std_a - std_b) ** 2)
    assert FrechetDistance(real).to(generated) == pytest.approx(expected, rel=1e-9)


def test_full_covariances_agree_with_the_matrix_square_root():
    rng = np.random.default_rng(3)
    mix_a, mix_b = rng.normal(size=(2, 8, 8))
    real, generated = rng.normal(size=(500, 8)) @ mix_a, rng.normal(size=(300, 8)) @ mix_b + 0.3
    cov_a, cov_b = np.cov(real.T), np.cov(generated.T)
    expected = np.sum((real.mean(0) - generated.mean(0)) ** 2)
    expected += np.trace(cov_a + cov_b - 2 * np.real(sqrtm(cov_a @ cov_b)))
    distance = FrechetDistance(real)
    assert distance.to(generated) == pytest.approx(expected, rel=1e-9)
    # What it was compared with before does not linger, and the real features do.
    assert distance.to(real) == pytest.approx(0, abs=1e-9)
    assert distance.to(generated) == pytest.approx(expected, rel=1e-9)


def test_too_few_samples_are_refused_and_few_warned_about(caplog):
    assert "32 samples" in refusal(32, 32)
    assert refusal(33, 32) is None
    warn_if_few("fid/conditional", 320, 32)
    assert not caplog.records
    warn_if_few("fid/conditional", 319, 32)
    assert "fid/conditional: 319 samples" in caplog.text


def test_inception_takes_bytes_of_three_channels():
    images = torch.tensor([-0.2, 0.5, 1.0, 1.7]).reshape(1, 1, 2, 2)
    out = to_bytes(images)
    assert out.dtype == torch.uint8
    assert out.shape == (1, 3, 2, 2)
    assert out[0, 2].flatten().tolist() == [0, 128, 255, 255]


class Harmful:
    def __reduce__(self):
        return (open, ("harm.txt", "w"))


def test_inception_weights_that_run_code_are_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    (tmp_path / "weights.pth").write_bytes(pickle.dumps(Harmful(), protocol=2))
    with pytest.raises(UserError, match=r"weights\.pth: is not a readable weights file"):
        load_inception(tmp_path / "weights.pth", torch.device("cpu"))
    assert not (tmp_path / "harm.txt").exists()


def test_without_torch_fidelity_the_reason_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install torch-fidelity"):
        load_inception(None, torch.device("cpu"))


def write_images(folder, images):
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")


def corner_means(images):
    """Features that numpy can have as well: the mean of each half of each image."""
    return torch.stack([images[..., :2].mean((1, 2, 3)), images[..., 2:].mean((1, 2, 3))], dim=1)


def test_folders_of_images_are_compared(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(2, 150, 4, 4, 3), dtype=np.uint8)
    images[1] //= 2
    write_images(tmp_path / "a", images[0])
    write_images(tmp_path / "b", images[1])
    halves = [np.stack([s[:, :, :2].mean((1, 2, 3)), s[:, :, 2:].mean((1, 2, 3))], 1) / 255 for s in images]
    expected = FrechetDistance(halves[0]).to(halves[1])
    distance = folder_distance(tmp_path / "a", tmp_path / "b", None, corner_means)
    assert distance == pytest.approx(expected, rel=1e-3)
    assert distance > 0.05


def test_a_shard_folder_stands_for_its_test_images(quadrants_shards, tmp_path):
    assert folder_distance(quadrants_shards, quadrants_shards, "m0", corner_means) == pytest.approx(
        0, abs=1e-9
    )
    with pytest.raises(UserError, match="--modality"):
        folder_distance(quadrants_shards, quadrants_shards, None, corner_means)


def test_grey_images_and_jpeg_are_read_as_colour(tmp_path):
    (tmp_path / "note.txt").write_text("no image")
    Image.new("L", (6, 5), 200).save(tmp_path / "a.png")
    Image.new("RGB", (6, 5), (200, 200, 200)).save(tmp_path / "b.JPG", format="JPEG")
    images = list(read_images(tmp_path))
    assert [image.shape for image in images] == [(5, 6, 3)] * 2
    assert all(abs(int(image.mean()) - 200) <= 1 for image in images)


def test_bad_images_are_named(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    with pytest.raises(UserError, match="no such folder"):
        list(read_images(folder))
    folder.mkdir()
    with pytest.raises(UserError, match="holds no"):
        list(read_images(folder))
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    with pytest.raises(UserError, match="1 samples are too few"):
        folder_distance(folder, folder, None, corner_means)
    Image.new("RGB", (8, 4)).save(folder / "b.png")
    with pytest.raises(UserError, match=r"b\.png: is 4×8, but the first"):
        list(read_images(folder))
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:40])
    with pytest.raises(UserError, match=r"b\.png: cannot be decoded"):
        list(read_images(folder))
    monkeypatch.setattr(image_folder, "MAX_PIXELS", 63)
    with pytest.raises(UserError, match=r"a\.png: has more than 63 pixels \(8×8\)"):
        list(read_images(folder))
