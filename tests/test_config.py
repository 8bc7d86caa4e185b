"""Settings: every shipped file fits, every mistake is named with file, key and remedy."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cmvae.config import (
    RefinerExperiment,
    check_against_shards,
    dump_yaml,
    flatten,
    load_cmvae_run,
    load_config,
    read_modalities,
    save_config,
)
from cmvae.data.index import ShardIndex, ShardSchema, SplitSchema
from cmvae.modalities import ImageModality, TextModality
from cmvae.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "configs/digits.yaml"
REFINER = ROOT / "configs/digits_refiner.yaml"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_experiment_loads_under_its_own_name(path):
    assert load_config(path).name == path.stem


def test_polymnist_has_the_published_settings():
    config = load_config(ROOT / "configs/polymnist.yaml")
    model, modalities = config.model, config.model.modalities
    assert (model.private_dim, model.shared_dim, model.num_clusters, model.family) == (32, 32, 40, "laplace")
    assert (config.objective.name, config.objective.num_samples, config.objective.beta) == ("iwae", 1, 2.5)
    assert (config.train.epochs, config.train.batch_size) == (250, 128)
    assert (config.optimizer.learning_rate, config.optimizer.amsgrad) == (1e-3, True)
    assert list(modalities) == ["m0", "m1", "m2", "m3", "m4"]
    for modality in modalities.values():
        assert (modality.width, modality.likelihood.family, modality.likelihood.scale) == (
            64,
            "laplace",
            0.75,
        )


def test_overrides_change_one_key_and_share_no_anchor():
    config = load_config(
        DIGITS, ["train.batch_size=32", "model.modalities.m0.width=4", "tracking.enabled=false"]
    )
    assert config.train.batch_size == 32
    assert not config.tracking.enabled
    # m0 to m2 are one YAML anchor; only m0 may change.
    assert [modality.width for modality in config.model.modalities.values()] == [4, 64, 64]


def test_a_saved_config_reads_back_equal(tmp_path):
    config = load_config(DIGITS, ["seed=3", "optimizer.max_grad_norm=5"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert yaml.safe_load(dump_yaml(config))["seed"] == 3


def test_ranks_share_a_global_batch_evenly_or_not_at_all():
    train = load_config(ROOT / "configs/digits.yaml", ["train.global_batch_size=24"]).train
    assert [train.batch_size_per_rank(ranks) for ranks in (1, 2, 3, 24)] == [24, 12, 8, 1]
    with pytest.raises(UserError, match=r"train\.global_batch_size: 24 .* by 5 ranks"):
        train.batch_size_per_rank(5)
    per_rank = load_config(ROOT / "configs/digits.yaml").train
    assert {per_rank.batch_size_per_rank(ranks) for ranks in (1, 5)} == {per_rank.batch_size}


def test_flat_settings_have_dotted_keys():
    flat = flatten(load_config(DIGITS))
    assert flat["model.modalities.m0.likelihood.scale"] == 0.75
    assert flat["data.shards"] == "shards/digits"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.batchsize=3", ["train.batchsize", "no such key", "did you mean 'batch_size'"]),
        ("model.modalities.m0.likelihood.skale=1", ["model.modalities.m0.likelihood.skale", "'scale'"]),
        ("train.batch_size=many", ["train.batch_size", "'many'", "integer"]),
        ("train.batch_size=0", ["train.batch_size", "0", "greater than 0"]),
        ("model.family=gamma", ["model.family", "'gamma'", "'normal' or 'laplace'"]),
        ("objective.beta=-1", ["objective.beta", "greater than 0"]),
        ("objective.cross_sources=some", ["objective.cross_sources: 'some'", "all"]),
        ("objective={num_samples: 2, cross_sources: 1}", ["objective", "num_samples 2", "num_samples to 1"]),
        ("objective.alignment={pretrain: 0.2}", ["objective.alignment", "pretrain needs a weight above 0"]),
        ("objective.alignment.weight=-1", ["objective.alignment.weight: -1", "greater than or equal to 0"]),
        ("objective.alignment={weight: 1, augment: {m7: [flip]}}", ["no modality 'm7'", "m0, m1, m2"]),
        ("clusters.num_clusters=21", ["clusters.num_clusters is 21", "has 20", "model.num_clusters to 21"]),
        ("clusters.criterion=elbow", ["clusters.criterion: 'elbow'", "stability"]),
        ("objective.cross_sources=3", ["objective.cross_sources is 3", "2 others", "to fewer"]),
        ("model.modalities.Bad-Name={}", ["Bad-Name", "lower-case"]),
        ("model.modalities.label={}", ["label", "none of"]),
        ("train={batch_size: 8}", ["train", "set epochs or max_steps"]),
        ("seed.x=1", ["seed", "has no keys below it"]),
        ("train", ["key=value"]),
        ("train.batch_size=[", ["train.batch_size=[", "YAML"]),
        ("name=../elsewhere", ["name", "'../elsewhere'"]),
    ],
)
def test_a_mistake_names_file_or_override_key_and_remedy(override, expected):
    with pytest.raises(UserError) as caught:
        load_config(DIGITS, [override])
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["refiner.sharng=shared"], ["refiner.sharng", "no such key", "did you mean 'sharing'"]),
        (["refiner.network.chanels=8"], ["refiner.network.chanels", "did you mean 'channels'"]),
        (["refiner.conditioning.sauce=any"], ["refiner.conditioning.sauce", "did you mean 'source'"]),
        (
            ["refiner.conditioning.source=all"],
            ["refiner.conditioning.source", "'any', 'self', 'latent' or 'none'"],
        ),
        (["refiner.sampler.name=euler"], ["refiner.sampler.name", "'euler'", "dpm_solver"]),
        (["refiner.network.channels=12"], ["refiner.network.channels", "12", "multiple of 8"]),
        (["refiner.network.multipliers=[]"], ["refiner.network.multipliers", "at least 1 item"]),
        (["refiner.sampler.start=0"], ["refiner.sampler.start", "greater than 0"]),
        (["model.shared_dim=3"], ["model", "no such key", "refiner"]),
        (["train.ema_decay=1"], ["train.ema_decay", "less than 1"]),
        (
            ["refiner.sampler.guidance=1.5", "refiner.conditioning.dropout=0"],
            ["refiner: sampler.guidance", "set conditioning.dropout"],
        ),
        (
            ["refiner.sampler.num_steps=600", "refiner.sampler.start=0.5"],
            ["refiner: sampler.num_steps is 600", "sampler.start", "only 500", "set it to 500 or fewer"],
        ),
    ],
)
def test_a_mistake_about_the_refiner_names_file_key_and_remedy(overrides, expected):
    with pytest.raises(UserError) as caught:
        load_config(REFINER, overrides)
    for part in [str(REFINER), *expected]:
        assert part in str(caught.value)


def test_as_many_steps_as_there_are_and_guidance_of_one_are_no_mistake():
    sampler = ["refiner.sampler.num_steps=500", "refiner.sampler.start=0.5", "refiner.sampler.guidance=1"]
    config = load_config(REFINER, [*sampler, "refiner.conditioning.dropout=0"])
    assert config.refiner.sampler.num_steps == 500


def test_the_section_decides_what_is_trained(tmp_path):
    assert isinstance(load_config(REFINER), RefinerExperiment)
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump({k: v for k, v in yaml.safe_load(REFINER.read_text()).items() if k != "cmvae"})
    )
    with pytest.raises(UserError, match=r"mine\.yaml: cmvae: missing"):
        load_config(path)
    save_config(load_config(REFINER, ["seed=3"]), path)
    assert load_config(path) == load_config(REFINER, ["seed=3"])


def test_a_mistake_in_a_file_names_the_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(DIGITS.read_text().replace("learning_rate", "learning_rat"))
    with pytest.raises(UserError, match=r"mine\.yaml: optimizer\.learning_rat: no such key; did you mean"):
        load_config(path)
    path.write_text("- a list")
    with pytest.raises(UserError, match="mapping"):
        load_config(path)
    path.write_text("a: [")
    with pytest.raises(UserError, match="no valid YAML"):
        load_config(path)
    with pytest.raises(UserError, match=r"nowhere\.yaml: no such file; .*mine\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def index_with(*modalities):
    shard = ShardSchema(name="train-000000.tar", num_samples=3, num_bytes=9, sha256="0" * 64)
    return ShardIndex(
        name="test",
        source={},
        modalities={name: ImageModality(shape=(3, 16, 16)) for name in modalities},
        class_names=None,
        splits={"train": SplitSchema(num_samples=3, shards=(shard,))},
    )


def test_a_modality_that_the_shards_lack_is_named():
    config = load_config(DIGITS)
    check_against_shards(config, index_with("m0", "m1", "m2", "extra"), "digits.yaml")
    with pytest.raises(
        UserError, match=r"digits\.yaml: model\.modalities\.m2: shards/digits has no modality"
    ):
        check_against_shards(config, index_with("m0", "m1"), "digits.yaml")


def test_a_likelihood_that_does_not_fit_the_kind_is_named():
    config = load_config(DIGITS, ["model.modalities.m1.likelihood.family=categorical"])
    with pytest.raises(UserError) as caught:
        check_against_shards(config, index_with("m0", "m1", "m2"), "my.yaml")
    for part in ("my.yaml", "model.modalities.m1.likelihood.family", "categorical", "image", "laplace or"):
        assert part in str(caught.value)


def test_only_images_are_augmented(tmp_path):
    path = ROOT / "configs/digits_mixed.yaml"
    config = load_config(path, ["objective.alignment={weight: 1, augment: {caption: [flip]}}"])
    index = index_with("image", "statistics", "caption")
    text = TextModality(shape=(16,), categories=("<pad>", "<eos>", "<unk>", "a"))
    index = index.model_copy(update={"modalities": {**index.modalities, "caption": text}})
    with pytest.raises(UserError, match=r"my\.yaml: objective\.alignment\.augment: caption is of kind text"):
        check_against_shards(config, index, "my.yaml")


def test_the_published_experiments_have_the_published_objective_and_selection():
    for name in ("polymnist", "cubicc"):
        config = load_config(ROOT / f"configs/{name}.yaml")
        assert config.objective.alignment.weight == 0
        assert (config.clusters.criterion, config.clusters.num_clusters) == ("entropy", None)
        assert config.model.assign_by == "vote"


def test_a_refiner_reads_the_modalities_of_its_cmvae(tmp_path):
    run = tmp_path / "cmvae"
    config = load_config(REFINER, [f"cmvae={run}"])
    with pytest.raises(UserError, match=rf"mine\.yaml: cmvae: {run}/config\.yaml: missing.*cmvae train"):
        check_against_shards(config, index_with("m0", "m1", "m2"), "mine.yaml")
    run.mkdir()
    save_config(load_config(DIGITS), run / "config.yaml")
    assert read_modalities(config) == ("m0", "m1", "m2")
    check_against_shards(config, index_with("m2", "m1", "m0", "extra"), "mine.yaml")
    with pytest.raises(UserError, match=r"mine\.yaml: cmvae: .* has no modality 'm2'"):
        check_against_shards(config, index_with("m0", "m1"), "mine.yaml")
    # A refiner is not refined.
    save_config(config, run / "config.yaml")
    with pytest.raises(UserError, match=rf"cmvae: {run}: the run of a refiner. Give the run of a CMVAE"):
        check_against_shards(config, index_with("m0", "m1", "m2"), "mine.yaml")
    with pytest.raises(UserError, match="the run of a refiner"):
        load_cmvae_run(run)


@pytest.mark.parametrize(
    ("path", "overrides", "expected"),
    [
        (DIGITS, ["train.batchsize=3"], "did you mean 'batch_size'"),
        (DIGITS, ["data.shards=shards/nowhere"], "no such shard folder"),
        (REFINER, ["refiner.sampler.guidance=2", "refiner.conditioning.dropout=0"], "conditioning.dropout"),
        (REFINER, ["cmvae=runs/nowhere"], "digits_refiner.yaml: cmvae: runs/nowhere/config.yaml: missing"),
    ],
)
def test_mistakes_are_told_before_torch_is_imported(path, overrides, expected, request):
    if "cmvae=runs/nowhere" in overrides:
        overrides = [*overrides, f"data.shards={request.getfixturevalue('digits_shards')}"]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", ROOT / "launch/train.py", path, *overrides],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    seconds = time.perf_counter() - started
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    # The first second is what is promised; what costs seconds is this import, whatever the machine's load.
    assert " torch\n" not in done.stderr
    assert seconds < 20


@pytest.mark.parametrize(("value", "steps"), [("null", ()), ("7", (7,)), ("[3, 7]", (3, 7))])
def test_clusters_are_refitted_never_once_or_several_times(tmp_path, value, steps):
    config = load_config(DIGITS, [f"objective.refit_clusters_at={value}"])
    assert config.objective.refit_clusters_at == steps
    save_config(config, tmp_path / "again.yaml")
    assert load_config(tmp_path / "again.yaml") == config
    with pytest.raises(UserError, match="refit_clusters_at"):
        load_config(DIGITS, ["objective.refit_clusters_at=[0]"])
    with pytest.raises(UserError, match="'often' does not fit: give one step, several as"):
        load_config(DIGITS, ["objective.refit_clusters_at=often"])
