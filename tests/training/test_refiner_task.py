"""The refiner's loss against its expectation and by hand; what it is conditioned on; what it leaves alone."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from refining import (
    NAMES,
    NETWORK,
    image_modality,
    make_cmvae,
    make_refiner,
    record_calls,
    signal_power,
    silence,
)
from safetensors.torch import load_file

from cmvae.models.refiner import Refiner
from cmvae.training.refiner_task import RefinerTask
from cmvae.utils.errors import UserError
from cmvae.utils.seeds import sample_generators

CPU = torch.device("cpu")


def make_task(cmvae=None, **arguments):
    """A task on three modalities of 8×8, in training mode."""
    return RefinerTask(make_refiner(**arguments), cmvae or make_cmvae()).train()


def make_batch(size=9, names=NAMES):
    torch.manual_seed(1)
    return {
        **{name: torch.rand(size, 3, 8, 8) for name in names},
        "valid": torch.ones(size, dtype=torch.bool),
        "mask": torch.ones(size, len(NAMES), dtype=torch.bool),
        "label": torch.arange(size) % 3,
        "key": [str(i) for i in range(size)],
        "_seed": 2,
        "_place": range(size),
    }


def run(task, batch, seed=2):
    """Loss, report and what was drawn, of one step with this seed."""
    drawn = {}
    draw = task.draw_noise

    def draw_and_keep(*arguments):
        drawn.update(draw(*arguments))
        return drawn

    task.draw_noise = draw_and_keep
    loss, report = task({**batch, "_seed": seed})
    task.draw_noise = draw
    return loss, report, drawn


def another_decoder(cmvae):
    """The same posteriors, but other reconstructions of them."""
    other = copy.deepcopy(cmvae)
    with torch.no_grad():
        for decoder in other.decoders.values():
            for parameter in decoder.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return other


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_the_loss_of_a_network_that_says_nothing_is_the_power_of_its_target(prediction, weighting):
    """Per pixel E[ε²] = 1, x_0² or ᾱ + (1 − ᾱ) x_0², times the weight of Hang et al. for its SNR."""
    num_timesteps, gamma = 1000, 0.5
    diffusion = {
        "num_timesteps": num_timesteps,
        "prediction": prediction,
        "loss_weighting": weighting,
        "min_snr_gamma": gamma,
    }
    task = make_task(diffusion=diffusion)
    silence(task.refiner)
    loss, report, drawn = run(task, batch := make_batch(100))

    power, expected, variance = signal_power(num_timesteps), {}, 0.0
    for name in NAMES:
        x = 2 * batch[name].double().numpy() - 1
        alpha = power[drawn[name].timesteps.numpy()][:, None, None, None]
        # The target is a·ε − b·x_0.
        a, b = {
            "epsilon": (1.0 + 0 * alpha, 0 * alpha),
            "v": (np.sqrt(alpha), np.sqrt(1 - alpha)),
            "sample": (0 * alpha, -1.0 + 0 * alpha),
        }[prediction]
        snr = alpha / (1 - alpha)
        weight = np.ones_like(alpha)
        if weighting == "min_snr":
            weight = np.minimum(snr, gamma) / {"epsilon": snr, "v": snr + 1, "sample": 1.0}[prediction]
        expected[name] = (weight * (a**2 + b**2 * x**2)).mean()
        # Var[(aε − bx)²] = 2a⁴ + 4a²b²x².
        variance += (weight**2 * (2 * a**4 + 4 * a**2 * b**2 * x**2)).mean() / x.size / len(NAMES) ** 2
        assert report[f"denoising_loss/{name}"].mean().item() == pytest.approx(expected[name], rel=0.05)
    bound = 5 * math.sqrt(variance) + 1e-5
    assert bound < 0.06 * loss.item()
    assert loss.item() == pytest.approx(np.mean(list(expected.values())), abs=bound)
    # The weights matter by more than the bound.
    if weighting == "min_snr":
        silent = make_task(diffusion={**diffusion, "loss_weighting": "uniform"})
        silence(silent.refiner)
        assert run(silent, batch)[0].item() != pytest.approx(loss.item(), rel=0.2)


@pytest.mark.parametrize("sharing", ["per_modality", "shared"])
def test_the_loss_is_the_error_at_the_noised_image_over_valid_samples(sharing):
    task = make_task(sharing=sharing, conditioning={"dropout": 0.3, "noise": 0.2})
    calls = record_calls(task.refiner)
    batch = make_batch(6)
    batch["valid"] = torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    loss, report, drawn = run(task, batch)
    assert len(calls) == (3 if sharing == "per_modality" else 1)
    together = {name: torch.cat([call[name] for call in calls]) for name in calls[0]}
    power = torch.from_numpy(signal_power(20)).float()
    total = torch.zeros(6)
    for m, name in enumerate(NAMES):
        call = {key: value[6 * m : 6 * m + 6] for key, value in together.items()}
        noise = drawn[name]
        assert torch.equal(call["timesteps"], noise.timesteps)
        assert torch.equal(call["present"], noise.present)
        assert set(call["modality"].tolist()) == {m if sharing == "shared" else 0}
        for i in range(6):
            alpha = power[noise.timesteps[i]]
            noisy = alpha.sqrt() * (2 * batch[name][i] - 1) + (1 - alpha).sqrt() * noise.image[i]
            torch.testing.assert_close(call["noisy"][i], noisy, rtol=1e-5, atol=1e-5)
            error = ((call["output"][i] - noise.image[i]) ** 2).mean()
            torch.testing.assert_close(report[f"denoising_loss/{name}"][i], error)
            total[i] += error.detach() / 3
    torch.testing.assert_close(report["denoising_loss"], total)
    torch.testing.assert_close(loss.detach(), total[[0, 2, 3, 5]].mean())
    assert loss.item() != pytest.approx(total.mean().item(), rel=1e-3), "padding does not count"


@pytest.mark.parametrize("shared", ["mean", "sample"])
@pytest.mark.parametrize("sharing", ["per_modality", "shared"])
def test_the_condition_is_a_reconstruction_from_the_source_that_was_drawn(sharing, shared):
    """Sample by sample: z of q(z|x_source), w ~ p(w), decoded, in [−1, 1], and noise on it."""
    task = make_task(sharing=sharing, conditioning={"latent": True, "noise": 0.25, "shared": shared})
    calls = record_calls(task.refiner)
    _, _, drawn = run(task, batch := make_batch())
    conditions = torch.cat([call["reconstruction"] for call in calls]).chunk(3)
    latents = torch.cat([call["latent"] for call in calls]).chunk(3)
    cmvae, sources = task.cmvae, set()
    for name, condition, latent in zip(NAMES, conditions, latents, strict=True):
        noise = drawn[name]
        for i, source in enumerate(noise.source.tolist()):
            posterior = cmvae.encode({NAMES[source]: batch[NAMES[source]][i : i + 1]})[NAMES[source]].shared
            z = posterior.loc + (posterior.scale * noise.shared[i] if shared == "sample" else 0)
            w = cmvae.private_scale * noise.private[i]
            image = cmvae.decode(z, {name: w[None]})[name][0].clamp(0, 1)
            torch.testing.assert_close(latent[i], z[0], rtol=1e-4, atol=1e-5)
            expected = 2 * image - 1 + 0.25 * noise.condition[i]
            torch.testing.assert_close(condition[i], expected, rtol=1e-4, atol=1e-4)
            sources.add((name, NAMES[source]))
    assert len(sources) >= 7, "of nine pairs of source and target"
    # From another source it is another z, by far more than the tolerance.
    swapped = (
        cmvae.encode({"a": batch["a"]})["a"].shared.loc - cmvae.encode({"b": batch["b"]})["b"].shared.loc
    )
    assert swapped.abs().amax(1).min() > 1e-3


def test_sources_are_uniform_over_all_modalities_and_drawn_for_each_target():
    size = 3000
    noise = make_task().draw_noise(
        {name: torch.zeros(size, 3, 1, 1) for name in NAMES},
        torch.ones(size, 3, dtype=torch.bool),
        sample_generators(0, range(size), CPU),
    )
    # Five standard deviations of a count.
    bound = 5 * math.sqrt(size * (1 / 3) * (2 / 3))
    for name in NAMES:
        np.testing.assert_allclose(np.bincount(noise[name].source, minlength=3), size / 3, atol=bound)
        steps = np.bincount(noise[name].timesteps, minlength=20)
        np.testing.assert_allclose(steps, size / 20, atol=5 * math.sqrt(size / 20))
    pairs = np.bincount(3 * noise["a"].source + noise["b"].source, minlength=9)
    np.testing.assert_allclose(pairs, size / 9, atol=5 * math.sqrt(size / 9))


def test_the_parts_of_a_batch_draw_the_noise_of_the_whole():
    task, batch = make_task(conditioning={"dropout": 0.5}), make_batch()

    def draw(places):
        images = {name: batch[name][places] for name in NAMES}
        return task.draw_noise(images, batch["mask"][places], sample_generators(5, places, CPU))

    whole, parts = draw(range(9)), [draw(range(4)), draw(range(4, 9))]
    for name, noise in whole.items():
        for field in dataclasses.fields(noise):
            found = torch.cat([getattr(part[name], field.name) for part in parts])
            assert torch.equal(found, getattr(noise, field.name)), field.name
    assert not torch.equal(whole["a"].image, whole["b"].image)


@pytest.mark.parametrize("source", ["self", "none"])
def test_the_source_is_the_own_modality_where_it_is_to_be(source):
    task = make_task(conditioning={"source": source, "dropout": 0.1})
    noise = task.draw_noise(
        {name: torch.zeros(200, 3, 1, 1) for name in NAMES},
        torch.ones(200, 3, dtype=torch.bool),
        sample_generators(0, range(200), CPU),
    )
    for m, name in enumerate(NAMES):
        assert set(noise[name].source.tolist()) == {m}
    assert any(noise[name].present.any() for name in NAMES) == (source == "self")


@pytest.mark.parametrize("dropout", [0.0, 0.1, 0.6])
def test_the_condition_is_left_out_for_the_share_that_was_asked_for(dropout):
    size = 5000
    noise = make_task(conditioning={"dropout": dropout}).draw_noise(
        {"b": torch.zeros(size, 3, 1, 1)},
        torch.ones(size, 3, dtype=torch.bool),
        sample_generators(0, range(size), CPU),
    )
    share = 1 - noise["b"].present.float().mean().item()
    assert share == pytest.approx(dropout, abs=5 * math.sqrt(dropout * (1 - dropout) / size))


def test_only_where_there_is_a_condition_the_reconstruction_matters():
    cmvae = make_cmvae()
    batch = make_batch(24)
    for conditioning in ({"source": "any", "dropout": 0.4}, {"source": "self"}, {"source": "none"}):
        # z is left out with the rest.
        conditioning = {**conditioning, "latent": True}
        _, first, drawn = run(make_task(cmvae, conditioning=conditioning), batch)
        _, second, again = run(make_task(another_decoder(cmvae), conditioning=conditioning), batch)
        for name in NAMES:
            present = drawn[name].present
            assert torch.equal(present, again[name].present)
            differs = first[f"denoising_loss/{name}"] != second[f"denoising_loss/{name}"]
            assert torch.equal(differs, present)
        assert present.float().mean().item() == {"none": 0.0, "self": 1.0}.get(
            conditioning["source"], pytest.approx(0.6, abs=0.3)
        )


@pytest.mark.parametrize("sharing", ["per_modality", "shared"])
def test_the_latent_is_a_condition_if_it_was_asked_for(sharing):
    refiners = {
        latent: make_refiner(sharing=sharing, conditioning={"latent": latent}) for latent in (True, False)
    }
    torch.manual_seed(3)
    noisy, reconstruction = torch.randn(2, 4, 3, 8, 8)
    timesteps, modality = torch.full((4,), 7), torch.zeros(4, dtype=torch.long)
    present = torch.tensor([True, False, True, False])
    z = torch.randn(2, 4, 4)
    for latent, refiner in refiners.items():
        outputs = [
            refiner.predict(group, noisy, timesteps, reconstruction, modality, shared, present)
            for group in refiner.groups
            for shared in z
        ]
        for one, other in zip(outputs[::2], outputs[1::2], strict=True):
            differs = (one != other).flatten(1).any(1)
            assert torch.equal(differs, present & latent)


@pytest.mark.parametrize("sharing", ["per_modality", "shared"])
def test_latents_alone_can_be_the_condition(sharing):
    """z is the location and w a sample of the image's own posteriors; no decoder is used."""
    cmvae, batch = make_cmvae(), make_batch(6)
    task = make_task(cmvae, sharing=sharing, conditioning={"source": "latent", "dropout": 0.4})
    calls = record_calls(task.refiner)
    _, first, noise = run(task, batch)
    posteriors = cmvae.encode({name: batch[name] for name in NAMES})
    latents = torch.cat([call["latent"] for call in calls]).chunk(len(NAMES))
    for name, latent in zip(NAMES, latents, strict=True):
        w = posteriors[name].private.sample(noise[name].private)
        torch.testing.assert_close(latent, torch.cat([posteriors[name].shared.loc, w], dim=1))
    assert {call["noisy"].shape[1] for call in calls} == {3}
    again = make_task(
        another_decoder(cmvae), sharing=sharing, conditioning={"source": "latent", "dropout": 0.4}
    )
    _, second, _ = run(again, batch)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_where_the_condition_is_left_out_latents_do_not_matter():
    refiner = make_refiner(conditioning={"source": "latent", "dropout": 0.1})
    torch.manual_seed(3)
    noisy, timesteps = torch.randn(4, 3, 8, 8), torch.full((4,), 7)
    present = torch.tensor([True, False, True, False])
    one, other = (
        refiner.predict("a", noisy, timesteps, None, torch.zeros(4, dtype=torch.long), latent, present)
        for latent in torch.randn(2, 4, 7)
    )
    assert torch.equal((one != other).flatten(1).any(1), present)


