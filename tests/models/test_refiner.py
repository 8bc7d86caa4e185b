"""Refiner: seeds, sharing, guidance, start, errors and export."""

import copy

import numpy as np
import pytest
import torch
from refining import (
    NAMES,
    NETWORK,
    PRIVATE_DIM,
    image_modality,
    make_cmvae,
    make_config,
    make_refiner,
    record_calls,
    signal_power,
    tell,
)

from cmvae import CMVAE
from cmvae.config import SamplerConfig
from cmvae.models.refiner import Refiner
from cmvae.utils.errors import UserError

SHARING = ["per_modality", "shared"]


@pytest.fixture
def images():
    torch.manual_seed(1)
    return {name: torch.rand(5, 3, 8, 8) for name in NAMES}


@pytest.fixture
def shared():
    torch.manual_seed(2)
    return torch.randn(5, 4)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize(
    "sampler",
    [
        {"name": "dpm_solver", "num_steps": 4, "guidance": 2.0},
        {"name": "ddpm", "num_steps": 4, "start": 0.5},
        {"name": "ddim", "num_steps": 3, "start": 0.5},
    ],
    ids=lambda sampler: sampler["name"],
)
def test_refined_images_do_not_depend_on_batch_or_other_modalities(images, shared, sharing, sampler):
    conditioning = {"latent": True, "dropout": 0.1}
    refiner = make_refiner(sharing=sharing, sampler=sampler, conditioning=conditioning)
    seeds = [3, 2**62 - 1, 0, 7, 3]
    whole = refiner.refine(images, shared, seeds=seeds)
    for name in NAMES:
        assert whole[name].shape == (5, 3, 8, 8)
        assert whole[name].min() >= 0
        assert whole[name].max() <= 1
        assert whole[name].std() > 0.05

    order = [4, 1, 3, 0, 2]
    permuted = refiner.refine(
        {name: images[name][order] for name in reversed(NAMES)},
        shared[order],
        seeds=[seeds[i] for i in order],
    )
    some = refiner.refine({name: images[name] for name in ("c", "a")}, shared, seeds=seeds)
    for name in NAMES:
        torch.testing.assert_close(permuted[name], whole[name][order], rtol=0, atol=1e-5)
        if name != "b":
            torch.testing.assert_close(some[name], whole[name], rtol=0, atol=1e-5)
    for i in range(5):
        alone = refiner.refine({"b": images["b"][i : i + 1]}, shared[i : i + 1], seeds=seeds[i : i + 1])
        torch.testing.assert_close(alone["b"][0], whole["b"][i], rtol=0, atol=1e-5)
    torch.manual_seed(8)
    assert all(torch.equal(x, whole[name]) for name, x in refiner.refine(images, shared, seeds=seeds).items())


@pytest.mark.parametrize("sharing", SHARING)
def test_refined_images_depend_on_seed_modality_reconstruction_and_latent(images, shared, sharing):
    refiner = make_refiner(sharing=sharing, conditioning={"latent": True})
    same = {name: images["a"][:1].expand(2, -1, -1, -1) for name in NAMES}
    z = shared[:1].expand(2, -1)

    def refine(given=same, shared=z, seeds=(4, 4)):
        return refiner.refine(given, shared, seeds=seeds)

    base = refine()
    torch.testing.assert_close(base["a"][0], base["a"][1], rtol=0, atol=1e-5)
    assert (base["a"] - base["b"]).abs().max() > 1e-2, "noise, and network or label, differ per modality"
    assert (refine(seeds=(4, 5))["a"] - base["a"])[1].abs().max() > 1e-2
    other = {**same, "a": torch.stack([same["a"][0], images["a"][1]])}
    assert (refine(given=other)["a"] - base["a"])[1].abs().max() > 1e-4
    assert (refine(shared=shared[:2])["a"] - base["a"])[1].abs().max() > 1e-4


