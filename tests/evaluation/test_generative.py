"""The generation pass, with models whose coherence is known by construction, and with an untrained one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from mixed import MODALITIES, Mixed, MixedOracle
from quadrants import NUM_CLASSES, SHAPES, Quadrants, class_images
from refining import make_refiner, record_calls, tell
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from cmvae.config import EvaluationConfig, ModalityConfig, ModelConfig
from cmvae.data.index import ShardIndex
from cmvae.data.reader import EvaluationLoader
from cmvae.datasets.writer import write_shards
from cmvae.evaluation import feature_networks
from cmvae.evaluation.classifiers import train_classifier, train_classifiers
from cmvae.evaluation.context import EvaluationContext
from cmvae.evaluation.feature_networks import load_feature_networks
from cmvae.evaluation.frechet import FrechetDistance
from cmvae.evaluation.generative import evaluate_generative, read_reference
from cmvae.evaluation.sampling import SampleGenerator
from cmvae.models.cmvae import CMVAE, Posterior
from cmvae.models.dcmvae import DCMVAE
from cmvae.models.refiner import Refiner
from cmvae.utils.errors import UserError

ALL = {"coherence", "frechet", "fidelity"}
NAMES = ("m0", "m1", "m2")
SHAPES_OF_QUADRANTS = Quadrants.modalities
# z of class c is near 10·c in its first dimension.
SPACING = 10.0


class Oracle(CMVAE):
    """Reads the class off an image and draws it again; `say` and `draw` may twist it, by modality."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        modalities = {name: ModalityConfig(width=2) for name in SHAPES}
        config = ModelConfig(shared_dim=2, private_dim=3, num_clusters=NUM_CLASSES, modalities=modalities)
        super().__init__(config, Quadrants.modalities)
        self.eval()
        self.say: dict[str, Callable[[Tensor], Tensor]] = {}
        self.draw: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        with torch.no_grad():
            self.cluster_prior.means[:, 0] = SPACING * torch.arange(NUM_CLASSES)
        self.cluster_prior.scale.fill_(1e-3)

    def encode(self, inputs):
        posteriors = {}
        for name, x in inputs.items():
            quadrants = torch.nn.functional.avg_pool2d(x.mean(1, keepdim=True), 4).flatten(1)
            classes = self.say.get(name, lambda c: c)(quadrants.argmax(1))
            loc = torch.stack([SPACING * classes, torch.zeros(len(x))], dim=1)
            posteriors[name] = Posterior(
                self.family(loc, torch.full_like(loc, 1e-3)), self.family(torch.zeros(3), torch.ones(3))
            )
        return posteriors

    def decode(self, shared, private):
        images = {}
        for name, w in private.items():
            classes = (shared[:, 0] / SPACING).round().long()
            classes = self.draw.get(name, lambda c, w: c)(classes, w)
            images[name] = torch.from_numpy(class_images(classes.numpy(), SHAPES[name]))
        return images


def quiet() -> tqdm:
    return tqdm(disable=True)


@pytest.fixture
def oracle() -> Oracle:
    return Oracle()


@pytest.fixture
def evaluation_context(quadrants_shards: Path) -> Callable[..., EvaluationContext]:
    """`evaluation_context(model, seed=1)` is an evaluation of `model` on the quadrants, with settings."""

    def make(
        model: CMVAE, index: ShardIndex | None = None, refiner: Refiner | None = None, **settings: object
    ) -> EvaluationContext:
        return EvaluationContext(
            model,
            quadrants_shards,
            index or ShardIndex.load(quadrants_shards),
            EvaluationConfig(**{"num_generated": 200, "batch_size": 32} | settings),
            Accelerator(cpu=True),
            None if refiner is None else DCMVAE(model, refiner),
        )

    return make


@pytest.fixture
def untrained(oracle):
    torch.manual_seed(1)
    modalities = {name: ModalityConfig(width=2) for name in NAMES}
    config = ModelConfig(shared_dim=4, private_dim=3, num_clusters=5, modalities=modalities)
    return CMVAE(config, oracle.modalities).eval()


