"""Kinds: stored → bytes → stored, stored → data → stored, what people see, and what is refused."""

import io
import pickle

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from pydantic import ValidationError

from cmvae.data.index import ModalitySchema
from cmvae.modalities import KINDS
from cmvae.modalities.text import SPECIAL_TOKENS

IMAGE = ModalitySchema(kind="image", shape=(3, 4, 6), dtype="uint8")
GREY = ModalitySchema(kind="image", shape=(1, 4, 6), dtype="uint8")
TEXT = ModalitySchema(
    kind="text", shape=(5,), dtype="int64", categories=(*SPECIAL_TOKENS, "a", "red", "bird")
)
VECTOR = ModalitySchema(
    kind="vector",
    shape=(3,),
    dtype="float32",
    columns=("length", "width", "weight"),
    mean=(10.0, -2.0, 0.5),
    std=(4.0, 0.5, 1.0),
)
BINARY = ModalitySchema(kind="binary", shape=(3,), dtype="uint8", columns=("crest", "tail", "bill"))
CATEGORICAL = ModalitySchema(kind="categorical", shape=(), dtype="int64", categories=("cat", "dog", "owl"))

STORED = {
    "image": (IMAGE, np.random.default_rng(0).integers(0, 256, (2, 3, 4, 6), dtype=np.uint8)),
    "grey": (GREY, np.random.default_rng(1).integers(0, 256, (2, 1, 4, 6), dtype=np.uint8)),
    "text": (TEXT, np.array([[3, 4, 5, 1, 0], [5, 2, 4, 3, 1]])),
    "vector": (VECTOR, np.array([[14, -2.5, 0], [2, -1, 3]], dtype=np.float32)),
    "binary": (BINARY, np.array([[1, 0, 1], [0, 0, 0]], dtype=np.uint8)),
    "categorical": (CATEGORICAL, np.array([2, 0])),
}
EACH = pytest.mark.parametrize(("schema", "stored"), STORED.values(), ids=STORED)


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def to_data(schema, stored):
    return KINDS[schema.kind].to_data(torch.from_numpy(stored.copy()), schema)


def test_every_kind_is_tested():
    assert {schema.kind for schema, _ in STORED.values()} == KINDS.keys()


@EACH
def test_what_was_packed_is_read_back(schema, stored):
    kind = KINDS[schema.kind]
    for value in stored:
        again = kind.decode(kind.encode(value), schema)
        assert again.dtype == schema.dtype
        assert again.shape == schema.shape
        np.testing.assert_array_equal(again, value)


@EACH
def test_stored_to_data_and_back(schema, stored):
    kind = KINDS[schema.kind]
    data = to_data(schema, stored)
    assert data.shape == stored.shape
    again = kind.to_stored(data.numpy(), schema)
    assert again.dtype == schema.dtype
    np.testing.assert_allclose(again, stored, rtol=1e-6)


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
    assert KINDS["image"].to_stored(wild, GREY).flatten().tolist() == [0, 128, 255]
    assert KINDS["binary"].to_stored(np.array([[0.2, 0.5, 0.9]]), BINARY).tolist() == [[0, 0, 1]]


def test_what_people_read():
    def text(name, place=0):
        schema, stored = STORED[name]
        return KINDS[schema.kind].to_text(stored[place], schema)

    assert text("text") == "a red bird"
    assert text("text", 1) == "bird <unk> red a"
    assert text("vector") == "length: 14, width: -2.5, weight: 0"
    assert (text("binary"), text("binary", 1)) == ("crest, bill", "none")
    assert (text("categorical"), text("categorical", 1)) == ("owl", "cat")
    assert text("image") == "image of 4×6"


@EACH
def test_every_kind_draws_itself(schema, stored):
    figure = Figure()
    ax = figure.subplots()
    KINDS[schema.kind].draw(ax, stored[0], schema)
    assert [*ax.images, *ax.texts, *ax.patches]


class Malicious:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


@pytest.mark.parametrize("schema", [TEXT, VECTOR, BINARY, CATEGORICAL], ids=lambda schema: schema.kind)
def test_pickles_are_refused_unread(schema):
    kind = KINDS[schema.kind]
    objects = np.empty(schema.shape, dtype=object)
    objects[...] = Malicious()
    for content in (npy(objects, allow_pickle=True), pickle.dumps(Malicious())):
        with pytest.raises(ValueError, match="cannot be read as a NumPy array"):
            kind.decode(content, schema)


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
def test_what_is_not_of_the_schema_is_refused(name, content, message):
    schema, _ = STORED[name]
    with pytest.raises(ValueError, match=message):
        KINDS[schema.kind].decode(content, schema)