@pytest.mark.parametrize("sharing", SHARING)
def test_refined_images_depend_on_both_latents_and_on_no_reconstruction(images, shared, sharing):
    refiner = make_refiner(sharing=sharing, conditioning={"source": "latent"})
    torch.manual_seed(4)
    seeds, private = range(len(shared)), {name: torch.randn(len(shared), PRIVATE_DIM) for name in NAMES}
    base = refiner.refine(images, shared, private, seeds=seeds)
    other = {name: 1 - x for name, x in images.items()}
    assert all(
        torch.equal(x, base[name]) for name, x in refiner.refine(other, shared, private, seeds=seeds).items()
    )
    moved = refiner.refine(images, shared + 1, private, seeds=seeds)
    changed = refiner.refine(images, shared, {**private, "b": private["b"] + 1}, seeds=seeds)
    for name in NAMES:
        assert (moved[name] - base[name]).abs().max() > 1e-4
        assert torch.allclose(changed[name], base[name]) == (name != "b")
    for message, arguments in (("pass `shared`", (None, private)), ("pass `private`", (shared, None))):
        with pytest.raises(ValueError, match=message):
            refiner.refine(images, *arguments, seeds=seeds)


@pytest.mark.parametrize("sharing", SHARING)
def test_modalities_with_the_same_seed_have_different_noise(images, sharing):
    refiner = make_refiner(sharing=sharing, sampler={"num_steps": 1})
    calls = record_calls(refiner)
    refiner.refine(images, seeds=[9] * 5)
    noise = torch.cat([call["noisy"] for call in calls]).unflatten(0, (3, 5))
    assert torch.equal(noise[:, 0], noise[:, 4])
    first = noise[:, 0].flatten(1)
    correlation = torch.corrcoef(first) - torch.eye(3)
    assert correlation.abs().max() < 5 / np.sqrt(first.shape[1])


def test_without_seeds_the_default_generator_of_torch_is_used(images):
    refiner = make_refiner()
    refined = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        refined.append(refiner.refine(images)["a"])
    assert torch.equal(refined[0], refined[1])
    assert not torch.equal(refined[0], refined[2])
    assert len({image.sum().item() for image in refined[0]}) == 5, "each sample has its own seed"


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver"])
@pytest.mark.parametrize(("guidance", "times"), [(1.0, 1), (0.0, 2), (2.5, 2)])
def test_the_network_is_called_once_per_step_and_twice_with_guidance(images, sharing, name, guidance, times):
    sampler = {"name": name, "num_steps": 3, "guidance": guidance}
    refiner = make_refiner(sharing=sharing, sampler=sampler, conditioning={"dropout": 0.1})
    calls = record_calls(refiner)
    refiner.refine(images, seeds=range(5))
    networks = 1 if sharing == "shared" else 3
    assert len(calls) == 3 * times * networks
    samples = 15 if sharing == "shared" else 5
    assert {len(call["noisy"]) for call in calls} == {samples}
    presence = [call["present"].float().mean().item() for call in calls]
    assert presence == ([1.0] if times == 1 else [1.0, 0.0]) * 3 * networks
    if sharing == "shared":
        assert calls[0]["modality"].tolist() == [0] * 5 + [1] * 5 + [2] * 5
        calls.clear()
        refiner.refine({name: images[name] for name in ("c", "b")}, seeds=range(5))
        # A subset keeps the order and the labels of the refiner.
        assert calls[0]["modality"].tolist() == [1] * 5 + [2] * 5
        given = torch.cat([images["b"], images["c"]]) * 2 - 1
        torch.testing.assert_close(calls[0]["reconstruction"], given)


@pytest.mark.parametrize(
    ("start", "guidance_from", "guided"),
    [
        # With 20 time steps, the sampler takes 19, 14, 9 and 4, or 9, 7, 4 and 1 with start = 0.5. Guidance
        # acts at time steps of at least guidance_from · 20.
        (1.0, 0.0, [True, True, True, True]),
        (1.0, 0.45, [True, True, True, False]),
        (1.0, 0.46, [True, True, False, False]),
        (1.0, 0.99, [False, False, False, False]),
        (0.5, 0.35, [True, True, False, False]),
    ],
)
def test_guidance_acts_at_the_noisy_time_steps(images, start, guidance_from, guided):
    sampler = {"num_steps": 4, "start": start, "guidance": 2.0, "guidance_from": guidance_from}
    refiner = make_refiner(["a", "b"], sampler=sampler, conditioning={"dropout": 0.1})
    calls = record_calls(refiner)
    refiner.refine(images, seeds=range(5))
    expected = [present for twice in guided for present in ([True, False] if twice else [True])]
    for group in (calls[: len(expected)], calls[len(expected) :]):
        assert [bool(call["present"].all()) for call in group] == expected
        timesteps = [call["timesteps"][0].item() for call in group if call["present"].all()]
        assert [step >= guidance_from * 20 for step in timesteps] == guided