def test_the_released_protocol_reconstructs_with_the_encoded_private_latent(oracle, evaluation_context):
    """The oracle draws the class where w is small, as w ~ q(w|x) is here, and the first class elsewhere."""

    def encode(inputs):
        posteriors = Oracle.encode(oracle, inputs)
        zero = {name: torch.zeros(len(x), 3) for name, x in inputs.items()}
        return {
            name: Posterior(q.shared, oracle.family(zero[name], zero[name] + 1e-4))
            for name, q in posteriors.items()
        }

    oracle.encode = encode
    for name in NAMES:
        oracle.draw[name] = lambda classes, w: classes * (w.abs().sum(1) < 0.01)
    context = evaluation_context(oracle, protocol="released")
    metrics = evaluate_generative(context, {"coherence", "frechet"}).metrics
    for source in NAMES:
        for target in NAMES:
            pair = f"coherence/matrix/{source}/{target}"
            # 23 of 90 samples have the first class.
            assert metrics[pair] == pytest.approx(23 / 90)
            assert metrics[f"released/{pair}"] == (1 if source == target else metrics[pair])
    assert metrics["released/coherence/conditional"] == metrics["coherence/conditional"]
    assert metrics["released/coherence/unconditional"] == metrics["coherence/unconditional"] == 1
    distance = "frechet/classifier/conditional"
    assert metrics[f"released/{distance}_cross"] == metrics[f"{distance}_cross"]
    # Three of nine pairs are reconstructions, which show all classes now.
    assert 6 / 9 * metrics[distance] < metrics[f"released/{distance}"] < 0.8 * metrics[distance]


def test_generative_metrics_can_take_the_first_samples_only(untrained, evaluation_context):
    context = evaluation_context(untrained, num_conditional=40)
    result = evaluate_generative(context, {"coherence"})
    assert result.protocol["generative.num_samples"] == 40
    networks, _ = load_feature_networks(context, {"coherence"})
    whole = read_reference(evaluation_context(untrained), networks, {"coherence"})
    assert whole.num_samples == 90
    # 40 samples give multiples of a fortieth, 90 would not.
    shares = [x for name, x in result.metrics.items() if name.startswith("coherence/matrix/")]
    np.testing.assert_allclose(40 * np.array(shares), np.round(40 * np.array(shares)), atol=1e-6)


def test_a_model_that_is_always_right_is_fully_coherent(oracle, evaluation_context):
    result = evaluate_generative(evaluation_context(oracle), {"coherence"})
    assert result.left_out == {}
    assert set(result.metrics) == {
        "coherence/conditional",
        "coherence/unconditional",
        "coherence/conditional_by_sources/1",
        "coherence/conditional_by_sources/2",
        *(f"coherence/matrix/{source}/{target}" for source in NAMES for target in NAMES),
    }
    assert set(result.metrics.values()) == {1.0}
    (image,) = result.figures["coherence_matrix"].axes[0].images
    assert np.asarray(image.get_array()).tolist() == np.ones((3, 3)).tolist()
    assert result.protocol["generative.num_samples"] == 90
    assert result.protocol["classifier.accuracy.m1"] > 0.95
    json.dumps(result.protocol)


def test_one_modality_that_always_errs_shows_in_its_row_and_column(oracle, evaluation_context):
    oracle.say["m1"] = lambda classes: (classes + 1) % 4
    oracle.draw["m2"] = lambda classes, w: (classes + 2) % 4
    metrics = evaluate_generative(evaluation_context(oracle), {"coherence"}).metrics
    matrix = [[metrics[f"coherence/matrix/{source}/{target}"] for target in NAMES] for source in NAMES]
    assert matrix == [[1, 1, 0], [0, 0, 0], [1, 1, 0]]
    assert metrics["coherence/conditional"] == pytest.approx(3 / 6)
    assert metrics["coherence/unconditional"] == 0


