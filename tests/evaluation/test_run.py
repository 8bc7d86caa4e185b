"""The whole evaluation on data that has less than it would like: no labels, one sample, other modalities."""

import json
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
import yaml
from quadrants import Quadrants
from refining import make_refiner

from cmvae import CMVAE
from cmvae.config import RefinerExperiment, load_config, save_config
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.datasets.writer import write_shards
from cmvae.evaluation.run import evaluate_run
from cmvae.models.export import EXPORT_CONFIG_NAME, WEIGHTS_NAME, weights_sha256
from cmvae.utils.errors import UserError


class Unlabelled(Quadrants):
    """The quadrants without their labels, and only one sample to evaluate on."""

    class_names = None
    split_sizes: ClassVar = {"train": 16, "validation": 4, "test": 1}

    def sample(self, split, index):
        return replace(super().sample(split, index), label=None)


@pytest.fixture
def run(tmp_path, quadrants_shards):
    """`run(shards)` is a config and a folder with the export of an untrained model."""

    def make(shards=quadrants_shards):
        settings = {
            "name": "untrained",
            "output_dir": str(tmp_path / "run"),
            "data": {"shards": str(shards)},
            "model": {
                "shared_dim": 3,
                "private_dim": 2,
                "num_clusters": 4,
                "modalities": {name: {"width": 2} for name in ("m0", "m1", "m2")},
            },
            "train": {"max_steps": 1},
            "evaluation": {"num_generated": 50, "likelihood_samples": 4, "map_samples": 20},
            "tracking": {"enabled": False},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        config = load_config(tmp_path / "config.yaml")
        index = ShardIndex.load(quadrants_shards)
        torch.manual_seed(0)
        CMVAE(config.model, index.modalities).save_pretrained(config.run_dir / "export")
        return config

    return make


def test_one_sample_without_a_label_gives_what_it_can_and_reasons_for_the_rest(tmp_path, run):
    write_shards(Unlabelled(), tmp_path / "unlabelled")
    config = run(tmp_path / "unlabelled")
    result = evaluate_run(config, ShardIndex.load(config.data.shards), config.run_dir)
    metrics = json.loads((config.run_dir / "evaluation/metrics.json").read_text())
    assert set(metrics) == {
        "clustering/num_clusters",
        "clustering/by_group/num_groups",
        "likelihood/joint",
        "likelihood/effective_samples",
    }
    left_out = json.loads((config.run_dir / "evaluation/protocol.json").read_text())["left_out"]
    for name in ("clustering/acc", "coherence", "frechet/classifier", "fid", "fidelity/classifier", "probe"):
        assert len(left_out[name]) > 10, name
    assert left_out == result.left_out
    page = (config.run_dir / "evaluation/report.html").read_text(encoding="utf-8")
    assert "A map takes at least 4 samples." in page
    assert left_out["figures/latent_map"] == "takes at least 4 samples"
    assert "The data has no labels." in page


def test_a_page_that_fails_is_one_warning_and_the_evaluation_is_complete(run, monkeypatch, caplog):
    config = run()
    config = config.model_copy(
        update={"evaluation": config.evaluation.model_copy(update={"metrics": ("clustering",)})}
    )
    # Whoever installed an earlier version has no Plotly.
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    result = evaluate_run(config, ShardIndex.load(config.data.shards), config.run_dir)
    written = json.loads((config.run_dir / "evaluation/metrics.json").read_text())
    assert written == result.metrics
    assert "latent_map" in result.figures, "drawn from the same points as the map of the page"
    assert not (config.run_dir / "evaluation/report.html").exists()
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "plotly" in warning
    assert f"cmvae report {config.run_dir}" in warning


def test_the_page_is_an_artifact_of_the_run(run, monkeypatch, tmp_path):
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config = run()
    config = config.model_copy(
        update={
            "evaluation": config.evaluation.model_copy(update={"metrics": ("clustering",)}),
            "tracking": config.tracking.model_copy(update={"enabled": True}),
        }
    )
    evaluate_run(config, ShardIndex.load(config.data.shards), config.run_dir)
    record = json.loads((config.run_dir / "mlflow.json").read_text())
    artifacts = MlflowClient(record["tracking_uri"]).list_artifacts(record["run_id"])
    (size,) = [artifact.file_size for artifact in artifacts if artifact.path == "report.html"]
    assert size == (config.run_dir / "evaluation/report.html").stat().st_size


def test_other_settings_do_not_change_the_figures(run):
    config = run()
    index = ShardIndex.load(config.data.shards)
    first = evaluate_run(config, index, config.run_dir)
    smaller = config.evaluation.model_copy(update={"batch_size": 11})
    second = evaluate_run(config.model_copy(update={"evaluation": smaller}), index, config.run_dir)
    assert first.metrics == pytest.approx(second.metrics, rel=1e-5, abs=1e-6)
    assert "likelihood/joint" in first.metrics
    assert "coherence/conditional" in first.metrics


def test_only_the_groups_that_are_asked_for_are_computed(run):
    config = run()
    wanted = config.evaluation.model_copy(update={"metrics": ("probe",)})
    result = evaluate_run(
        config.model_copy(update={"evaluation": wanted}), ShardIndex.load(config.data.shards), config.run_dir
    )
    assert {name.split("/")[0] for name in result.metrics} == {"probe"}


@pytest.mark.parametrize("name", [WEIGHTS_NAME, EXPORT_CONFIG_NAME])
def test_an_export_with_a_missing_file_is_named_and_the_last_evaluation_stays(run, name):
    config = run()
    (config.run_dir / "evaluation").mkdir()
    (config.run_dir / "evaluation/metrics.json").write_text('{"clustering/acc": 0.5}')
    (config.run_dir / "export" / name).unlink()
    with pytest.raises(UserError, match=f"export/{name}: missing"):
        evaluate_run(config, ShardIndex.load(config.data.shards), config.run_dir)
    assert json.loads((config.run_dir / "evaluation/metrics.json").read_text()) == {"clustering/acc": 0.5}


def test_data_of_another_shape_is_refused(tmp_path, run):
    class Wider(Quadrants):
        modalities: ClassVar = {
            name: modality.model_copy(update={"shape": (modality.shape[0], 8, 16)})
            for name, modality in Quadrants.modalities.items()
        }

        def sample(self, split, index):
            sample = super().sample(split, index)
            return replace(sample, values={name: x.repeat(2, axis=2) for name, x in sample.values.items()})

    write_shards(Wider(), tmp_path / "wider")
    config = run(tmp_path / "wider")
    index = ShardIndex.load(config.data.shards)
    batch = next(iter(EvaluationLoader(config.data.shards, split="test", modalities=["m0"], batch_size=2)))
    assert batch["m0"].shape == (2, 3, 8, 16)
    with pytest.raises(UserError, match=r"modalities\.m0\.shape: \(3, 8, 16\), but the model was trained on"):
        evaluate_run(config, index, config.run_dir)


@pytest.fixture
def refiner_run(tmp_path, run):
    """`refiner_run(metrics)` is the experiment of an untrained refiner with its export, and of its CMVAE."""

    def make(*metrics):
        cmvae = run()
        save_config(cmvae, cmvae.run_dir / "config.yaml")
        evaluation = cmvae.evaluation.model_copy(update={"metrics": metrics})
        cmvae = cmvae.model_copy(update={"evaluation": evaluation})
        refiner = make_refiner(
            Quadrants.modalities,
            weights_sha256(cmvae.run_dir / "export"),
            shared_dim=3,
            sampler={"num_steps": 2},
        )
        config = RefinerExperiment(
            name="refiner",
            output_dir=tmp_path / "refiner",
            cmvae=cmvae.run_dir,
            refiner=refiner.config,
            **{key: getattr(cmvae, key) for key in ("data", "train", "evaluation", "tracking")},
        )
        refiner.save_pretrained(config.run_dir / "export")
        return config, cmvae

    return make


def test_a_refiner_is_evaluated_before_and_after_with_its_cmvaes_own_figures(refiner_run):
    config, cmvae = refiner_run("coherence", "frechet", "fidelity")
    index = ShardIndex.load(config.data.shards)
    plain = evaluate_run(cmvae, index, cmvae.run_dir)
    evaluate_run(config, index, config.run_dir)
    folder = config.run_dir / "evaluation"
    metrics, protocol = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "protocol")
    )
    assert {name: x for name, x in metrics.items() if not name.startswith("refined/")} == plain.metrics
    assert {"refined/coherence/conditional", "refined/frechet/classifier/unconditional"} <= metrics.keys()
    assert sorted(path.stem for path in (folder / "figures").iterdir()) == [
        "coherence_matrix",
        "refined_coherence_matrix",
        "refinements",
    ]
    assert protocol["export_sha256"] == weights_sha256(config.run_dir / "export")
    assert protocol["refined.sampler.num_steps"] == 2