def test_guidance_from_the_end_on_equals_no_guidance(images):
    refined = []
    for sampler in ({"guidance": 3.0, "guidance_from": 0.99}, {"guidance": 1.0}, {"guidance": 3.0}):
        refiner = make_refiner(sampler=sampler, conditioning={"dropout": 0.1})
        refined.append(refiner.refine(images, seeds=range(5))["a"])
    assert torch.equal(refined[0], refined[1])
    assert not torch.equal(refined[0], refined[2])


def test_unconditional_ddpm_ignores_the_reconstruction(images):
    refiner = make_refiner(conditioning={"source": "none"})
    calls = record_calls(refiner)
    first = refiner.refine(images, seeds=range(5))
    assert not any(call["present"].any() for call in calls)
    second = refiner.refine({name: 1 - x for name, x in images.items()}, seeds=range(5))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_guidance_extrapolates_from_the_unconditional_prediction(images, prediction, guidance):
    """One step from pure noise, compared with a computation from the two predictions of the network."""
    refiner = make_refiner(
        ["a"],
        sampler={"name": "ddim", "num_steps": 1, "guidance": guidance},
        diffusion={"prediction": prediction},
        conditioning={"dropout": 0.1},
    )
    calls = record_calls(refiner)
    refined = refiner.refine(images, seeds=range(5))["a"]
    noisy, timesteps = calls[0]["noisy"], calls[0]["timesteps"]
    assert set(timesteps.tolist()) == {19}
    assert noisy.std().item() == pytest.approx(1, abs=0.1)
    condition = 2 * images["a"] - 1
    network, zeros = refiner.denoisers["a"].unet, torch.zeros_like(condition)
    label = refiner.denoisers["a"].modality.weight[[0] * 5]
    with torch.no_grad():
        conditional, unconditional = (
            network(torch.cat([noisy, given], 1), timesteps, class_labels=label).sample
            for given in (condition, zeros)
        )
    output = (1 - guidance) * unconditional + guidance * conditional
    alpha = signal_power(20)[19]
    signal, spread = np.sqrt(alpha), np.sqrt(1 - alpha)
    clean = {
        "epsilon": (noisy - spread * output) / signal,
        "v": signal * noisy - spread * output,
        "sample": output,
    }[prediction]
    expected = (clean.clamp(-1, 1) + 1) / 2
    torch.testing.assert_close(refined, expected, rtol=0, atol=1e-5)
    assert (conditional - unconditional).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver"])
def test_start_below_one_begins_with_the_noised_reconstruction(images, name):
    sampler = {"name": name, "num_steps": 2, "start": 0.25}
    refiner = make_refiner(["a"], sampler=sampler)
    calls = record_calls(refiner)
    refiner.refine(images, seeds=[6] * 5)
    alpha = signal_power(20)[4]
    assert calls[0]["timesteps"].tolist() == [4] * 5
    noise = (calls[0]["noisy"] - np.sqrt(alpha) * (2 * images["a"] - 1)) / np.sqrt(1 - alpha)
    # The remainder is the noise of the seed, the same for all images.
    torch.testing.assert_close(noise, noise[:1].expand(5, -1, -1, -1), rtol=0, atol=1e-4)
    assert noise[0].mean().item() == pytest.approx(0, abs=5 / np.sqrt(192))
    assert noise[0].std().item() == pytest.approx(1, abs=5 / np.sqrt(2 * 192))


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpm_solver"])
def test_a_perfect_network_gives_its_image(images, sharing, name):
    sampler = {"name": name, "num_steps": 4}
    refiner = make_refiner(sharing=sharing, sampler=sampler, diffusion={"prediction": "sample"})
    refined = tell(refiner, think=lambda reconstruction: -reconstruction).refine(images, seeds=range(5))
    for name in NAMES:
        torch.testing.assert_close(refined[name], 1 - images[name], rtol=0, atol=1e-5)
    out_of_range = {name: 3 * x - 1 for name, x in images.items()}
    refined = tell(refiner).refine(out_of_range, seeds=range(5))
    for name in NAMES:
        torch.testing.assert_close(refined[name], out_of_range[name].clamp(0, 1), rtol=0, atol=1e-5)


