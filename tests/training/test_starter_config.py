from pathlib import Path

import pytest

from cmvae.config import CMVAEExperiment, check_against_shards, load_config
from cmvae.data.index import ShardIndex, ShardSchema, SplitSchema
from cmvae.modalities import BinaryModality, CategoricalModality, ImageModality, TextModality, VectorModality
from cmvae.training.starter_config import likelihood_weight, write_starter_config

MODALITIES = {
    "photo": ImageModality(shape=(3, 64, 64)),
    "caption": TextModality(shape=(12,), categories=("<pad>", "<eos>", "<unk>", "bird")),
    "size": VectorModality(shape=(2,), mean=(0, 0), std=(1, 1)),
    "colour": CategoricalModality(categories=("red", "blue")),
    "answers": BinaryModality(shape=(30,), columns=None),
}


def make_index(num_train: int, class_names: tuple[str, ...] | None, name: str = "birds") -> ShardIndex:
    def split(number: int) -> SplitSchema:
        shard = ShardSchema(name="a.tar", num_samples=number, num_bytes=1, sha256="0" * 64)
        return SplitSchema(num_samples=number, shards=(shard,))

    return ShardIndex(
        name=name,
        source={},
        modalities=MODALITIES,
        class_names=class_names,
        splits={"train": split(num_train), "test": split(5)},
    )


@pytest.mark.parametrize("num_train", [1, 40, 500, 20_000, 10_000_000])
@pytest.mark.parametrize("shards", ["shards/birds", "/data/it's: a #1 {place}"])
def test_the_config_is_one_and_fits_the_shards(tmp_path, num_train, shards):
    index = make_index(num_train, ("finch", "owl", "wren"), name="my birds, 2024")
    path = tmp_path / "birds.yaml"
    path.write_text(write_starter_config(index, Path(shards)), encoding="utf-8")
    config = load_config(path)
    assert isinstance(config, CMVAEExperiment)
    check_against_shards(config, index, str(path))
    assert config.name == "my_birds_2024"
    assert config.data.shards == shards
    assert list(config.model.modalities) == list(MODALITIES)
    # The number of labels is what the model has to find: it is not asked.
    assert config.model.num_clusters == 20
    assert config.train.batch_size <= num_train
    assert config.train.max_steps % config.train.validate_every == 0


def test_without_labels_there_are_twenty_clusters(tmp_path):
    (tmp_path / "c.yaml").write_text(write_starter_config(make_index(100, None), Path("s")), encoding="utf-8")
    config = load_config(tmp_path / "c.yaml")
    assert isinstance(config, CMVAEExperiment)
    assert config.model.num_clusters == 20


def test_a_modality_weighs_less_the_more_elements_it_has():
    like_digits = ImageModality(shape=(3, 16, 16))
    assert likelihood_weight(like_digits) == pytest.approx(1, abs=0.05)
    # In the published settings 3·64·64 pixels weigh 1/26 of a caption of 32 words, at comparable scales.
    captions = MODALITIES["caption"].model_copy(update={"shape": (32,)})
    assert 1 / 60 < likelihood_weight(MODALITIES["photo"]) / likelihood_weight(captions) < 1 / 15
    assert likelihood_weight(MODALITIES["size"]) == likelihood_weight(MODALITIES["colour"]) == 50


def test_only_images_are_worth_another_precision(tmp_path):
    index = make_index(100, None)
    without = {name: modality for name, modality in MODALITIES.items() if name != "photo"}
    for modalities, precision in ((MODALITIES, "auto"), (without, "fp32")):
        text = write_starter_config(index.model_copy(update={"modalities": modalities}), Path("s"))
        (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
        assert load_config(tmp_path / "c.yaml").train.mixed_precision == precision


@pytest.mark.parametrize(
    "name",
    ["2024", "2024-05-01", "2024-99-99", "on", "no", "null", "1e3", "0x10", "1_000", "true", "y", "n"],
)
def test_names_that_yaml_reads_as_something_else_stay_names(tmp_path, name):
    index = make_index(100, None, name=name)
    modalities = dict.fromkeys(("no", "on", "y", "null", "true", "e"), MODALITIES["photo"])
    index = index.model_copy(update={"modalities": modalities})
    (tmp_path / "c.yaml").write_text(write_starter_config(index, Path("s")), encoding="utf-8")
    config = load_config(tmp_path / "c.yaml")
    assert config.name == name
    assert list(config.model.modalities) == list(modalities)
    assert set(config.objective.alignment.augment) == set(modalities)