def test_the_sampler_is_that_of_the_run_and_its_overrides(refiner_run):
    config, _ = refiner_run("coherence")
    index = ShardIndex.load(config.data.shards)
    first = evaluate_run(config, index, config.run_dir)
    sampler = config.refiner.sampler.model_copy(update={"num_steps": 1})
    refiner = config.refiner.model_copy(update={"sampler": sampler})
    second = evaluate_run(config.model_copy(update={"refiner": refiner}), index, config.run_dir)
    assert (first.protocol["refined.sampler.num_steps"], second.protocol["refined.sampler.num_steps"]) == (
        2,
        1,
    )
    before = {name for name in first.metrics if not name.startswith("refined/")}
    assert all(first.metrics[name] == second.metrics[name] for name in before)
    assert first.metrics != second.metrics


def test_a_refiner_has_no_clusters_and_says_where_they_are(refiner_run):
    config, _ = refiner_run("clustering", "likelihood")
    result = evaluate_run(config, ShardIndex.load(config.data.shards), config.run_dir)
    assert result.metrics == {}
    assert set(result.figures) == {"refinements"}
    assert set(result.left_out) == {"clustering", "likelihood"}
    assert str(config.cmvae) in result.left_out["clustering"]


def test_a_refiner_of_another_cmvae_is_not_evaluated(refiner_run, run):
    config, cmvae = refiner_run("coherence")
    index = ShardIndex.load(config.data.shards)
    torch.manual_seed(1)
    CMVAE(cmvae.model, index.modalities).save_pretrained(cmvae.run_dir / "export")
    with pytest.raises(
        UserError, match=r"refiner/export: trained with the CMVAE whose weights .*, but .*run/export"
    ):
        evaluate_run(config, index, config.run_dir)
    assert not (config.run_dir / "evaluation").exists()