def test_unknown_modalities_are_returned_unchanged(images):
    refiner = make_refiner(["b"])
    refined = refiner.refine(images, seeds=range(5))
    assert list(refined) == list(NAMES)
    assert refined["a"] is images["a"]
    assert refined["c"] is images["c"]
    assert not torch.equal(refined["b"], images["b"])
    only = {"a": images["a"]}
    assert refiner.refine(only, seeds=[1]) == only, "seeds are not checked if nothing is refined"


def test_missing_arguments_are_reported(images, shared):
    with pytest.raises(ValueError, match="`shared`"):
        make_refiner(conditioning={"latent": True}).refine(images, seeds=range(5))
    with pytest.raises(ValueError, match="4 seeds for 5 samples"):
        make_refiner().refine(images, shared, seeds=range(4))


def test_refining_builds_no_graph(images):
    refined = make_refiner().refine({name: x.requires_grad_() for name, x in images.items()}, seeds=range(5))
    assert not any(x.requires_grad for x in refined.values())


def test_networks_have_the_configured_levels_and_different_weights():
    network = {**NETWORK, "multipliers": [1, 2, 3], "attention_sizes": [4], "blocks": 2}
    refiner = make_refiner(network=network)
    first, second = (refiner.denoisers[name].unet for name in ("a", "b"))
    assert not torch.equal(first.conv_in.weight, second.conv_in.weight)
    assert first.conv_in.weight.shape == (8, 6, 3, 3), "image and reconstruction"
    assert first.conv_out.weight.shape == (3, 8, 3, 3)
    attends = [hasattr(block, "attentions") for block in first.down_blocks]
    assert attends == [False, True, False]
    assert [hasattr(block, "attentions") for block in first.up_blocks] == [False, True, False]
    assert [len(block.resnets) for block in first.down_blocks] == [2, 2, 2]
    assert [block.resnets[0].out_channels for block in first.down_blocks] == [8, 16, 24]
    assert {module.p for module in first.modules() if isinstance(module, torch.nn.Dropout)} == {0.0}
    grey = make_refiner({"a": image_modality(1, 8, 16)})
    refined = grey.refine({"a": torch.rand(2, 1, 8, 16)}, seeds=[1, 2])
    assert refined["a"].shape == (2, 1, 8, 16)


@pytest.mark.parametrize(
    ("shape", "network", "expected"),
    [
        (
            (3, 28, 28),
            {"multipliers": [1, 2, 2, 2]},
            r"refiner\.network\.multipliers: 4 levels halve an image 3 times.*28×28.*at most 3",
        ),
        ((3, 8, 9), {"multipliers": [1, 2]}, r"refiner\.network\.multipliers.*8×9.*at most 1"),
        (
            (3, 16, 16),
            {"attention_sizes": [8, 7]},
            r"refiner\.network\.attention_sizes: no level has height 7\. The heights are 16, 8",
        ),
    ],
)
def test_networks_that_do_not_fit_the_images_are_rejected(shape, network, expected):
    with pytest.raises(UserError, match=expected):
        make_refiner({"a": image_modality(*shape)}, network=network)


def test_the_number_of_levels_in_the_error_message_fits():
    refiner = make_refiner({"a": image_modality(3, 28, 28)}, network={"multipliers": [1, 1, 1]})
    assert refiner.refine({"a": torch.rand(1, 3, 28, 28)}, seeds=[0])["a"].shape == (1, 3, 28, 28)


def test_modalities_of_different_shapes_cannot_share_a_network():
    modalities = {"a": image_modality(3, 8, 8), "b": image_modality(3, 8, 8), "c": image_modality(1, 8, 8)}
    with pytest.raises(
        UserError, match=r"refiner\.sharing.*a has shape \(3, 8, 8\) and c has \(1, 8, 8\).*per_modality"
    ):
        make_refiner(modalities, sharing="shared")
    assert set(make_refiner(modalities).groups) == {"a", "b", "c"}


