"""The task: what it reports, in which precision, and what it says about clusters."""

import copy

import numpy as np
import pytest
import torch

from cmvae.clustering import find_cluster_means
from cmvae.config import AlignmentConfig, ModalityConfig, ModelConfig, ObjectiveConfig
from cmvae.modalities import ImageModality, TextModality
from cmvae.modalities.text import SPECIAL_TOKENS
from cmvae.models.cmvae import CMVAE
from cmvae.training.cmvae_task import fill_missing
from cmvae.training.tasks import CMVAETask
from cmvae.utils.seeds import sample_generators

MODALITY = ImageModality(shape=(3, 8, 8))
NAMES = ("a", "b", "c")


def make_task(
    autocast_dtype=None, num_samples=2, cross_sources="all", refit_clusters_at=(), alignment=None, names=NAMES
):
    torch.manual_seed(0)
    config = ModelConfig(
        shared_dim=5,
        private_dim=4,
        num_clusters=6,
        modalities={name: ModalityConfig(width=4) for name in names},
    )
    model = CMVAE(config, dict.fromkeys(names, MODALITY), autocast_dtype)
    objective = ObjectiveConfig(
        num_samples=num_samples,
        beta=1.5,
        cross_sources=cross_sources,
        refit_clusters_at=refit_clusters_at,
        alignment=AlignmentConfig(**(alignment or {})),
    )
    return CMVAETask(model, objective)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    return {
        **{name: torch.rand(9, 3, 8, 8) for name in NAMES},
        "valid": torch.ones(9, dtype=torch.bool),
        "mask": torch.ones(9, 3, dtype=torch.bool),
        "label": torch.arange(9) % 3,
        "key": [str(i) for i in range(9)],
        "_seed": 2,
        "_place": range(9),
    }


def test_each_decoder_and_encoder_runs_once_a_step(batch):
    task = make_task()
    calls = []
    for kind in ("encoders", "decoders"):
        for name, network in getattr(task.model, kind).items():
            network.register_forward_hook(
                lambda _, inputs, __, where=(kind, name): calls.append((*where, len(inputs[0])))
            )
    task(batch)
    # A decoder decodes every target at once: three sources, two samples, nine members of the batch.
    expected = [("encoders", name, 9) for name in NAMES] + [("decoders", name, 3 * 2 * 9) for name in NAMES]
    assert sorted(calls) == sorted(expected)


def run_step(objective, batch):
    """Loss, gradients, the sizes of decoder calls, and the bytes kept for the backward pass."""
    task = CMVAETask(make_task().model, objective)
    sizes, kept = [], []
    for network in task.model.decoders.values():
        network.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    keep = lambda tensor: kept.append(tensor.nbytes) or tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss, _ = task(batch)
    in_forward = list(sizes)
    loss.backward()
    return loss, [p.grad for p in task.parameters()], in_forward, len(sizes) - len(in_forward), sum(kept)


@pytest.mark.parametrize("name", ["iwae", "dreg"])
def test_decoding_in_parts_changes_nothing_but_what_is_kept(batch, name):
    whole = ObjectiveConfig(name=name, num_samples=2)
    loss, gradients, sizes, again, kept = run_step(whole, batch)
    assert (sizes, again) == ([3 * 2 * 9] * 3, 0)
    parts = whole.model_copy(update={"decoder_checkpoint_above": 20})
    loss_in_parts, gradients_in_parts, sizes, again, kept_in_parts = run_step(parts, batch)
    # Neither a batch nor a source ends where a part does.
    assert (sizes, again) == ([20, 14, 20] * 3, 2 * 3)
    torch.testing.assert_close(loss_in_parts, loss, rtol=1e-6, atol=0)
    for found, expected in zip(gradients_in_parts, gradients, strict=True):
        # Sums in another order, of terms that cancel.
        assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()
    # A part that is kept whole leaves less to compute again.
    *_, sizes, again, kept_in_most = run_step(
        whole.model_copy(update={"decoder_checkpoint_above": 40}), batch
    )
    assert (sizes, again) == ([14, 40] * 3, 3)
    # What the encoders, the densities and the last part of each decoder need stays.
    *_, kept_in_more = run_step(whole.model_copy(update={"decoder_checkpoint_above": 6}), batch)
    assert kept_in_more < 0.5 * kept
    assert kept_in_more < kept_in_parts < 0.7 * kept < kept_in_most < kept


