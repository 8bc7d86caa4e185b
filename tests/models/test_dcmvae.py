"""D-CMVAE: generation, candidates, and exports of matching models."""

import hashlib

import numpy as np
import pytest
import torch
from refining import NAMES, SHARED_DIM, make_cmvae, make_refiner, record_calls, tell

from cmvae.config import SamplerConfig
from cmvae.models.dcmvae import DCMVAE
from cmvae.models.export import weights_sha256
from cmvae.utils.errors import UserError
from cmvae.utils.seeds import derive_seed


def stream():
    return torch.Generator().manual_seed(5)


@pytest.fixture
def given():
    torch.manual_seed(1)
    return {name: torch.rand(4, 3, 8, 8) for name in ("a", "c")}


@pytest.fixture
def argument_sets(given):
    return [{"num_samples": 3}, {"num_samples": 6, "cluster": 2}, {"given": given}]


def test_generate_refines_the_generations_of_the_cmvae(argument_sets):
    cmvae, refiner = make_cmvae(), make_refiner(conditioning={"latent": True})
    both = DCMVAE(cmvae, refiner)
    for arguments in argument_sets:
        generator = stream()
        latents = cmvae.sample_latents(**arguments, generator=generator)
        images = cmvae.decode(latents.shared, latents.private)
        seeds = torch.randint(2**62, (len(latents.shared),), generator=generator).tolist()
        expected = refiner.refine(images, latents.shared, seeds=seeds)
        generated = both.generate(**arguments, generator=stream())
        assert set(generated) == set(NAMES)
        for name in NAMES:
            assert torch.equal(generated[name], expected[name])
            assert generated[name].min() >= 0
            assert generated[name].max() <= 1
        assert len(set(seeds)) == len(seeds)


def test_z_is_estimated_from_the_images_if_not_given(given):
    cmvae, refiner = make_cmvae(), make_refiner(conditioning={"latent": True})
    mean = sum(cmvae.encode({name: x})[name].shared.loc for name, x in given.items()) / len(given)
    expected = refiner.refine(given, mean, seeds=[1, 2, 3, 4])
    refined = DCMVAE(cmvae, refiner).refine(given, seeds=[1, 2, 3, 4])
    other = refiner.refine(given, mean + 1, seeds=[1, 2, 3, 4])
    for name in given:
        torch.testing.assert_close(refined[name], expected[name])
        assert not torch.allclose(other[name], expected[name])


def test_latents_are_passed_on_or_estimated(argument_sets, given):
    cmvae, refiner = make_cmvae(), make_refiner(conditioning={"source": "latent"})
    both = DCMVAE(cmvae, refiner)
    for arguments in argument_sets:
        generator = stream()
        latents = cmvae.sample_latents(**arguments, generator=generator)
        images = cmvae.decode(latents.shared, latents.private)
        seeds = torch.randint(2**62, (len(latents.shared),), generator=generator).tolist()
        expected = refiner.refine(images, latents.shared, latents.private, seeds=seeds)
        generated = both.generate(**arguments, generator=stream())
        assert all(torch.equal(generated[name], expected[name]) for name in NAMES)
    posteriors = {name: cmvae.encode({name: x})[name] for name, x in given.items()}
    mean = sum(q.shared.loc for q in posteriors.values()) / len(given)
    private = {name: q.private.loc for name, q in posteriors.items()}
    expected = refiner.refine(given, mean, private, seeds=[1, 2, 3, 4])
    for name, x in both.refine(given, seeds=[1, 2, 3, 4]).items():
        torch.testing.assert_close(x, expected[name])


def test_the_candidate_with_the_largest_posterior_density_is_kept(given):
    """Compared with all candidates, refined and encoded one by one."""
    cmvae, refiner = make_cmvae(), make_refiner(("a", "c"), sampler={"num_steps": 2, "candidates": 3})
    torch.manual_seed(2)
    shared, seeds = torch.randn(4, SHARED_DIM), [11, 12, 13, 14]
    candidates = [refiner.refine(given, shared, seeds=seeds)]
    for number in (1, 2):
        others = [derive_seed(seed, f"candidate {number}") for seed in seeds]
        candidates.append(refiner.refine(given, shared, seeds=others))
    kept = DCMVAE(cmvae, refiner).refine(given, shared, seeds=seeds)
    chosen = set()
    for name in given:
        for row in range(4):
            images = [candidate[name][row] for candidate in candidates]
            density = []
            for image in images:
                q = cmvae.encode({name: image[None]})[name].shared
                density.append(torch.distributions.Laplace(q.loc, q.scale).log_prob(shared[row]).sum().item())
            best = int(np.argmax(density))
            torch.testing.assert_close(kept[name][row], images[best], rtol=0, atol=1e-5)
            chosen.add(best)
    assert len(chosen) > 1, "different candidates must be chosen, or the test shows nothing"


