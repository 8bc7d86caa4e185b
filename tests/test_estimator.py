"""`MultimodalClusterer` on data whose clusters are known, and by scikit-learn's own checks."""

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pretrained import save_torchvision
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.estimator_checks import parametrize_with_checks

from cmvae import MultimodalClusterer
from cmvae.config import load_run_table

TINY = {
    "train.max_steps": 4,
    "train.batch_size": 8,
    "model.num_clusters": 4,
    "model.shared_dim": 4,
    "model.private_dim": 2,
}
WORDS = ("red apple on a table", "green pear in the grass", "blue plum under a tree")
COLOURS = ("red", "green", "blue")


@parametrize_with_checks([MultimodalClusterer(num_clusters=3, verbose=False, settings=TINY)])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def make_data(num_samples, seed, image_folder=None):
    """Three classes in five modalities, and the class of each sample."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(3, size=num_samples)
    sizes = pd.DataFrame(
        {
            "w": 100 + 20 * classes + rng.normal(size=num_samples),
            "h": 5 - classes + rng.normal(size=num_samples) / 9,
        }
    )
    photos = np.zeros((num_samples, 8, 8, 3), dtype=np.uint8)
    photos[np.arange(num_samples), :, :, classes] = 200
    photos += rng.integers(20, size=photos.shape, dtype=np.uint8)
    return {
        "sizes": sizes,
        "photo": photos,
        "caption": [WORDS[c] for c in classes],
        "colour": pd.Series([COLOURS[c] for c in classes]),
        "flags": pd.DataFrame({"a": classes == 0, "b": classes == 1}),
    }, classes


@pytest.fixture(scope="module")
def fitted():
    data, classes = make_data(180, seed=0)
    data["caption"][3] = None
    data["sizes"].loc[5, "w"] = np.nan
    kinds = {"caption": "text"}
    settings = {"train.max_steps": 150, "model.modalities.photo.width": 8, "model.num_clusters": 6}
    estimator = MultimodalClusterer(3, kinds=kinds, verbose=False, settings=settings)
    return estimator.fit(data), data, classes


def test_the_number_of_clusters_is_found():
    rng = np.random.default_rng(0)
    classes = np.arange(240) % 4
    views = {
        name: rng.normal(scale=4, size=(4, 3))[classes] + rng.normal(scale=0.3, size=(240, 3))
        for name in "ab"
    }
    estimator = MultimodalClusterer(verbose=False, settings={"train.max_steps": 200}).fit(views)
    assert estimator.num_clusters_ == 4
    assert adjusted_rand_score(classes, estimator.labels_) > 0.95


def test_the_classes_are_found(fitted):
    estimator, _, classes = fitted
    assert estimator.num_clusters_ == 3
    assert set(estimator.labels_) == {0, 1, 2}
    assert adjusted_rand_score(classes, estimator.labels_) > 0.95
    kinds = {name: modality.kind for name, modality in estimator.model_.modalities.items()}
    assert kinds == {
        "sizes": "vector",
        "photo": "image",
        "caption": "text",
        "colour": "categorical",
        "flags": "binary",
    }


def test_new_samples_are_assigned_from_whatever_they_have(fitted):
    estimator, *_ = fitted
    new, classes = make_data(60, seed=1)
    everything = estimator.predict(new)
    assert adjusted_rand_score(classes, everything) > 0.95
    for name in ("sizes", "photo", "caption"):
        assert adjusted_rand_score(classes, estimator.predict({name: new[name]})) > 0.9, name
    probabilities = estimator.predict_proba(new)
    assert (probabilities.argmax(axis=1) == everything).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    new["sizes"].loc[7] = np.nan
    alone = estimator.predict({"sizes": new["sizes"]})
    assert alone[7] == -1
    both = estimator.predict_with_proba({"sizes": new["sizes"]})
    np.testing.assert_array_equal(both[0], alone)
    np.testing.assert_array_equal(both[1], estimator.predict_proba({"sizes": new["sizes"]}))
    assert np.isnan(estimator.transform({"sizes": new["sizes"]})[7]).all()


def test_vectors_are_standardised_by_the_training_data(fitted):
    estimator, *_ = fitted
    new, classes = make_data(60, seed=2)
    of_one_class = new["sizes"][classes == 2]
    assert len(set(estimator.predict({"sizes": of_one_class}))) == 1


def test_samples_are_in_the_form_of_the_data(fitted):
    estimator, data, classes = fitted
    cluster = estimator.labels_[0]
    made = estimator.sample(40, cluster=cluster)
    assert made["photo"].shape == (40, 3, 8, 8)
    assert made["photo"].dtype == np.uint8
    assert made["flags"].shape == (40, 2)
    colours = [COLOURS.index(colour) for colour in made["colour"]]
    assert np.mean(np.array(colours) == classes[0]) > 0.9
    expected = data["sizes"]["w"][classes == classes[0]].mean()
    assert abs(made["sizes"][:, 0].mean() - expected) < 8
    again = estimator.sample(40, cluster=cluster)
    np.testing.assert_array_equal(again["photo"], made["photo"])
    with pytest.raises(ValueError, match="cluster 3: there are clusters 0 to 2"):
        estimator.sample(1, cluster=3)


def test_imputing_keeps_what_is_there_and_fills_the_rest(fitted):
    estimator, *_ = fitted
    new, classes = make_data(30, seed=3)
    sizes = new["sizes"].copy()
    sizes.loc[4] = np.nan
    filled = estimator.impute({"photo": new["photo"], "sizes": sizes})
    np.testing.assert_array_equal(filled["photo"], new["photo"].transpose(0, 3, 1, 2))
    kept = np.arange(30) != 4
    np.testing.assert_allclose(filled["sizes"][kept], new["sizes"][kept], rtol=1e-4)
    assert abs(filled["sizes"][4, 0] - (100 + 20 * classes[4])) < 15
    assert np.mean([COLOURS.index(c) for c in filled["colour"]] == classes) > 0.8


def test_score_is_higher_for_data_like_that_of_the_training(fitted):
    estimator, *_ = fitted
    new, _ = make_data(60, seed=4)
    usual = estimator.score(new)
    assert estimator.score(new) == usual
    new["caption"] = new["caption"][::-1]
    new["photo"] = 255 - new["photo"]
    assert estimator.score(new) < usual
    with pytest.raises(ValueError, match="score needs all modalities"):
        estimator.score({"photo": new["photo"]})


def test_a_saved_estimator_gives_the_same_answers(fitted, tmp_path):
    estimator, data, _ = fitted
    estimator.save_pretrained(tmp_path / "birds")
    loaded = MultimodalClusterer.from_pretrained(tmp_path / "birds")
    np.testing.assert_array_equal(loaded.predict(data), estimator.labels_)
    assert loaded.config_ == estimator.config_
    other = MultimodalClusterer.from_pretrained(tmp_path / "birds", num_clusters=5)
    assert other.num_clusters_ == 5
    assert not [path for path in (tmp_path / "birds").rglob("*") if path.suffix in (".pkl", ".pt", ".bin")]
    with pytest.raises(ValueError, match=r"clusterer.json: cannot be read"):
        MultimodalClusterer.from_pretrained(tmp_path)


def test_columns_of_one_frame_and_files_of_images(tmp_path):
    data, _ = make_data(40, seed=5)
    paths = []
    for row, photo in enumerate(data["photo"]):
        Image.fromarray(photo).save(tmp_path / f"{row}.png")
        paths.append(str(tmp_path / f"{row}.png"))
    paths[2] = None
    frame = data["sizes"].assign(photo=paths, colour=data["colour"])
    columns = {"sizes": ["w", "h"], "photo": "photo", "colour": "colour"}
    settings = TINY | {"model.modalities.photo.width": 4}
    estimator = MultimodalClusterer(
        2, columns=columns, image_size=8, verbose=False, settings=settings, run_dir=tmp_path / "mine"
    )
    labels = estimator.fit_predict(frame)
    read_as = load_run_table(tmp_path / "mine/run").columns
    assert read_as == {"sizes": ("w", "h"), "photo": ("photo",), "colour": ("colour",)}
    assert labels.shape == (40,)
    assert estimator.model_.modalities["photo"].shape == (3, 8, 8)
    # A column that is not there is a missing modality.
    assert estimator.predict(frame.drop(columns="photo")).shape == (40,)
    strange = frame.assign(colour="mauve")
    with pytest.warns(UserWarning, match="colour: 40 of 40 categories are unknown .* for example 'mauve'"):
        assert estimator.predict(strange).shape == (40,)


def test_features_are_computed_from_the_images_of_new_data(tmp_path):
    data, _ = make_data(24, seed=0)
    photos = {"photo": data["photo"]}
    embed = {"photo": save_torchvision(tmp_path / "weights.safetensors")}
    estimator = MultimodalClusterer(2, embed=embed, verbose=False, settings=TINY).fit(photos)
    assert list(estimator.model_.modalities) == ["photo", "photo_features"]
    # Both modalities of a sample agree on where it is: the features reach the model.
    without = estimator.transform({"photo": [None] * 24, "photo_features": np.zeros((24, 512))})
    assert not np.allclose(estimator.transform(photos), without)
    estimator.save_pretrained(tmp_path / "saved")
    loaded = MultimodalClusterer.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.predict(photos), estimator.labels_)
    with pytest.raises(ValueError, match="embed: 'photo=resnet': write MODALITY=LIBRARY:NETWORK"):
        MultimodalClusterer(embed={"photo": "resnet"}, verbose=False).fit(photos)


def test_a_training_leaves_the_random_state_of_the_caller(fitted):
    torch.manual_seed(3)
    np.random.seed(3)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(3)
    np.random.seed(3)
    points = np.random.default_rng(0).normal(size=(20, 2))
    MultimodalClusterer(2, verbose=False, settings=TINY).fit(points)
    assert (torch.rand(1), np.random.rand()) == expected


@pytest.mark.parametrize(
    ("data", "parameters", "message"),
    [
        ({}, {}, "there is no modality"),
        ({"label": np.zeros((9, 2))}, {}, "modality name 'label' must be"),
        ({"two words": np.zeros((9, 2))}, {}, "modality name 'two words' must be"),
        ({"a": [1.0, 2.0], "b": [1.0]}, {}, "different numbers of samples"),
        ({"a": [[1.0, np.inf]] * 9}, {}, "a: holds inf, which is out of the range"),
        ({"a": [[1.0, 1e39]] * 9}, {}, r"a: holds 1e\+39, which is out of the range"),
        ({"a": [["x", 1.0]] * 9}, {}, "a: not all values are numbers"),
        ({"a": np.zeros((9, 2))}, {"kinds": {"b": "text"}}, "kinds: no modality 'b'"),
        ({"a": np.zeros((9, 2))}, {"kinds": {"a": "sound"}}, "'sound' is none of"),
        ({"a": np.full((9, 2), 2.0)}, {"kinds": {"a": "binary"}}, "must be 0 or 1"),
        ({"a": ["x"] * 9}, {}, "a: has a single value"),
        ({"a": np.zeros((9, 2))}, {"settings": {"train.steps": 3}}, "train.steps: no such key"),
        ({"a": [None, "b.png"] * 9}, {}, "b.png: no such file"),
        ({"a": np.full((9, 8, 8), 2.0)}, {}, "Give uint8, or floating point"),
    ],
)
def test_mistakes_are_value_errors_that_say_what_to_do(data, parameters, message):
    with pytest.raises(ValueError, match=message):
        MultimodalClusterer(verbose=False, **parameters).fit(data)