class HalfLabelled(Quadrants):
    """Half of the samples have no label, in every split: most of classes 0 and 1, none of class 3."""

    def sample(self, split, index):
        sample = super().sample(split, index)
        return dataclasses.replace(sample, label=None) if index % 16 in (0, 1, 2, 4, 5, 6, 8, 9) else sample


def test_half_of_the_labels_give_the_coherence_of_those_that_have_one(oracle, quadrants_shards, tmp_path):
    """The model errs where it sees the classes 0 and 1, which fewer labelled samples have than others."""
    write_shards(HalfLabelled(), tmp_path / "half")
    index = ShardIndex.load(tmp_path / "half")
    assert index.partly_labelled
    trained = ShardIndex.load(quadrants_shards)
    shutil.copytree(quadrants_shards / "classifiers", tmp_path / "half" / "classifiers")
    index = index.model_copy(update={"classifiers": trained.classifiers})
    oracle.say["m1"] = lambda classes: torch.where(classes < 2, 1 - classes, classes)
    context = EvaluationContext(
        oracle,
        tmp_path / "half",
        index,
        EvaluationConfig(num_generated=50, batch_size=32),
        Accelerator(cpu=True),
    )
    metrics = evaluate_generative(context, {"coherence"}).metrics

    test = [HalfLabelled().sample("test", number).label for number in range(HalfLabelled.split_sizes["test"])]
    labels = [label for label in test if label is not None]
    assert 0.4 < len(labels) / len(test) < 0.6
    right = sum(label >= 2 for label in labels) / len(labels)
    assert right != pytest.approx(sum(n % NUM_CLASSES >= 2 for n in range(len(test))) / len(test), abs=0.1)
    for target in NAMES:
        assert metrics[f"coherence/matrix/m0/{target}"] == 1
        assert metrics[f"coherence/matrix/m1/{target}"] == pytest.approx(right)
        assert metrics[f"coherence/matrix/m2/{target}"] == 1
    assert metrics["coherence/conditional"] == pytest.approx((4 + 2 * right) / 6)


def test_classifiers_of_half_labelled_data_learn_from_those_that_have_a_label(tmp_path):
    """The same weights and accuracy as from a data set of the labelled samples alone."""
    write_shards(HalfLabelled(), tmp_path / "half")
    train_classifiers(tmp_path / "half", device=torch.device("cpu"), width=2, epochs=3)
    entries = ShardIndex.load(tmp_path / "half").classifiers
    context = EvaluationLoader(tmp_path / "half", split="test", modalities=["m1"], batch_size=90)
    (batch,) = context
    (train,) = EvaluationLoader(tmp_path / "half", split="train", modalities=["m1"], batch_size=192)
    rows = train["label"] >= 0
    assert 0.4 < rows.double().mean() < 0.6
    alone = train_classifier(
        train["m1"][rows], train["label"][rows], NUM_CLASSES, width=2, epochs=3, seed=entries["m1"].seed
    )
    read, _ = alone.classify(batch["m1"].float() / 255)
    there = batch["label"] >= 0
    assert entries["m1"].accuracy == float((read == batch["label"])[there].double().mean())
    stored = load_file(tmp_path / "half" / entries["m1"].file)
    for name, tensor in alone.state_dict().items():
        torch.testing.assert_close(stored[name], tensor)


def test_of_several_sources_each_has_its_share(oracle, evaluation_context):
    oracle.say["m1"] = lambda classes: (classes + 1) % 4
    context = evaluation_context(oracle)
    networks, _ = load_feature_networks(context, {"coherence"})
    split = read_reference(context, networks, {"coherence"}).extracted
    generator = SampleGenerator(context, quiet())
    read = generator.conditional(split, ("m0", "m1"), ["m2"], networks.classify, refine=False)
    shift = (read["class/m2"] - split["label"]) % 4
    assert set(shift.tolist()) == {0, 1}
    assert np.mean(shift) == pytest.approx(0.5, abs=0.15)
    # Both sources turn up in every batch and not in turn: the choice belongs to the sample.
    assert 20 < np.sum(shift[1:] != shift[:-1]) < 70