def test_candidates_do_not_depend_on_the_batch(given):
    refiner = make_refiner(("a",), sampler={"num_steps": 2, "candidates": 2})
    both = DCMVAE(make_cmvae(), refiner)
    whole = both.refine(given, torch.ones(4, SHARED_DIM), seeds=[1, 2, 3, 4])
    assert torch.equal(whole["c"], given["c"])
    one = {name: x[2:3] for name, x in given.items()}
    alone = both.refine(one, torch.ones(1, SHARED_DIM), seeds=[3])
    torch.testing.assert_close(alone["a"], whole["a"][2:3], rtol=0, atol=1e-5)
    without_z = both.refine(given, seeds=[1, 2, 3, 4])
    shared = sum(both.cmvae.encode({name: x})[name].shared.loc for name, x in given.items()) / len(given)
    torch.testing.assert_close(without_z, both.refine(given, shared, seeds=[1, 2, 3, 4]))
    torch.manual_seed(3)
    drawn = torch.randint(2**62, (4,)).tolist()
    torch.manual_seed(3)
    torch.testing.assert_close(both.refine(given), both.refine(given, seeds=drawn))


def test_a_refiner_that_returns_its_condition_changes_nothing(argument_sets):
    cmvae = make_cmvae()
    refiner = make_refiner(diffusion={"prediction": "sample"})
    both = DCMVAE(cmvae, tell(refiner))
    for arguments in argument_sets:
        expected = cmvae.generate(**arguments, generator=stream())
        generated = both.generate(**arguments, generator=stream())
        for name in NAMES:
            torch.testing.assert_close(generated[name], expected[name].clamp(0, 1), rtol=0, atol=1e-5)


def test_contradictory_arguments_are_rejected(given):
    both = DCMVAE(make_cmvae(), make_refiner())
    for arguments in ({}, {"num_samples": 2, "given": given}, {"given": given, "cluster": 1}):
        with pytest.raises(ValueError, match="num_samples"):
            both.generate(**arguments)


@pytest.fixture
def exports(tmp_path):
    """Folders with the exports of a refiner, of its CMVAE, and of another CMVAE."""
    refiner, cmvae, other = (tmp_path / name for name in ("refiner", "cmvae", "other"))
    make_cmvae().save_pretrained(cmvae)
    make_cmvae(seed=1).save_pretrained(other)
    make_refiner(cmvae_sha256=weights_sha256(cmvae)).save_pretrained(refiner)
    return refiner, cmvae, other


def test_matching_exports_generate_the_same_images(exports):
    refiner, cmvae, _ = exports
    both = DCMVAE.from_pretrained(refiner, cmvae)
    expected = DCMVAE(make_cmvae(), make_refiner()).generate(3, generator=stream())
    generated = both.generate(3, generator=stream())
    for name in NAMES:
        torch.testing.assert_close(generated[name], expected[name], rtol=0, atol=1e-4)
    fewer = DCMVAE.from_pretrained(refiner, cmvae, sampler=SamplerConfig(num_steps=1))
    calls = record_calls(fewer.refiner)
    fewer.generate(2, generator=stream())
    assert len(calls) == 3


def test_the_hash_of_an_export_is_that_of_its_weights(exports):
    refiner, cmvae, other = exports
    digest = hashlib.sha256((cmvae / "model.safetensors").read_bytes()).hexdigest()
    assert DCMVAE.from_pretrained(refiner, cmvae).refiner.cmvae_sha256 == digest != weights_sha256(other)


def test_a_refiner_of_another_cmvae_is_rejected(exports):
    refiner, cmvae, other = exports
    with pytest.raises(
        UserError, match=rf"{refiner}: trained with the CMVAE .*, but {other} has .*train a new refiner"
    ):
        DCMVAE.from_pretrained(refiner, other)
    with pytest.raises(UserError, match=rf"{cmvae}: the export of a CMVAE\. Pass the export of a refiner"):
        DCMVAE.from_pretrained(cmvae, refiner)
    with pytest.raises(UserError, match=rf"{refiner}: the export of a refiner\. Pass the export of a CMVAE"):
        DCMVAE.from_pretrained(refiner, refiner)
    with pytest.raises(UserError, match=r"nowhere/model\.safetensors: missing"):
        DCMVAE.from_pretrained(refiner, cmvae.with_name("nowhere"))
