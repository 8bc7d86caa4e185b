"""Modalities: stored → bytes → stored, stored → data → stored, what people see, and what is refused."""

import io
import pickle
from typing import get_args

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from cmvae.modalities import (
    AnyModality,
    BinaryModality,
    CategoricalModality,
    ImageModality,
    TextModality,
    VectorModality,
)
from cmvae.modalities.text import SPECIAL_TOKENS

IMAGE = ImageModality(shape=(3, 4, 6))
GREY = ImageModality(shape=(1, 4, 6))
TEXT = TextModality(shape=(5,), categories=(*SPECIAL_TOKENS, "a", "red", "bird"))
VECTOR = VectorModality(
    shape=(3,),
    columns=("length", "width", "weight"),
    mean=(10.0, -2.0, 0.5),
    std=(4.0, 0.5, 1.0),
)
BINARY = BinaryModality(shape=(3,), columns=("crest", "tail", "bill"))
CATEGORICAL = CategoricalModality(categories=("cat", "dog", "owl"))

STORED = {
    "image": (IMAGE, np.random.default_rng(0).integers(0, 256, (2, 3, 4, 6), dtype=np.uint8)),
    "grey": (GREY, np.random.default_rng(1).integers(0, 256, (2, 1, 4, 6), dtype=np.uint8)),
    "text": (TEXT, np.array([[3, 4, 5, 1, 0], [5, 2, 4, 3, 1]])),
    "vector": (VECTOR, np.array([[14, -2.5, 0], [2, -1, 3]], dtype=np.float32)),
    "binary": (BINARY, np.array([[1, 0, 1], [0, 0, 0]], dtype=np.uint8)),
    "categorical": (CATEGORICAL, np.array([2, 0])),
}
EACH = pytest.mark.parametrize(("modality", "stored"), STORED.values(), ids=STORED)


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def to_data(modality, stored):
    return modality.to_data(torch.from_numpy(stored.copy()))


def test_every_kind_is_tested():
    union, _ = get_args(AnyModality)
    assert {type(modality) for modality, _ in STORED.values()} == set(get_args(union))


@EACH
def test_what_was_packed_is_read_back(modality, stored):
    for value in stored:
        again = modality.decode(modality.encode(value))
        assert again.dtype == modality.dtype
        assert again.shape == modality.shape
        np.testing.assert_array_equal(again, value)


@EACH
def test_stored_to_data_and_back(modality, stored):
    data = to_data(modality, stored)
    assert data.shape == stored.shape
    for given in (data, data.numpy(), data.clone().requires_grad_(data.is_floating_point())):
        again = modality.to_stored(given)
        assert again.dtype == modality.dtype
        np.testing.assert_allclose(again, stored, rtol=1e-6)
    np.testing.assert_allclose(modality.to_stored(data[1]), stored[1], rtol=1e-6)


def test_data_is_what_models_take():
    pixels = to_data(IMAGE, np.full((1, 3, 4, 6), 51, dtype=np.uint8))
    torch.testing.assert_close(pixels, torch.full((1, 3, 4, 6), 0.2))
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    # (14 − 10) / 4, (−2.5 + 2) / 0.5, (0 − 0.5) / 1
    torch.testing.assert_close(to_data(*STORED["vector"])[0], torch.tensor([1.0, -1.0, -0.5]))
    assert to_data(*STORED["binary"]).dtype == torch.float32
    assert to_data(*STORED["text"]).dtype == to_data(*STORED["categorical"]).dtype == torch.int64


def test_what_models_make_becomes_storable():
    wild = np.array([-0.5, 0.5, 1.5], dtype=np.float32).reshape(1, 1, 1, 3)
    assert GREY.to_stored(wild).flatten().tolist() == [0, 128, 255]
    assert BINARY.to_stored(np.array([[0.2, 0.5, 0.9]])).tolist() == [[0, 0, 1]]