def test_what_the_private_latent_decides_is_not_coherent(oracle, evaluation_context):
    # Four equally likely classes by w, which is drawn afresh for every target.
    def by_w(classes, w):
        return 2 * (w[:, 0] > 0).long() + (w[:, 1] > 0).long()

    oracle.draw = dict.fromkeys(NAMES, by_w)
    metrics = evaluate_generative(evaluation_context(oracle, num_generated=1000), {"coherence"}).metrics
    assert metrics["coherence/conditional"] == pytest.approx(1 / 4, abs=0.06)
    assert metrics["coherence/unconditional"] == pytest.approx(1 / 16, abs=0.03)


def test_unconditional_clusters_follow_their_weights_and_the_selection(oracle, evaluation_context):
    with torch.no_grad():
        oracle.cluster_prior.logits[:] = torch.tensor([1.0, 1.0, 2.0, 4.0]).log()
    oracle.cluster_prior.active[1] = False
    context = evaluation_context(oracle, num_generated=2000)
    networks, _ = load_feature_networks(context, {"coherence"})
    read = SampleGenerator(context, quiet()).unconditional(NAMES, networks.classify)
    shares = np.bincount(read["class/m0"], minlength=4) / 2000
    assert shares[1] == 0
    np.testing.assert_allclose(shares[[0, 2, 3]], [1 / 7, 2 / 7, 4 / 7], atol=0.04)


def test_figures_depend_on_the_seed_and_not_on_the_batches(untrained, evaluation_context):
    few, many, other = (
        evaluate_generative(evaluation_context(untrained, batch_size=size, seed=seed), ALL).metrics
        for size, seed in ((7, 0), (64, 0), (64, 1))
    )
    assert few == pytest.approx(many, rel=1e-4, abs=1e-6)
    assert any(few[name] != pytest.approx(other[name], rel=1e-3) for name in few)
    assert set(few) >= {
        "frechet/classifier/unconditional",
        "frechet/classifier/conditional",
        "frechet/classifier/conditional_cross",
        "fidelity/classifier/recall/unconditional",
        "fidelity/classifier/density/conditional",
    }


def test_real_images_as_generations_are_at_no_distance(oracle, evaluation_context, quadrants_shards):
    (batch,) = EvaluationLoader(quadrants_shards, split="test", modalities=NAMES, batch_size=90)
    context = evaluation_context(oracle, num_generated=90, batch_size=90)
    clean = evaluate_generative(context, {"frechet", "fidelity"}).metrics
    oracle.decode = lambda shared, private: {name: batch[name] / 255 for name in private}
    metrics = evaluate_generative(context, {"frechet", "fidelity"}).metrics
    for kind in ("unconditional", "conditional", "conditional_cross"):
        assert metrics[f"frechet/classifier/{kind}"] == pytest.approx(0, abs=1e-6)
        # One image a class, without noise, covers a part of what there is.
        assert clean[f"frechet/classifier/{kind}"] > 0.1
        assert clean[f"fidelity/classifier/coverage/{kind}"] < 0.8
        for name in ("precision", "recall", "coverage"):
            assert metrics[f"fidelity/classifier/{name}/{kind}"] == 1