@pytest.mark.parametrize("sharing", SHARING)
def test_export_restores_the_refiner(tmp_path, images, shared, sharing):
    # Neither alphabetical nor reversed, because labels are indices.
    names = ("b", "c", "a")
    refiner = make_refiner(names, "12" * 32, sharing=sharing, conditioning={"latent": True})
    refiner.save_pretrained(tmp_path / "export")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "config.yaml",
        "model.safetensors",
    ]
    again = Refiner.from_pretrained(tmp_path / "export")
    assert not again.training
    assert again.config == refiner.config
    assert again.modalities == refiner.modalities
    assert again.modality_names == names
    assert (again.shared_dim, again.cmvae_sha256) == (4, "12" * 32)
    one, other = (r.refine(images, shared, seeds=range(5)) for r in (refiner, again))
    assert all(torch.equal(one[name], other[name]) for name in NAMES)


def test_an_export_can_be_loaded_with_another_sampler(tmp_path, images):
    make_refiner().save_pretrained(tmp_path / "export")
    refiner = Refiner.from_pretrained(tmp_path / "export", sampler=SamplerConfig(name="ddim", num_steps=2))
    calls = record_calls(refiner)
    refiner.refine(images, seeds=range(5))
    assert len(calls) == 2 * 3
    assert refiner.config.model_copy(update={"sampler": make_config().sampler}) == make_config()


def test_damaged_exports_are_reported(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*missing.*not an export"):
        Refiner.from_pretrained(tmp_path / "nowhere")
    folder = tmp_path / "export"
    refiner = make_refiner()
    refiner.save_pretrained(folder)
    text, weights = (folder / "config.yaml").read_text(), (folder / "model.safetensors").read_bytes()
    for damage in (
        weights[: len(weights) // 2],
        b"",
        weights.replace(b"conv_out", b"conv_uot"),
    ):
        (folder / "model.safetensors").write_bytes(damage)
        with pytest.raises(UserError, match="export: damaged export"):
            Refiner.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(weights)
    for before, after in (
        ("channels: 8", "channels: 16"),
        ("channels: 8", "channels: some"),
        ("cmvae_sha256: '0", "cmvae_sha256: '"),
    ):
        assert before in text
        (folder / "config.yaml").write_text(text.replace(before, after))
        with pytest.raises(UserError, match="export: damaged export"):
            Refiner.from_pretrained(folder)
    (folder / "config.yaml").write_text("- a list")
    with pytest.raises(UserError, match=str(folder)):
        Refiner.from_pretrained(folder)


def test_non_finite_weights_are_reported(tmp_path):
    refiner = make_refiner()
    with torch.no_grad():
        refiner.denoisers["b"].unet.conv_out.bias[0] = float("inf")
    refiner.save_pretrained(tmp_path / "export")
    with pytest.raises(
        UserError, match=r"denoisers\.b\.unet\.conv_out\.bias: holds values that are not finite"
    ):
        Refiner.from_pretrained(tmp_path / "export")


def test_exports_of_another_kind_are_rejected(tmp_path):
    make_cmvae().save_pretrained(tmp_path / "cmvae")
    make_refiner().save_pretrained(tmp_path / "refiner")
    with pytest.raises(UserError, match=r"cmvae: the export of a CMVAE\. Pass the export of a refiner"):
        Refiner.from_pretrained(tmp_path / "cmvae")
    with pytest.raises(UserError, match=r"refiner: the export of a refiner\. Pass the export of a CMVAE"):
        CMVAE.from_pretrained(tmp_path / "refiner")


def test_bf16_gives_similar_images(images):
    full = make_refiner()
    half = copy.deepcopy(full)
    half.autocast_dtype = torch.bfloat16
    calls = record_calls(half)
    one, other = (refiner.refine(images, seeds=range(5))["a"] for refiner in (full, half))
    assert {call["output"].dtype for call in calls} == {torch.bfloat16}
    assert other.dtype == torch.float32
    assert not torch.equal(one, other)
    torch.testing.assert_close(one, other, rtol=0, atol=0.1)