def test_what_people_read():
    def text(name, place=0):
        modality, stored = STORED[name]
        return modality.describe(stored[place])

    assert text("text") == "a red bird"
    assert text("text", 1) == "bird <unk> red a"
    assert text("vector") == "length: 14, width: -2.5, weight: 0"
    assert (text("binary"), text("binary", 1)) == ("crest, bill", "none")
    assert (text("categorical"), text("categorical", 1)) == ("owl", "cat")
    assert text("image") == "image of 4×6"


@EACH
def test_rows_of_data_are_read_as_what_is_stored(modality, stored):
    """Such as what a model generates; whether a batch is a tensor or an array."""
    data = to_data(modality, stored)
    for rows in (data, data.numpy()):
        assert [modality.to_text(row) for row in rows] == [modality.describe(row) for row in stored]


def test_text_of_data_is_in_its_units():
    # 10 + 4·1, −2 − 0.5·1, 0.5 − 1·0.5
    assert VECTOR.to_text(torch.tensor([1.0, -1.0, -0.5])) == "length: 14, width: -2.5, weight: 0"


@EACH
def test_json_is_read_as_the_modality_that_it_was(modality, stored):
    adapter = TypeAdapter(AnyModality)
    assert adapter.validate_json(modality.model_dump_json()) == modality


@EACH
def test_every_kind_draws_itself(modality, stored):
    figure = Figure()
    ax = figure.subplots()
    modality.draw(ax, stored[0])
    assert [*ax.images, *ax.texts, *ax.patches]


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize("modality", [TEXT, VECTOR, BINARY, CATEGORICAL], ids=lambda modality: modality.kind)
def test_pickles_are_refused_unread(modality):
    objects = np.empty(modality.shape, dtype=object)
    objects[...] = Malicious()
    for content in (npy(objects, allow_pickle=True), pickle.dumps(Malicious())):
        with pytest.raises(ValueError, match="cannot be read as a NumPy array"):
            modality.decode(content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("vector", npy(np.zeros(3)), "float64 of shape .3,., its index says float32"),
        ("vector", npy(np.zeros(4, dtype=np.float32)), "of shape .4,., its index says float32 of shape .3,."),
        ("vector", npy(np.array([0, np.nan, 0], dtype=np.float32)), "not finite"),
        ("vector", npy(np.array([0, np.inf, 0], dtype=np.float32)), "not finite"),
        ("vector", npy(np.zeros(3, dtype=np.float32))[:-4], "cannot be read"),
        ("vector", b"", "cannot be read"),
        ("text", npy(np.array([3, 4, 6, 1, 0])), r"0\.\.6, its index has 6 names"),
        ("text", npy(np.array([3, -1, 5, 1, 0])), r"-1\.\.5, its index has 6 names"),
        ("text", npy(np.array([3, 4, 5, 1, 0], dtype=np.int32)), "int32"),
        ("binary", npy(np.array([0, 2, 1], dtype=np.uint8)), "holds 2, where there can be 0 and 1 only"),
        ("binary", npy(np.array([True, False, True])), "bool of shape"),
        ("categorical", npy(np.array([1])), r"int64 of shape \(1,\), its index says int64 of shape \(\)"),
        ("categorical", npy(np.array(3)), r"3\.\.3, its index has 3 names"),
        ("image", npy(STORED["image"][1][0]), "cannot be decoded as PNG"),
    ],
)
def test_what_does_not_fit_is_refused(name, content, message):
    modality, _ = STORED[name]
    with pytest.raises(ValueError, match=message):
        modality.decode(content)


def test_an_archive_is_no_array():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3, dtype=np.float32))
    with pytest.raises(ValueError, match="an archive of shape"):
        VECTOR.decode(buffer.getvalue())