def test_conditional_means_leave_self_out_where_they_say_so(oracle, evaluation_context):
    # One bad source and another bad target, so that the means with and without self differ.
    oracle.say["m1"] = torch.zeros_like
    oracle.draw["m0"] = lambda classes, w: torch.zeros_like(classes)
    metrics = evaluate_generative(evaluation_context(oracle), {"frechet"}).metrics
    context = evaluation_context(oracle)
    networks, _ = load_feature_networks(context, {"frechet"})
    split = read_reference(context, networks, {"frechet"}).extracted
    generator, values = SampleGenerator(context, quiet()), {}
    for source in NAMES:
        read = generator.conditional(split, (source,), NAMES, networks.extract_features, refine=False)
        for target in NAMES:
            reference = FrechetDistance(split[f"classifier/{target}"])
            values[source, target] = reference.to(read[f"classifier/{target}"])
    cross = [value for (source, target), value in values.items() if source != target]
    assert metrics["frechet/classifier/conditional"] == pytest.approx(np.mean(list(values.values())))
    assert metrics["frechet/classifier/conditional_cross"] == pytest.approx(np.mean(cross))
    assert np.mean(cross) != pytest.approx(np.mean(list(values.values())), rel=0.02)


def test_only_what_is_wanted_is_computed(oracle, evaluation_context):
    metrics = evaluate_generative(evaluation_context(oracle), {"fidelity"}).metrics
    assert {name.split("/")[0] for name in metrics} == {"fidelity"}


def test_too_few_samples_leave_a_distance_out_with_the_reason(oracle, evaluation_context):
    result = evaluate_generative(evaluation_context(oracle, num_generated=32), {"frechet"})
    assert "32 samples are too few" in result.left_out["frechet/classifier/unconditional"]
    assert "90 samples are too few for the covariance of 2,048" in result.left_out["fid"]
    assert set(result.metrics) == {"frechet/classifier/conditional", "frechet/classifier/conditional_cross"}
    result = evaluate_generative(evaluation_context(oracle, num_generated=5), {"fidelity"})
    assert "5 samples" in result.left_out["fidelity/classifier/unconditional"]
    assert "fidelity/classifier/recall/conditional" in result.metrics


def test_without_labels_or_classifiers_metrics_are_left_out_with_the_command(
    oracle, evaluation_context, quadrants_shards
):
    index = ShardIndex.load(quadrants_shards)
    for change, reason in (
        ({"class_names": None}, "no labels"),
        ({"classifiers": {}}, "cmvae classifiers"),
    ):
        result = evaluate_generative(evaluation_context(oracle, index.model_copy(update=change)), ALL)
        assert result.metrics == {}
        assert set(result.left_out) == {"coherence", "frechet/classifier", "fidelity/classifier", "fid"}
        assert reason in result.left_out["coherence"]


def test_inception_features_make_the_fid_also_without_labels(
    oracle, evaluation_context, quadrants_shards, monkeypatch
):
    class Halves(torch.nn.Module):
        def forward(self, images):
            assert images.dtype == torch.uint8
            assert images.shape[1:] == (3, 8, 8)
            return images.double().mean((1, 2))[:, :4]

    monkeypatch.setattr(feature_networks, "INCEPTION_FEATURES", 4)
    monkeypatch.setattr(feature_networks, "load_inception", lambda weights, device: Halves())
    index = ShardIndex.load(quadrants_shards).model_copy(update={"class_names": None})
    result = evaluate_generative(evaluation_context(oracle, index), ALL)
    assert set(result.metrics) == {"fid/unconditional", "fid/conditional", "fid/conditional_cross"}
    # The oracle's images lack only the noise of the real ones.
    assert 0 < result.metrics["fid/conditional"] < 100
    assert set(result.left_out) == {"coherence", "frechet/classifier", "fidelity/classifier"}


def test_one_modality_has_distances_but_no_coherence(evaluation_context, oracle):
    torch.manual_seed(0)
    config = ModelConfig(
        shared_dim=4, private_dim=3, num_clusters=5, modalities={"m0": ModalityConfig(width=2)}
    )
    result = evaluate_generative(evaluation_context(CMVAE(config, oracle.modalities).eval()), ALL)
    assert result.left_out["coherence"] == "takes at least two modalities"
    assert "frechet/classifier/conditional" in result.metrics
    assert "frechet/classifier/conditional_cross" not in result.metrics