def test_a_shared_network_is_told_which_modality_it_looks_at():
    refiner = make_refiner(sharing="shared")
    torch.manual_seed(3)
    noisy, reconstruction = (torch.randn(1, 3, 8, 8).expand(3, -1, -1, -1) for _ in range(2))
    arguments = torch.full((3,), 7), reconstruction, torch.arange(3), torch.zeros(3, 4), torch.ones(3).bool()
    outputs = refiner.predict("shared", noisy, *arguments)
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
    assert (outputs[1] - outputs[2]).abs().max() > 1e-4


@pytest.mark.parametrize("sharing", ["per_modality", "shared"])
def test_the_cmvae_stays_as_it_is_and_is_no_part_of_the_task(sharing):
    cmvae = make_cmvae()
    before = {name: tensor.clone() for name, tensor in cmvae.state_dict().items()}
    task = make_task(cmvae, sharing=sharing, conditioning={"latent": True, "dropout": 0.2})
    start = {name: tensor.clone() for name, tensor in task.state_dict().items()}
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        loss, report, _ = run(task, make_batch(), seed=step)
        assert not any(value.requires_grad for value in report.values())
        loss.backward()
        without = [name for name, p in task.named_parameters() if p.grad is None]
        assert without == [], "data parallelism waits for the gradient of every parameter"
        optimizer.step()
        optimizer.zero_grad()
    assert all(name.startswith("refiner.") for name in [*start, *dict(task.named_parameters())])
    assert list(task.modules()).count(cmvae) == 0
    for name, tensor in cmvae.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(p.grad is None and not p.requires_grad for p in cmvae.parameters())
    assert not cmvae.training, "whatever mode the task is in"
    # What was to be trained was.
    moved = [name for name, tensor in task.state_dict().items() if not torch.equal(tensor, start[name])]
    assert set(moved) >= {name for name in start if "conv_out" in name or "latent" in name}


