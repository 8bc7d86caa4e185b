from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from mixed import MODALITIES, Mixed

from cmvae.modalities import ImageModality, Modality, TextModality
from cmvae.modalities.text import SPECIAL_TOKENS
from cmvae.visualize.grids import cross_modal_grid, sample_rows


def drawn_images(figure: Figure) -> list[np.ndarray]:
    figure.canvas.draw()
    return [np.asarray(ax.images[0].get_array()) for ax in figure.axes]


def image_modalities(names: Sequence[str], shape: tuple[int, ...]) -> dict[str, Modality]:
    return dict.fromkeys(names, ImageModality(shape=shape))


@pytest.mark.parametrize(("num_modalities", "channels", "size"), [(3, 3, 16), (5, 3, 28), (2, 1, 28)])
def test_cross_modal_grid_puts_each_pair_in_its_place(num_modalities: int, channels: int, size: int) -> None:
    names = [f"m{m}" for m in range(num_modalities)]
    shape = (4, channels, size, size)
    inputs = {name: np.full(shape, 100 + m, dtype=np.uint8) for m, name in enumerate(names)}
    generated = {
        (source, target): np.full(shape, i * num_modalities + j, dtype=np.uint8)
        for i, source in enumerate(names)
        for j, target in enumerate(names)
    }
    figure = cross_modal_grid(inputs, generated, modalities=image_modalities(names, shape[1:]))
    rows = iter(drawn_images(figure))
    # Axes run row by row: first the inputs, then one row a source.
    for name in names:
        assert next(rows)[1, 1, 0] == inputs[name].flat[0]
    for source in names:
        for target in names:
            drawn = next(rows)
            assert drawn.shape == (size + 2, 4 * (size + 1) + 1, 3)
            assert drawn[size, size, 0] == generated[source, target].flat[0]


def test_images_keep_their_orientation_and_lie_a_white_pixel_apart() -> None:
    image = np.zeros((2, 3, 4, 6), dtype=np.uint8)
    image[0, 0, 0, :] = 250
    image[0, 1, 3, 2] = 60
    figure = cross_modal_grid(
        {"m0": image}, {("m0", "m0"): image}, modalities=image_modalities(["m0"], (3, 4, 6))
    )
    drawn, _ = drawn_images(figure)
    assert drawn[1, 1:7, 0].tolist() == [250] * 6
    assert drawn[4, 3].tolist() == [0, 60, 0]
    for line in (0, 5):
        assert (drawn[line] == 255).all()
    for line in (0, 7, 14):
        assert (drawn[:, line] == 255).all()


def test_what_a_sample_lacks_and_what_would_come_from_it_stays_white() -> None:
    names = ["m0", "m1"]
    black = np.zeros((2, 1, 8, 8), dtype=np.uint8)
    figure = cross_modal_grid(
        dict.fromkeys(names, black),
        {(source, target): black for source in names for target in names},
        modalities=image_modalities(names, (1, 8, 8)),
        present={"m0": np.array([True, False]), "m1": np.array([True, True])},
    )
    shown = [
        [bool((drawn[1:9, 1 + 9 * n : 9 + 9 * n] == 0).all()) for n in range(2)]
        for drawn in drawn_images(figure)
    ]
    first, both = [True, False], [True, True]
    # Inputs; from m0; from m1, which can make the missing m0.
    assert shown == [first, both, first, first, both, both]


def cells(ax: Axes) -> list[Axes]:
    return list(ax.child_axes)