def test_a_model_that_generates_nan_is_named(oracle, evaluation_context):
    decode = oracle.decode
    oracle.decode = lambda shared, private: {
        name: image * (torch.nan if name == "m1" else 1) for name, image in decode(shared, private).items()
    }
    with pytest.raises(UserError, match="200 of the 200 values of m1 that the model generates uncond"):
        evaluate_generative(evaluation_context(oracle), {"coherence"})


def refined(metrics: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("refined/"): x for name, x in metrics.items() if name.startswith("refined/")}


def test_before_refinement_all_is_as_without_a_refiner(untrained, evaluation_context):
    plain = evaluate_generative(evaluation_context(untrained), ALL)
    refiner = make_refiner(SHAPES_OF_QUADRANTS)
    calls = record_calls(refiner)
    result = evaluate_generative(evaluation_context(untrained, refiner=refiner), ALL)
    before = {name: x for name, x in result.metrics.items() if not name.startswith("refined/")}
    assert before == plain.metrics
    after = refined(result.metrics)
    # Generations from several sources are not refined: 200 joint ones in batches of 32, padded to equal size,
    # and 90 from each of three, take four evaluations each of three networks.
    assert len(calls) == (7 + 3 * 3) * 4 * 3
    assert plain.metrics.keys() - after.keys() == {"coherence/conditional_by_sources/2"}
    assert after.keys() <= plain.metrics.keys()
    assert any(after[name] != before[name] for name in after)
    assert set(result.figures) == {*plain.figures, "refined_coherence_matrix"}
    assert result.left_out == plain.left_out
    added = {key: result.protocol[key] for key in result.protocol.keys() - plain.protocol.keys()}
    assert added == {
        "refined.sampler.name": "dpm_solver",
        "refined.sampler.num_steps": 4,
        "refined.sampler.start": 1.0,
        "refined.sampler.guidance": 1.0,
        "refined.sampler.guidance_from": 0.0,
        "refined.sampler.candidates": 1,
        "refined.seed": 0,
    }


def test_a_refiner_that_repeats_its_condition_changes_no_figure(untrained, evaluation_context):
    refiner = tell(make_refiner(SHAPES_OF_QUADRANTS, diffusion={"prediction": "sample"}))
    metrics = evaluate_generative(evaluation_context(untrained, refiner=refiner), ALL).metrics
    after = refined(metrics)
    assert after == pytest.approx({name: metrics[name] for name in after}, rel=1e-3, abs=1e-5)
    assert len(after) > 20


def test_a_refiner_that_draws_another_class_ruins_coherence_between_images_and_labels(
    oracle, evaluation_context
):
    # Every quadrant becomes the one across: wrong for any source, and alike in all modalities.
    refiner = make_refiner(SHAPES_OF_QUADRANTS, diffusion={"prediction": "sample"})
    tell(refiner, think=lambda images: images.flip((2, 3)))
    context = evaluation_context(oracle, refiner=refiner)
    result = evaluate_generative(context, {"coherence"})
    assert result.metrics["coherence/conditional"] == 1
    assert result.metrics["refined/coherence/conditional"] == 0
    assert result.metrics["refined/coherence/unconditional"] == 1
    shown = {}
    for version in ("", "refined_"):
        (image,) = result.figures[f"{version}coherence_matrix"].axes[0].images
        shown[version] = np.asarray(image.get_array()).tolist()
    assert shown == {"": np.ones((3, 3)).tolist(), "refined_": np.zeros((3, 3)).tolist()}