def test_decoders_with_batch_norm_are_never_decoded_in_parts():
    modality = TextModality(shape=(8,), categories=(*SPECIAL_TOKENS, "red", "blue"))
    config = ModelConfig(
        shared_dim=5, private_dim=4, num_clusters=6, modalities={"caption": ModalityConfig(width=4)}
    )
    torch.manual_seed(0)
    task = CMVAETask(
        CMVAE(config, {"caption": modality}), ObjectiveConfig(num_samples=4, decoder_checkpoint_above=3)
    )
    sizes = []
    task.model.decoders["caption"].register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    ones = {"valid": torch.ones(2, dtype=torch.bool), "mask": torch.ones(2, 1, dtype=torch.bool)}
    task({"caption": torch.randint(5, (2, 8)), **ones, "_seed": 0, "_place": range(2)})
    assert sizes == [4 * 2]


def test_of_drawn_cross_sources_each_is_used_once_a_step_and_none_is_preferred(batch):
    task = make_task(num_samples=1, cross_sources=1)
    sizes = []
    for network in task.model.decoders.values():
        network.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    task(batch)
    assert sizes == [2 * 9] * 3, "from itself and from one other, nine members of the batch"
    one = [torch.Generator()]
    shifts = [task.draw_noise(one, seed).cross_shifts for seed in range(200)]
    assert set(shifts) == {(1,), (2,)}
    assert 70 <= shifts.count((1,)) <= 130
    assert task.eval().draw_noise(one, 0).cross_shifts == (1, 2), "validation sees all"


def test_the_parts_of_a_batch_draw_the_noise_of_the_whole():
    task, cpu = make_task(), torch.device("cpu")

    def draw(places, seed=5):
        return task.draw_noise(sample_generators(seed, places, cpu), seed)

    whole, parts = draw(range(9)), [draw(range(4)), draw(range(4, 9))]
    assert whole.shared.shape == (3, 2, 9, 5)
    assert whole.private.shape == (3, 3, 2, 9, 4)
    assert torch.equal(torch.cat([part.shared for part in parts], -2), whole.shared)
    assert torch.equal(torch.cat([part.private for part in parts], -2), whole.private)
    # Samples, modalities and steps have noise of their own.
    assert len(whole.shared.unique()) == whole.shared.numel()
    assert not (draw(range(9), seed=6).shared == whole.shared).any()


def test_densities_are_fp32_whatever_the_precision_around(batch):
    results = []
    for inner, outer in ((None, None), (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16)):
        task = make_task(inner)
        with torch.autocast("cpu", dtype=outer, enabled=outer is not None):
            loss, report = task(batch)
        assert loss.dtype == torch.float32
        assert {value.dtype for value in report.values()} == {torch.float32}
        results.append(loss)
    full, inside, surrounded = results
    # A launcher's autocast changes nothing, not one bit: the model decides over its own precision.
    assert torch.equal(inside, surrounded)
    assert not torch.equal(full, inside)
    torch.testing.assert_close(inside, full, rtol=5e-3, atol=0)