def test_every_kind_is_drawn_as_it_draws_itself() -> None:
    source = Mixed()
    samples = [source.sample("test", index).values for index in range(3)]
    values = {name: np.stack([sample[name] for sample in samples]) for name in MODALITIES}
    present = {name: np.ones(3, dtype=bool) for name in MODALITIES}
    present["caption"] = np.array([True, False, True])
    figure = cross_modal_grid(
        values,
        {(a, b): values[b] for a in MODALITIES for b in MODALITIES},
        {(a, "photo"): values["photo"] for a in MODALITIES},
        modalities=MODALITIES,
        present=present,
    )
    figure.canvas.draw()
    rows = [figure.axes[start : start + 5] for start in range(0, len(figure.axes), 5)]
    # The inputs, then two rows a source.
    assert len(rows) == 11
    photo, caption, sizes, marks, habitat = rows[0]
    assert photo.images
    assert not cells(photo)
    texts = [cell.texts[0].get_text().split() for cell in cells(caption)]
    assert texts == [MODALITIES["caption"].describe(values["caption"][n]).split() for n in (0, 2)]
    assert [len(cell.patches) for cell in cells(sizes)] == [2, 2, 2]
    assert [cell.images[0].get_array().tolist() for cell in cells(marks)] == values["marks"][:, None].tolist()
    assert [cell.texts[0].get_text() for cell in cells(habitat)] == ["shore", "forest", "field"]
    # From the caption, which the second sample lacks; and below it the refined photographs only.
    assert [len(cells(ax)) for ax in rows[3]] == [0, 2, 2, 2, 2]
    assert [len(cells(ax)) + len(ax.images) for ax in rows[4]] == [1, 0, 0, 0, 0]


def test_drawn_text_stays_in_its_cell() -> None:
    """Measured by the renderer: as many usual words as there is room for in the shards."""
    vocabulary = (*SPECIAL_TOKENS, *(f"{letter}" * size for letter in "abcdefgh" for size in (1, 3, 4, 6, 8)))
    for length in (2, 16, 32):
        modality = TextModality(shape=(length,), categories=vocabulary)
        rng = np.random.default_rng(length)
        values = rng.integers(3, len(vocabulary), size=(2, 3, length))
        figure = sample_rows({"caption": values}, ["one", "two"], modalities={"caption": modality})
        figure.canvas.draw()
        for cell in cells(figure.axes[0]):
            box, drawn = cell.get_window_extent(), cell.texts[0].get_window_extent()
            assert drawn.height <= 1.1 * box.height
            assert drawn.width <= 1.15 * box.width


def test_rows_of_images_and_text_are_level() -> None:
    source = Mixed()
    samples = [source.sample("test", index).values for index in range(8)]
    values = {
        name: np.stack([sample[name] for sample in samples]).reshape(4, 2, *MODALITIES[name].shape)
        for name in ("photo", "caption")
    }
    figure = sample_rows(values, list("abcd"), modalities=MODALITIES)
    figure.canvas.draw()
    photo, caption = (ax.get_window_extent() for ax in figure.axes)
    assert photo.y0 == pytest.approx(caption.y0, abs=3)
    assert photo.y1 == pytest.approx(caption.y1, abs=3)


def test_sample_rows_keep_samples_and_titles_in_their_rows() -> None:
    images = (10 * np.arange(6).reshape(3, 2, 1, 1, 1) * np.ones((3, 2, 3, 8, 8))).astype(np.uint8)
    present = np.ones((3, 2), dtype=bool)
    present[2, 1] = False
    figure = sample_rows(
        {"m0": images, "m1": 200 - images},
        ["cluster 4", "cluster 7", "cluster 9"],
        modalities=image_modalities(["m0", "m1"], (3, 8, 8)),
        present={"m0": present, "m1": np.ones_like(present)},
    )
    first, second = drawn_images(figure)
    assert first[1::9, 1::9, 0][:3, :2].tolist() == [[0, 10], [20, 30], [40, 255]]
    assert second[1::9, 1::9, 0][:3, :2].tolist() == [[200, 190], [180, 170], [160, 150]]
    labels = figure.axes[0].get_yticklabels()
    assert [label.get_text() for label in labels] == ["cluster 4", "cluster 7", "cluster 9"]
    # Each title beside the middle of its row.
    assert [label.get_position()[1] for label in labels] == pytest.approx([4.5, 13.5, 22.5], abs=0.5)