def test_the_loss_is_fp32_whatever_the_precision_around():
    results = []
    for inner, outer in ((None, None), (torch.bfloat16, None), (torch.bfloat16, torch.bfloat16)):
        task = make_task(autocast_dtype=inner)
        calls = record_calls(task.refiner)
        with torch.autocast("cpu", dtype=outer, enabled=outer is not None):
            loss, report = task(make_batch())
        assert {value.dtype for value in (loss, *report.values())} == {torch.float32}
        assert {call["output"].dtype for call in calls} == {inner or torch.float32}
        results.append(loss)
    full, inside, surrounded = results
    # A launcher's autocast changes nothing, not one bit: the refiner decides over its own precision.
    assert torch.equal(inside, surrounded)
    assert not torch.equal(full, inside)
    torch.testing.assert_close(inside, full, rtol=1e-2, atol=0)


def test_dropout_of_the_network_is_for_training_alone():
    task = make_task(network={"dropout": 0.5})
    batch = make_batch()

    def losses():
        found = []
        for seed in (5, 6):
            torch.manual_seed(seed)  # of dropout alone
            found.append(task(batch)[0].item())
        return found

    first, second = losses()
    assert first != second
    task.eval()
    first, second = losses()
    assert first == second


def test_validation_metrics_are_means_of_the_report():
    values = {"denoising_loss": [1.0, 3.0], "denoising_loss/a": [0.0, 4.0], "label": [0, 7]}
    records = {name: np.array(x) for name, x in values.items()}
    assert make_task().validation_metrics(records) == {"denoising_loss": 2.0, "denoising_loss/a": 2.0}