def test_what_is_read_is_each_sample_refined_alone(untrained, evaluation_context):
    """One by one: noise, z and w, the decoders, the refiner and the classifier."""
    refiner = make_refiner(SHAPES_OF_QUADRANTS, conditioning={"latent": True})
    context = evaluation_context(untrained, refiner=refiner, num_generated=40)
    networks, _ = load_feature_networks(context, {"coherence"})
    split = read_reference(context, networks, {"coherence"}).extracted
    generator = SampleGenerator(context, quiet())
    readings = generator.conditional(split, ("m1",), NAMES, networks.classify, refine=True)
    (batch,) = EvaluationLoader(context.shards, split="test", modalities=["m1"], batch_size=90)
    posterior = untrained.encode({"m1": batch["m1"] / 255})["m1"].shared
    shown, classes = range(0, 90, 4), {name: [] for name in NAMES}
    for i in shown:
        position = torch.tensor([i])
        noise = context.draw_noise("conditional/m1/latents", position, (4 + 3 * 3,))[0]
        z = posterior.loc[i] + posterior.scale[i] * noise[:4]
        seeds = context.draw_seeds("conditional/m1/refine", position)
        for m, name in enumerate(NAMES):
            w = untrained.private_scale * noise[4 + 3 * m :][:3]
            image = untrained.decode(z[None], {name: w[None]})
            sharp = refiner.refine(image, z[None], seeds=seeds)
            classes[name].append(networks.classify(sharp)[f"class/{name}"].item())
    metrics = evaluate_generative(context, {"coherence"}).metrics
    for name in NAMES:
        read = readings[f"refined/class/{name}"]
        # An image between two classes may fall to either side by rounding.
        assert np.sum(read[shown] != classes[name]) <= 1
        assert metrics[f"refined/coherence/matrix/m1/{name}"] == np.mean(read == split["label"])
    assert sum(len(set(values)) > 1 for values in classes.values()) >= 2


def test_refined_figures_depend_on_the_seed_and_not_on_the_batches(untrained, evaluation_context):
    refiner = make_refiner(SHAPES_OF_QUADRANTS, sampler={"name": "ddpm", "num_steps": 2})
    few, many, other = (
        refined(
            evaluate_generative(
                evaluation_context(untrained, refiner=refiner, batch_size=size, seed=seed, num_generated=40),
                {"frechet"},
            ).metrics
        )
        for size, seed in ((17, 0), (90, 0), (90, 1))
    )
    assert few == pytest.approx(many, rel=1e-3)
    assert any(few[name] != pytest.approx(other[name], rel=1e-2) for name in few)


def test_a_refiner_that_draws_nan_is_named(oracle, evaluation_context):
    refiner = make_refiner(SHAPES_OF_QUADRANTS, diffusion={"prediction": "sample"})
    tell(refiner, think=lambda images: images * torch.nan)
    with pytest.raises(UserError, match="200 of the 200 values of m0 that the model generates uncond"):
        evaluate_generative(evaluation_context(oracle, refiner=refiner), {"coherence"})


