"""Previews as text; `test_grids` has them as figures."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from mixed import MODALITIES, encode_words

from cmvae.visualize.previews import CrossModal

NAMES = ("photo", "caption", "habitat")
PHOTOS = np.zeros((2, 3, 8, 8), dtype=np.uint8)


def captions(*texts):
    return np.stack([encode_words(text.split()) for text in texts])


def test_all_that_is_read_in_words_stands_below_each_other():
    inputs = {"photo": PHOTOS, "caption": captions("a red bird", "a fish"), "habitat": np.array([0, 2])}
    generated = {(source, "photo"): PHOTOS for source in NAMES}
    generated |= {
        ("photo", "caption"): captions("a blue bird", "the fish"),
        ("caption", "caption"): captions("a red fish", "a bird"),
        ("habitat", "caption"): captions("a bird with wings", "a"),
        ("photo", "habitat"): np.array([1, 1]),
        ("caption", "habitat"): np.array([0, 1]),
        ("habitat", "habitat"): np.array([2, 0]),
    }
    present = {
        "photo": np.array([True, False]),
        "caption": np.array([True, True]),
        "habitat": np.array([True, False]),
    }
    modalities = {name: MODALITIES[name] for name in NAMES}
    text = CrossModal(inputs, generated, present, modalities).write()
    assert text is not None
    assert text.endswith("\n")
    assert text.splitlines()[1:] == [
        "",
        "sample 1",
        "  caption",
        "    real          a red bird",
        "    from photo    a blue bird",
        "    from caption  a red fish",
        "    from habitat  a bird with wings",
        "  habitat",
        "    real          shore",
        "    from photo    forest",
        "    from caption  shore",
        "    from habitat  field",
        "",
        "sample 2",
        "  caption",
        "    real          a fish",
        "    from caption  a bird",
        "  habitat",
        "    real          (missing)",
        "    from caption  forest",
    ]


def test_images_alone_are_not_written_down():
    modalities, present = {"photo": MODALITIES["photo"]}, {"photo": np.array([True, True])}
    generated = {("photo", "photo"): PHOTOS}
    assert CrossModal({"photo": PHOTOS}, generated, present, modalities).write() is None


def test_pyplot_is_not_touched() -> None:
    # pyplot keeps every figure alive and may look for a display.
    modules = "cmvae.visualize.comparisons, cmvae.visualize.previews"
    script = f"import sys, {modules}; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])