def test_an_archive_is_no_array():
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3, dtype=np.float32))
    with pytest.raises(ValueError, match="an archive of shape"):
        KINDS["vector"].decode(buffer.getvalue(), VECTOR)


@pytest.mark.parametrize(("mode", "size"), [("RGB", (4, 6)), ("L", (6, 4)), ("RGBA", (6, 4))])
def test_pictures_of_another_form_are_refused(mode, size):
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    with pytest.raises(ValueError, match=rf"a {mode} image of .*, its index says RGB of 4×6"):
        KINDS["image"].decode(buffer.getvalue(), IMAGE)


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 7, 5), (3, 65, 64), (1, 256, 256)])
def test_images_are_png_that_others_read(shape):
    """Small ones are written without a library, large ones by it."""
    schema = ModalitySchema(kind="image", shape=shape, dtype="uint8")
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    content = KINDS["image"].encode(pixels)
    with Image.open(io.BytesIO(content)) as image:
        image.verify()
    with Image.open(io.BytesIO(content)) as image:
        assert image.mode == ("L" if shape[0] == 1 else "RGB")
        np.testing.assert_array_equal(
            np.asarray(image).reshape(*shape[1:], shape[0]), pixels.transpose(1, 2, 0)
        )
    np.testing.assert_array_equal(KINDS["image"].decode(content, schema), pixels)


@pytest.mark.parametrize("level", [0, 9])
def test_png_of_others_is_read(level):
    """Level 0 has filters, but no compression: nearly the form in which small images are written here."""
    pixels = np.arange(72, dtype=np.uint8).reshape(3, 4, 6)
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG", compress_level=level)
    np.testing.assert_array_equal(KINDS["image"].decode(buffer.getvalue(), IMAGE), pixels)


def test_no_changed_byte_of_a_small_image_is_taken_for_a_pixel():
    schema, (pixels, _) = STORED["image"]
    content = KINDS["image"].encode(pixels)
    refused = 0
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 0x10
        try:
            decoded = KINDS["image"].decode(bytes(changed), schema)
        except ValueError:
            refused += 1
        else:  # what says nothing about the pixels
            np.testing.assert_array_equal(decoded, pixels)
    assert refused > len(content) - 25


def test_only_png_is_decoded():
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4)).save(buffer, "JPEG")
    with pytest.raises(ValueError, match="cannot be decoded as PNG"):
        KINDS["image"].decode(buffer.getvalue(), IMAGE)


@pytest.mark.parametrize(
    ("schema", "changes", "message"),
    [
        (IMAGE, {"shape": (2, 4, 6)}, "1 or 3 channels"),
        (IMAGE, {"dtype": "float32"}, "stored as uint8"),
        (IMAGE, {"kind": "sound"}, "kind 'sound' is none of image, text, vector"),
        (TEXT, {"shape": (5, 2)}, "is no .length,."),
        (TEXT, {"categories": ("a", "b", "c", "d")}, "begins with <pad>, <eos>, <unk>"),
        (TEXT, {"categories": (*SPECIAL_TOKENS, "a", "a")}, "a name is there twice"),
        (TEXT, {"categories": None}, "begins with <pad>"),
        (VECTOR, {"mean": None}, "mean and std"),
        (VECTOR, {"std": (1.0, 0.0, 1.0)}, "std above 0"),
        (VECTOR, {"std": (1.0, float("nan"), 1.0)}, "finite"),
        (VECTOR, {"columns": ("length",)}, "columns: must have one entry for each of the 3"),
        (BINARY, {"shape": ()}, "is no .dimensions,."),
        (BINARY, {"columns": ("crest",)}, "columns"),
        (CATEGORICAL, {"shape": (1,)}, "one category is a scalar"),
        (CATEGORICAL, {"categories": ("cat",)}, "at least two names"),
    ],
)
def test_schemas_that_no_kind_has_are_refused(schema, changes, message):
    with pytest.raises(ValidationError, match=message):
        ModalitySchema(**(schema.model_dump() | changes))
