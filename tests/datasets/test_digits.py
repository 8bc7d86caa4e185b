import colorsys

import numpy as np
import pytest
from sklearn.datasets import load_digits

from cmvae.datasets.digits import DigitsSource

SPLITS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def source():
    return DigitsSource(seed=1, pairings=1, held_out_pairings=3)


@pytest.fixture(scope="module")
def originals():
    digits = load_digits()
    return np.kron(digits.images >= 8, np.ones((1, 2, 2), dtype=bool)), digits.target


def test_splits_have_the_promised_sizes(source):
    assert source.split_sizes["train"] == 1500
    assert source.split_sizes["validation"] + source.split_sizes["test"] == 3 * 297
    assert abs(source.split_sizes["validation"] - source.split_sizes["test"]) <= 3


def test_no_underlying_image_is_in_two_splits_of_any_modality(source):
    used = {split: set(source.partners[split].ravel().tolist()) for split in SPLITS}
    assert not used["train"] & used["validation"]
    assert not used["train"] & used["test"]
    assert not used["validation"] & used["test"]
    assert set.union(*used.values()) == set(range(1797))


def test_classes_are_spread_evenly_over_the_splits(source, originals):
    _, labels = originals
    share = np.bincount(labels) / len(labels)
    for split in SPLITS:
        images = np.unique(source.partners[split])
        assert np.abs(np.bincount(labels[images]) - share * len(images)).max() <= 1


def test_every_image_is_used_once_a_pairing_in_every_modality(source):
    for split, pairings in zip(SPLITS, (1, 3, 3), strict=True):
        for modality in source.partners[split]:
            _, counts = np.unique(modality, return_counts=True)
            assert set(counts.tolist()) == {pairings}


def test_partners_share_their_class_and_nothing_else(source, originals):
    _, labels = originals
    for split in SPLITS:
        partners = source.partners[split]
        assert (labels[partners] == labels[partners[0]]).all()
        assert (partners[0] == partners[1]).mean() < 0.3
    assert (source.partners["train"][1] == source.partners["train"][2]).mean() < 0.05
    first, second, _ = np.split(source.partners["test"], 3, axis=1)
    assert (first[0] != second[0]).any() or (first[1] != second[1]).any()


def test_images_are_the_digits_of_their_labels(source, originals):
    masks, labels = originals
    for split in SPLITS:
        for index in range(0, source.split_sizes[split], 37):
            sample = source.sample(split, index)
            for modality, image in enumerate(sample.values.values()):
                assert image.shape == (3, 16, 16)
                assert image.dtype == np.uint8
                underlying = source.partners[split][modality, index]
                assert labels[underlying] == sample.label
                # Backgrounds are dark, so that what is bright in all is the inverted part.
                np.testing.assert_array_equal(image.max(0) > 128, masks[underlying])


def test_modalities_have_hues_of_their_own(source):
    hues: dict[str, set[float]] = {"m0": set(), "m1": set(), "m2": set()}
    for index in range(200):
        for name, image in source.sample("train", index).values.items():
            background = image[:, image.max(0) <= 128]
            # One colour and slight noise.
            assert background.std(1).max() < 8
            hue = colorsys.rgb_to_hsv(*(background.mean(1) / 255))[0]
            hues[name].add(round(hue, 1) % 1)
    assert not hues["m0"] & hues["m1"]
    assert not hues["m1"] & hues["m2"]
    assert not hues["m0"] & hues["m2"]
    assert all(len(found) >= 3 for found in hues.values())


def test_there_may_be_more_modalities_each_with_hues_of_its_own(originals):
    masks, labels = originals
    source = DigitsSource(seed=1, pairings=1, num_modalities=5)
    assert list(source.modalities) == ["m0", "m1", "m2", "m3", "m4"]
    hues: list[list[float]] = [[] for _ in range(5)]
    for index in range(100):
        sample = source.sample("train", index)
        for modality, image in enumerate(sample.values.values()):
            underlying = source.partners["train"][modality, index]
            assert labels[underlying] == sample.label
            background = image[:, ~masks[underlying]]
            hue = colorsys.rgb_to_hsv(*(background.mean(1) / 255))[0]
            hues[modality].append((hue + 0.05) % 1)  # where the circle is cut, no colour is
    # A fifth of the colour circle each; the noise's mean over a background turns a hue by less than 0.01.
    assert [min(found) for found in hues] == pytest.approx([0.05, 0.25, 0.45, 0.65, 0.85], abs=0.01)
    assert all(0.1 < max(found) - min(found) < 0.17 for found in hues)


def test_a_sample_depends_on_seed_split_and_index_alone(source):
    again = DigitsSource(seed=1, pairings=1, held_out_pairings=3)
    other = DigitsSource(seed=2)
    again.sample("test", 0)
    for index in (5, 700):
        expected = source.sample("train", index)
        found = again.sample("train", index)
        assert found.label == expected.label
        for name, image in expected.values.items():
            np.testing.assert_array_equal(found.values[name], image)
        assert any(
            (other.sample("train", index).values[name] != image).any()
            for name, image in expected.values.items()
        )


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_modalities_are_missing_as_often_as_asked_and_never_all(source, share):
    sparse = DigitsSource(seed=1, pairings=1, held_out_pairings=3, missing=share)
    for split in ("train", "validation"):
        held = np.array(
            [
                [name in sparse.sample(split, index).values for name in sparse.modalities]
                for index in range(sparse.split_sizes[split])
            ]
        )
        assert held.any(axis=1).all()
        # One comes back where all were drawn: share³ of the samples, evenly over the three.
        error = 4 * np.sqrt(share * (1 - share) / len(held))
        assert np.abs(1 - held.mean(axis=0) - (share - share**3 / 3)).max() < error
        kept = sparse.sample(split, 7).values
        for name, image in kept.items():
            np.testing.assert_array_equal(image, source.sample(split, 7).values[name])
    assert all(len(sparse.sample("test", index).values) == 3 for index in range(100))
    assert all(modality.optional for modality in sparse.modalities.values())
    assert not any(modality.optional for modality in source.modalities.values())


def test_more_missing_leaves_out_the_same_and_more():
    few, many = (DigitsSource(pairings=1, missing=share) for share in (0.3, 0.6))
    for index in range(200):
        kept = few.sample("train", index).values.keys()
        assert many.sample("train", index).values.keys() <= kept