@pytest.mark.parametrize(("mode", "size"), [("RGB", (4, 6)), ("L", (6, 4)), ("RGBA", (6, 4))])
def test_pictures_of_another_form_are_refused(mode, size):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    with pytest.raises(ValueError, match=rf"{mode} image of .*, expected RGB of 4×6"):
        IMAGE.decode(buffer.getvalue())


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 7, 5), (3, 65, 64), (1, 256, 256)])
def test_images_are_png_that_others_read(shape):
    """Small ones are written without a library, large ones by it."""
    modality = ImageModality(shape=shape)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    content = modality.encode(pixels)
    with Image.open(io.BytesIO(content)) as image:
        image.verify()
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == ("L" if shape[0] == 1 else "RGB")
        np.testing.assert_array_equal(
            np.asarray(image).reshape(*shape[1:], shape[0]), pixels.transpose(1, 2, 0)
        )
    np.testing.assert_array_equal(modality.decode(content), pixels)


@pytest.mark.parametrize("level", [0, 9])
def test_png_of_others_is_read(level):
    """Level 0 has filters, but no compression: nearly the form in which small images are written here."""
    pixels = np.arange(72, dtype=np.uint8).reshape(3, 4, 6)
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG", compress_level=level)
    np.testing.assert_array_equal(IMAGE.decode(buffer.getvalue()), pixels)


def test_no_changed_byte_of_a_small_image_is_taken_for_a_pixel():
    modality, (pixels, _) = STORED["image"]
    content = modality.encode(pixels)
    refused = 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x10
        try:
            decoded = modality.decode(bytes(changed))
        except ValueError:
            refused += 1
        else:  # what says nothing about the pixels
            np.testing.assert_array_equal(decoded, pixels)
    assert refused > len(content) - 25


def test_only_png_is_decoded():
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "JPEG")
    with pytest.raises(ValueError, match="cannot be decoded as PNG"):
        IMAGE.decode(buffer.getvalue())


@pytest.mark.parametrize(
    ("modality", "changes", "message"),
    [
        (IMAGE, {"shape": (2, 4, 6)}, r"shape\n.*1 or 3 channels"),
        (IMAGE, {"shape": (3, 4)}, r"shape\n.*1 or 3 channels, height, width"),
        (IMAGE, {"shape": (3, 4, 0)}, r"shape\n.*1 or 3 channels, height, width"),
        (IMAGE, {"dtype": "float32"}, r"dtype\n.*'uint8'"),
        (IMAGE, {"kind": "sound"}, "'sound' .* does not match any of the expected tags: 'image', 'text'"),
        (IMAGE, {"categories": ("a", "b")}, r"categories\n.*not permitted"),
        (TEXT, {"shape": (5, 2)}, r"shape\n.*at most 1 item"),
        (TEXT, {"categories": ("a", "b", "c", "d")}, r"categories\n.*begins with <pad>, <eos>, <unk>"),
        (TEXT, {"categories": (*SPECIAL_TOKENS, "a", "a")}, r"categories\n.*a name is there twice"),
        (TEXT, {"categories": None}, r"categories\n.*valid tuple"),
        (VECTOR, {"mean": None}, r"mean\n.*valid tuple"),
        (VECTOR, {"mean": (1.0,)}, "mean: must have one entry for each of the 3"),
        (VECTOR, {"std": (1.0, 0.0, 1.0)}, r"std\.1\n.*greater than 0"),
        (VECTOR, {"std": (1.0, float("nan"), 1.0)}, r"std\.1\n.*finite"),
        (VECTOR, {"columns": ("length",)}, "columns: must have one entry for each of the 3"),
        (BINARY, {"shape": ()}, r"shape"),
        (BINARY, {"columns": ("crest",)}, "columns: must have one entry"),
        (CATEGORICAL, {"shape": (1,)}, r"shape\n.*at most 0 items"),
        (CATEGORICAL, {"categories": ("cat",)}, r"categories\n.*at least 2 items"),
        (CATEGORICAL, {"categories": ("cat", "cat")}, r"categories\n.*a name is there twice"),
    ],
)
def test_modalities_of_no_kind_are_refused(modality, changes, message):
    with pytest.raises(ValidationError, match=message):
        TypeAdapter(AnyModality).validate_python(modality.model_dump() | changes)
