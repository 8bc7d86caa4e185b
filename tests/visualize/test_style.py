"""Names in the data are drawn as they are, and figures of any size can be drawn."""

import logging

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from cmvae.modalities import CategoricalModality, TextModality
from cmvae.visualize import grids, plots
from cmvae.visualize.style import Figure

MARKUP = ["$", "$$", "$$$", "$x", "$\\frac{$", "a_b^c$_$", "%&#", "\\$", "<b>", "{}", "\n", ""]


def pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())


@pytest.mark.parametrize("tex", [False, True])
def test_markup_is_plain_text_in_every_figure(tex):
    import matplotlib as mpl

    with mpl.rc_context({"text.usetex": tex}):
        modality = CategoricalModality(categories=MARKUP)
        stored = np.arange(len(MARKUP))[:, None]
        pixels(grids.sample_rows({"$a$": stored}, MARKUP, modalities={"$a$": modality}))
        values = {"$": stored[:, 0]}
        pixels(grids.cross_modal_grid(values, {("$", "$"): stored[:, 0]}, modalities={"$": modality}))
        pixels(plots.confusion_matrix(np.eye(len(MARKUP), dtype=int), MARKUP, np.arange(len(MARKUP))))
        pixels(plots.coherence_matrix(np.eye(2), ["$$", "$"], ["$_$", "$$$"]))


def test_a_dollar_is_drawn_as_a_dollar():
    """`$x$` would be drawn as an italic x."""

    def draw(text, **settings):
        figure = Figure(figsize=(1, 1))
        figure.text(0.1, 0.5, text, **settings)
        return pixels(figure)

    assert (draw("$x$") == draw("$x$", parse_math=False)).all()
    assert (draw("$x$") != draw("x")).any()
    assert (draw("$x$") != draw("$y$")).any()


def test_names_and_texts_of_any_length_are_drawn():
    names = ["x" * 1600, "y" * 1600, "z"]
    modality = CategoricalModality(categories=names)
    text = TextModality(shape=(2048,), categories=("<pad>", "<eos>", "<unk>", "word" * 10))
    values = {"a": np.array([[0, 1], [2, 0]]), "b": np.full((2, 2, 2048), 3)}
    figure = grids.sample_rows(values, names[:2], modalities={"a": modality, "b": text})
    assert max(pixels(figure).shape) < 10_000


def test_the_confusion_of_more_than_a_thousand_classes_is_drawn():
    counts = np.eye(1500, 30, dtype=int)
    figure = plots.confusion_matrix(counts, [f"class {n}" for n in range(1500)], np.arange(30))
    assert max(pixels(figure).shape) <= 16_384
    (image,) = figure.axes[0].images
    assert image.get_array().shape == (1500, 30)


def test_samples_without_a_label_are_not_drawn_among_the_classes():
    points, labels = np.random.default_rng(0).normal(size=(9, 2)), np.array([0, 1, -1] * 3)
    figure = plots.latent_map(points, np.arange(9) % 2, labels)
    _, classes = figure.axes
    assert sum(len(part.get_offsets()) for part in classes.collections) == 6
    assert {text.get_text() for text in classes.texts} == {"0", "1"}


def test_missing_glyphs_are_one_warning(caplog, recwarn):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            figure = Figure(figsize=(1, 1))
            figure.text(0.1, 0.5, "\U0001f9ff\u1803 and \U00012000")
            pixels(figure)
    assert len([r for r in caplog.records if "no installed font" in r.message]) <= 1
    assert not [warning for warning in recwarn if "missing from" in str(warning.message)]