@pytest.fixture(scope="session")
def mixed_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All kinds with gaps, packed, with a classifier of the photographs."""
    folder = tmp_path_factory.mktemp("shards") / "mixed"
    write_shards(Mixed(missing=0.2), folder)
    train_classifiers(folder, device=torch.device("cpu"), width=4, epochs=40)
    return folder


def mixed_context(model: CMVAE, folder: Path, **settings: object) -> EvaluationContext:
    index = ShardIndex.load(folder)
    settings = {"num_generated": 60, "batch_size": 16, **settings}
    return EvaluationContext(model, folder, index, EvaluationConfig(**settings), Accelerator(cpu=True))


def test_images_and_text_are_read_from_every_kind_of_source(mixed_shards):
    model = MixedOracle()
    model.say["sizes"] = lambda classes: (classes + 1) % 3
    model.say["caption"] = torch.zeros_like
    result = evaluate_generative(mixed_context(model, mixed_shards), {"coherence"})
    matrix = {
        tuple(name.split("/")[2:]): value
        for name, value in result.metrics.items()
        if name.startswith("coherence/matrix")
    }
    samples = [Mixed(0.2).sample("test", n) for n in range(60)]
    captioned = [sample.label for sample in samples if "caption" in sample.values]
    for target in ("photo", "caption"):
        for source in ("photo", "marks", "habitat"):
            assert matrix[source, target] == 1
        assert matrix["sizes", target] == 0
        # Of those that have a caption, those whose class is the one that it always says.
        assert matrix["caption", target] == pytest.approx(captioned.count(0) / len(captioned))
    assert len(matrix) == 10
    others = [value for (source, target), value in matrix.items() if source != target]
    assert result.metrics["coherence/conditional"] == pytest.approx(np.mean(others))
    assert result.metrics["coherence/unconditional"] == 1
    assert set(result.left_out) == {"coherence/sizes", "coherence/marks", "coherence/habitat"}
    for name in MODALITIES:
        count = sum(name in sample.values for sample in samples)
        assert result.protocol[f"generative.num_samples.{name}"] == count < 60
    assert result.protocol["classifier.accuracy.caption"] == 1
    (image,) = result.figures["coherence_matrix"].axes[0].images
    assert np.asarray(image.get_array()).shape == (5, 2)
    json.dumps(result.protocol)


def test_distances_are_of_images_that_are_there(mixed_shards):
    """The decoder draws every class in its plain colour, whatever it is asked from."""
    model = MixedOracle()
    context = mixed_context(model, mixed_shards)
    result = evaluate_generative(context, {"frechet", "fidelity"})
    assert {name for name in result.left_out if name.startswith("frechet/")} == {
        f"frechet/{name}" for name in MODALITIES if name != "photo"
    }
    networks, _ = load_feature_networks(context, {"frechet"})
    there = [n for n in range(60) if "photo" in Mixed(0.2).sample("test", n).values]
    photos = torch.from_numpy(np.stack([Mixed(0.2).sample("test", n).values["photo"] for n in there])) / 255
    reference = FrechetDistance(networks.extract_features({"photo": photos})["classifier/photo"].numpy())
    distances = []
    for source in MODALITIES:
        classes = torch.tensor(
            [s.label for s in (Mixed(0.2).sample("test", n) for n in range(60)) if source in s.values]
        )
        z = torch.zeros(len(classes), 4)
        z[:, 0] = 10 * classes
        drawn = model.decode(z, {"photo": z})
        distances.append(reference.to(networks.extract_features(drawn)["classifier/photo"].numpy()))
    assert result.metrics["frechet/classifier/conditional"] == pytest.approx(np.mean(distances), rel=1e-3)
    # Without the photographs as a source.
    cross = result.metrics["frechet/classifier/conditional_cross"]
    assert cross == pytest.approx(np.mean(distances[1:]), rel=1e-3)
    assert "fidelity/classifier/precision/conditional_cross" in result.metrics


def test_several_sources_are_those_that_a_sample_has_all_of(mixed_shards):
    model = MixedOracle()
    context = mixed_context(model, mixed_shards)
    networks, _ = load_feature_networks(context, {"coherence"})
    split = read_reference(context, networks, {"coherence"}).extracted
    sources = ("sizes", "marks", "habitat")
    readings = SampleGenerator(context, quiet()).conditional(
        split, sources, ["photo"], networks.classify, refine=False
    )
    index = ShardIndex.load(mixed_shards)
    (batch,) = EvaluationLoader(
        mixed_shards, split="test", modalities=sources, batch_size=index.splits["test"].num_samples
    )
    expected = batch["label"][batch["mask"].all(1)]
    assert readings["class/photo"].tolist() == expected.tolist()
    assert 0 < len(expected) < 60


def test_text_alone_has_coherence_and_no_distances(mixed_shards):
    context = mixed_context(MixedOracle(), mixed_shards)
    index = context.index.model_copy(update={"classifiers": {}})
    result = evaluate_generative(dataclasses.replace(context, index=index), {"coherence", "frechet"})
    assert result.metrics["coherence/conditional"] == 1
    assert "cmvae classifiers" in result.left_out["coherence/photo"]
    assert "two modalities with a classifier" in result.left_out["coherence/unconditional"]
    assert not [name for name in result.metrics if not name.startswith("coherence/")]