def test_every_parameter_takes_a_gradient(batch):
    """Data parallelism waits for the gradient of every parameter."""
    task = make_task()
    task(batch)[0].backward()
    without = [name for name, p in task.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


def test_the_report_adds_up_to_the_bound(batch):
    task = make_task(num_samples=1)
    _, report = task(batch)
    assert set(report) == set(task.term_names)
    likelihood = sum(report[f"log_likelihood/{name}"] for name in NAMES)
    prior = report["log_prior/z"] + report["log_prior/w"]
    posterior = report["log_posterior/z"] + report["log_posterior/w"]
    # With one sample the bound is linear in its terms.
    torch.testing.assert_close(report["bound"], likelihood + 1.5 * (prior - posterior), rtol=1e-4, atol=1e-3)


def test_evaluation_reports_the_clusters_at_the_posteriors_locations(batch):
    task = make_task().eval()
    _, report = task(batch)
    posteriors = task.model.encode({name: batch[name] for name in NAMES})
    torch.testing.assert_close(report["shared_loc"][:, 1], posteriors["b"].shared.loc)
    assert report["log_density"].shape == (9, 3, 6)
    assert report["log_weights"].shape == (9, 6)
    torch.testing.assert_close(report["log_weights"].exp().sum(1), torch.ones(9))


def records_of(clusters, labels):
    """A report in which every modality places sample i in `clusters[i]` beyond doubt."""
    density = np.full((len(clusters), 3, 6), -50.0)
    for i, cluster in enumerate(clusters):
        density[i, :, cluster] = 0
    terms = {name: np.full(len(clusters), float(i)) for i, name in enumerate(make_task().term_names)}
    return {
        **terms,
        "log_weights": np.full((len(clusters), 6), -np.log(6)),
        "log_density": density,
        "shared_loc": np.zeros((len(clusters), 3, 5)),
        "present": np.ones((len(clusters), 3), dtype=bool),
        "label": np.array(labels),
    }


def test_validation_metrics_know_occupancy_and_agreement():
    metrics = make_task().validation_metrics(records_of([0, 0, 4, 4], [1, 1, 0, 0]))
    assert metrics["clusters/occupied"] == 2
    assert metrics["clusters/perplexity"] == pytest.approx(2)
    assert metrics["clusters/largest_share"] == 0.5
    assert metrics["clustering/acc"] == metrics["clustering/nmi"] == 1
    assert metrics["bound"] == 0
    assert metrics["log_likelihood/b"] == 2


def test_a_refit_finds_means_in_what_is_there_and_only_when_it_is_due(batch):
    task = make_task(refit_clusters_at=[2, 4])
    read = as_read(batch)
    read["mask"] = torch.rand(9, 3, generator=torch.Generator().manual_seed(0)) < 0.8
    read["mask"][:, 0] = True
    assert task.reinitialize(3, lambda size: [read]) == {}
    assert len(task.reinitialize(2, lambda size: [read])) == 2
    values = task.reinitialize(4, lambda size: [read])
    assert task.training
    prior = task.model.cluster_prior
    assert set(values) == {prior.means, prior.logits}
    assert (values[prior.logits] == 0).all()
    task.eval()
    posteriors = task.model.encode({name: read[name] / 255 for name in NAMES})
    shared_loc = torch.stack([posterior.shared.loc for posterior in posteriors.values()], 1)
    expected = find_cluster_means(shared_loc.detach().numpy(), read["mask"].numpy(), num_clusters=6)
    torch.testing.assert_close(values[prior.means], torch.from_numpy(expected), rtol=1e-3, atol=1e-4)


def loss_and_gradients(task, batch):
    loss, report = task(batch)
    loss.backward()
    return loss, report, {name: p.grad for name, p in task.named_parameters() if p.grad is not None}


def test_without_a_weight_the_objective_is_the_published_one_to_the_last_bit(batch):
    plain, off = make_task(), make_task(alignment={"weight": 0, "augment": {"a": ["flip"]}})
    for task in (plain, off):
        task.begin(100)
        task.reinitialize(0, lambda size: [])
    (loss, _, gradients), (other, report, others) = (loss_and_gradients(t, batch) for t in (plain, off))
    assert loss == other
    assert "alignment" not in report
    assert gradients.keys() == others.keys()
    assert all(torch.equal(gradients[name], others[name]) for name in gradients)


def test_the_contrast_is_a_term_beside_the_bound(batch):
    (plain, bound, _), (both, report, _) = (
        loss_and_gradients(make_task(alignment={"weight": weight}), batch) for weight in (0, 7)
    )
    assert torch.equal(report["bound"], bound["bound"])
    torch.testing.assert_close(both, plain + 7 * report["alignment"].mean())


def test_the_first_phase_trains_the_encoders_of_z_alone(batch):
    task = make_task(alignment={"weight": 5, "pretrain": 0.25})
    task.begin(8)
    for step in range(4):
        values = task.reinitialize(step, lambda size: [as_read(batch)])
        assert (len(values) > 0) == (step == 2)  # means are found when it ends
        _, report, gradients = loss_and_gradients(task, batch)
        task.zero_grad()
        alone = step < 2
        assert task.progress_metric == ("alignment" if alone else "bound")
        assert set(report) == {"alignment"} if alone else "bound" in report
        trained = [name for name, _ in task.named_parameters() if name in gradients]
        if alone:
            assert all(".shared_trunk." in name or ".shared_heads.loc." in name for name in trained)
            assert {name.split(".")[2] for name in trained} == set(NAMES)
        else:
            assert any("decoders" in name for name in trained)


def as_read(batch):
    """A batch as a reader yields it."""
    read = {name: (batch[name] * 255).byte() for name in NAMES}
    return read | {key: batch[key] for key in ("valid", "label", "mask")}


def test_what_is_augmented_is_so_for_the_contrast_in_training_only(batch):
    settings = {"weight": 5, "augment": {"a": ["flip", "crop"]}}
    changed, plain = make_task(alignment=settings), make_task(alignment={"weight": 5})
    (_, with_it, _), (_, without, _) = (loss_and_gradients(task, batch) for task in (changed, plain))
    assert torch.equal(with_it["bound"], without["bound"])
    assert not torch.equal(with_it["alignment"], without["alignment"])
    for task in (changed, plain):
        task.eval()
    (_, with_it, _), (_, without, _) = (loss_and_gradients(task, batch) for task in (changed, plain))
    assert torch.equal(with_it["alignment"], without["alignment"])


def test_one_modality_has_nothing_to_be_compared_with(batch):
    task = make_task(alignment={"weight": 5, "pretrain": 3}, names=("a",))
    task.begin(10)
    batch["mask"] = batch["mask"][:, :1]
    assert task.reinitialize(0, lambda size: []) == {}
    _, report = task(batch)
    assert "bound" in report
    assert "alignment" not in report


def test_what_is_missing_does_not_count_in_the_contrast(batch):
    task = make_task(alignment={"weight": 5})
    batch["mask"][3:, 1] = False
    batch["mask"][5, 2] = False
    _, report = task(batch)
    assert report["alignment"][5] == 0  # has one modality only
    changed = {**batch, "b": batch["b"].clone()}
    changed["b"][3:] = torch.rand(6, 3, 8, 8)
    torch.testing.assert_close(task(changed)[1]["alignment"], report["alignment"])


def test_without_labels_there_is_no_agreement():
    metrics = make_task().validation_metrics(records_of([0, 1, 2], [-1, -1, -1]))
    assert metrics["clusters/occupied"] == 3
    assert not any(name.startswith("clustering/") for name in metrics)
    some = make_task().validation_metrics(records_of([0, 0, 1, 5], [3, 3, 2, -1]))
    assert some["clustering/acc"] == 1, "only labelled samples count"


def test_missing_values_are_filled_in_turn_from_those_that_are_there():
    values = torch.arange(6.0)[:, None]

    def filled(*mask):
        return fill_missing(values, torch.tensor(mask, dtype=torch.bool)).flatten().tolist()

    assert filled(1, 1, 1, 1, 1, 1) == [0, 1, 2, 3, 4, 5]
    assert filled(0, 1, 0, 0, 1, 0) == [1, 1, 4, 1, 4, 4]
    assert filled(0, 0, 0, 0, 0, 1) == [5] * 6
    assert filled(0, 0, 0, 0, 0, 0) == [0, 1, 2, 3, 4, 5]


def test_batch_norm_sees_texts_that_are_there_only():
    vocabulary = (*SPECIAL_TOKENS, "red", "green", "blue")
    modalities = {
        "a": MODALITY,
        "text": TextModality(shape=(8,), categories=vocabulary, optional=True),
    }
    config = ModelConfig(
        shared_dim=3, private_dim=2, modalities={name: ModalityConfig(width=4) for name in modalities}
    )
    torch.manual_seed(0)
    model = CMVAE(config, modalities)
    alone = copy.deepcopy(model.encoders["text"])
    texts = torch.randint(3, 6, (4, 8))
    batch = {
        "a": torch.rand(4, 3, 8, 8),
        "text": texts * torch.tensor([1, 0, 1, 0])[:, None],
        "valid": torch.ones(4, dtype=torch.bool),
        "mask": torch.tensor([[True, True], [True, False]] * 2),
        "_seed": 0,
        "_place": range(4),
    }
    CMVAETask(model, ObjectiveConfig())(batch)
    alone(texts[::2])
    means = {name: value for name, value in alone.named_buffers() if name.endswith("running_mean")}
    assert len(means) == 8
    for name, expected in means.items():
        torch.testing.assert_close(model.encoders["text"].get_buffer(name), expected)