def test_pictures_show_inputs_generations_and_refinements():
    task = make_task().eval()
    figures = task.show(make_batch(), 4, torch.Generator().manual_seed(0)).figures
    assert set(figures) == {"refinements"}
    figure = figures["refinements"]()
    # A column a target; a row of inputs, then two a source.
    assert len(figure.axes) == 3 * (1 + 2 * 3)
    titles = [axis.get_ylabel() for axis in figure.axes if axis.get_ylabel()]
    assert titles == ["input", "from a", "refined", "from b", "refined", "from c", "refined"]
    pixels = np.stack([np.asarray(axis.images[0].get_array()) for axis in figure.axes]).reshape(
        7, 3, 10, 37, 3
    )
    generated, refined = pixels[1::2], pixels[2::2]
    assert (np.abs(generated - refined).max((2, 3, 4)) > 0.1).all()


def test_an_export_holds_the_state_that_was_given(tmp_path):
    task = make_task()
    state = {name: torch.randn_like(tensor) for name, tensor in task.state_dict().items()}
    task.export(tmp_path / "export", state, [])
    written = load_file(tmp_path / "export/model.safetensors")
    assert {f"refiner.{name}" for name in written} == state.keys()
    assert all(torch.equal(tensor, state[f"refiner.{name}"]) for name, tensor in written.items())
    again = Refiner.from_pretrained(tmp_path / "export")
    assert again.cmvae_sha256 == task.frozen_hashes["cmvae_sha256"]


def test_modalities_of_unlike_shapes_are_refined_each_by_its_own_network():
    modalities = {"a": image_modality(3, 8, 8), "b": image_modality(1, 8, 12)}
    task = make_task(make_cmvae(modalities), modalities=modalities)
    batch = {"a": torch.rand(5, 3, 8, 8), "b": torch.rand(5, 1, 8, 12), "valid": torch.ones(5).bool()}
    batch |= {"mask": torch.ones(5, 2, dtype=torch.bool), "_seed": 0, "_place": range(5)}
    loss, report, _ = run(task, batch)
    torch.testing.assert_close(
        report["denoising_loss/a"] + report["denoising_loss/b"], 2 * report["denoising_loss"]
    )
    assert loss.isfinite()
    with pytest.raises(UserError, match=r"refiner\.sharing.*b has \(1, 8, 12\).*per_modality"):
        make_refiner(modalities, sharing="shared", network=NETWORK)
