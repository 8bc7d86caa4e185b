"""Thumbnails: their size, their pixels, and that a browser could read them."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from cmvae.visualize.thumbnails import image_uri, shrink


def read(uri):
    kind, _, content = uri.partition(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as picture:
        return np.asarray(picture.convert("RGB"))


def test_an_image_is_shrunk_by_averaging_and_never_enlarged():
    image = np.arange(3 * 8 * 16, dtype=np.uint8).reshape(3, 8, 16) // 2
    smaller = shrink(image, 4)
    assert smaller.shape == (3, 2, 4)
    blocks = image.reshape(3, 2, 4, 4, 4).mean((2, 4))
    np.testing.assert_allclose(smaller, blocks, atol=0.51)
    np.testing.assert_array_equal(shrink(image, 16), image)
    assert shrink(np.zeros((1, 100, 1), dtype=np.uint8), 10).shape == (1, 10, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_smallest_images_keep_every_pixel(channels):
    image = np.random.default_rng(0).integers(0, 256, (channels, 16, 16), dtype=np.uint8)
    pixels = np.broadcast_to(image, (3, 16, 16)).transpose(1, 2, 0)
    np.testing.assert_array_equal(read(image_uri(image)), pixels)
    assert len(image_uri(image, small_file=True)) < len(image_uri(image))


def test_larger_images_are_close():
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    image = np.stack([np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.full((64, 64), 99)])
    found = read(image_uri(image.astype(np.uint8))).transpose(2, 0, 1)
    assert np.abs(found.astype(int) - image).mean() < 5
