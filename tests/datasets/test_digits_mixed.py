import numpy as np
import pytest
from sklearn.datasets import load_digits

from cmvae.datasets.digits import DigitsSource
from cmvae.datasets.digits_mixed import NUMBER_NAMES, STATISTICS, DigitsMixedSource, pixel_statistics

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def source():
    return DigitsMixedSource(seed=1, pairings=1, held_out_pairings=2)


def test_every_modality_says_the_same_digit(source):
    digits = load_digits()
    words = source.modalities["caption"].categories
    pictures = DigitsSource(seed=1, pairings=1, held_out_pairings=2)
    row_4 = STATISTICS.index("row_4")
    for split in SPLITS:
        for index in range(0, source.split_sizes[split], 31):
            sample = source.sample(split, index)
            assert list(sample.values) == list(source.modalities)
            said = {words[token] for token in sample.values["caption"].tolist()}
            assert said & set(NUMBER_NAMES) == {NUMBER_NAMES[sample.label]}
            assert "<unk>" not in said
            np.testing.assert_array_equal(sample.values["image"], pictures.sample(split, index).values["m0"])
            original = source.partners[split][1, index]
            assert digits.target[original] == sample.label
            assert sample.values["statistics"][row_4] == pytest.approx(digits.images[original][4].sum() / 16)


def test_no_original_is_in_two_splits_of_any_modality(source):
    used = {split: set(source.partners[split].ravel().tolist()) for split in SPLITS}
    assert not used["train"] & used["validation"]
    assert not used["train"] & used["test"]
    assert not used["validation"] & used["test"]


def test_sentences_vary_and_belong_to_their_sample(source):
    again = DigitsMixedSource(seed=1, pairings=1, held_out_pairings=2)
    captions = [source.sample("train", index).values["caption"] for index in range(200)]
    assert len({tuple(caption.tolist()) for caption in captions}) > 60
    np.testing.assert_array_equal(again.sample("train", 150).values["caption"], captions[150])
    # The longest sentence has eight words, and every one ends.
    assert max(caption.tolist().index(1) for caption in captions) == 8


def test_statistics_of_a_known_picture():
    image = np.zeros((1, 8, 8))
    image[0, 1, 2] = image[0, 3, 6] = 16
    found = dict(zip(STATISTICS, pixel_statistics(image)[0].tolist(), strict=True))
    expected = {
        "ink": 2 / 64, "mean_row": 2, "mean_column": 4, "spread_rows": 1, "spread_columns": 4, "slant": 2,
        "row_1": 1, "row_3": 1, "row_0": 0, "column_2": 1, "column_6": 1, "column_7": 0,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == pytest.approx(expected)
