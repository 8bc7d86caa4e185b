"""CMVAE and refiner together: what is generated, and which belong together."""

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
def ways(given):
    return [{"num_samples": 3}, {"num_samples": 6, "cluster": 2}, {"given": given}]


def test_what_is_generated_is_what_the_cmvae_generates_refined(ways):
    cmvae, refiner = make_cmvae(), make_refiner(conditioning={"latent": True})
    both = DCMVAE(cmvae, refiner)
    for way in ways:
        generator = stream()
        latents = cmvae.sample_latents(**way, generator=generator)
        images = cmvae.decode(latents.shared, latents.private)
        seeds = torch.randint(2**62, (len(latents.shared),), generator=generator).tolist()
        expected = refiner.refine(images, latents.shared, seeds=seeds)
        made = both.generate(**way, generator=stream())
        assert set(made) == set(NAMES)
        for name in NAMES:
            assert torch.equal(made[name], expected[name])
            assert made[name].min() >= 0
            assert made[name].max() <= 1
        assert len(set(seeds)) == len(seeds)


def test_without_z_the_cmvae_reads_it_back_from_the_images(given):
    cmvae, refiner = make_cmvae(), make_refiner(conditioning={"latent": True})
    read_back = sum(cmvae.encode({name: x})[name].shared.loc for name, x in given.items()) / len(given)
    expected = refiner.refine(given, read_back, seeds=[1, 2, 3, 4])
    made = DCMVAE(cmvae, refiner).refine(given, seeds=[1, 2, 3, 4])
    elsewhere = refiner.refine(given, read_back + 1, seeds=[1, 2, 3, 4])
    for name in given:
        torch.testing.assert_close(made[name], expected[name])
        assert not torch.allclose(elsewhere[name], expected[name])


def test_of_candidates_the_one_is_kept_that_is_read_as_z(given):
    """Against all of them, made one by one and read by the encoders."""
    cmvae, refiner = make_cmvae(), make_refiner(("a", "c"), sampler={"num_steps": 2, "candidates": 3})
    torch.manual_seed(2)
    shared, seeds = torch.randn(4, SHARED_DIM), [11, 12, 13, 14]
    made = [refiner.refine(given, shared, seeds=seeds)]
    for number in (1, 2):
        others = [derive_seed(seed, f"candidate {number}") for seed in seeds]
        made.append(refiner.refine(given, shared, seeds=others))
    kept = DCMVAE(cmvae, refiner).refine(given, shared, seeds=seeds)
    chosen = set()
    for name in given:
        for row in range(4):
            pictures = [candidate[name][row] for candidate in made]
            density = []
            for picture in pictures:
                q = cmvae.encode({name: picture[None]})[name].shared
                density.append(torch.distributions.Laplace(q.loc, q.scale).log_prob(shared[row]).sum().item())
            best = int(np.argmax(density))
            torch.testing.assert_close(kept[name][row], pictures[best], rtol=0, atol=1e-5)
            chosen.add((name, best))
    assert len({number for _, number in chosen}) > 1, "a test of a choice must see different ones"


def test_candidates_are_the_same_in_any_batch_and_leave_other_kinds_alone(given):
    refiner = make_refiner(("a",), sampler={"num_steps": 2, "candidates": 2})
    both = DCMVAE(make_cmvae(), refiner)
    whole = both.refine(given, torch.ones(4, SHARED_DIM), seeds=[1, 2, 3, 4])
    assert torch.equal(whole["c"], given["c"])
    one = {name: x[2:3] for name, x in given.items()}
    alone = both.refine(one, torch.ones(1, SHARED_DIM), seeds=[3])
    torch.testing.assert_close(alone["a"], whole["a"][2:3], rtol=0, atol=1e-5)
    read_back = both.refine(given, seeds=[1, 2, 3, 4])
    shared = sum(both.cmvae.encode({name: x})[name].shared.loc for name, x in given.items()) / len(given)
    torch.testing.assert_close(read_back, both.refine(given, shared, seeds=[1, 2, 3, 4]))
    torch.manual_seed(3)
    drawn = torch.randint(2**62, (4,)).tolist()
    torch.manual_seed(3)
    torch.testing.assert_close(both.refine(given), both.refine(given, seeds=drawn))


def test_of_a_refiner_that_repeats_its_condition_the_generations_are_the_cmvaes_own(ways):
    cmvae = make_cmvae()
    refiner = make_refiner(diffusion={"prediction": "sample"})
    both = DCMVAE(cmvae, tell(refiner))
    for way in ways:
        expected = cmvae.generate(**way, generator=stream())
        made = both.generate(**way, generator=stream())
        for name in NAMES:
            torch.testing.assert_close(made[name], expected[name].clamp(0, 1), rtol=0, atol=1e-5)


def test_contradictions_are_refused_as_by_the_cmvae(given):
    both = DCMVAE(make_cmvae(), make_refiner())
    for arguments in ({}, {"num_samples": 2, "given": given}, {"given": given, "cluster": 1}):
        with pytest.raises(ValueError, match="num_samples"):
            both.generate(**arguments)


@pytest.fixture
def exports(tmp_path):
    """Folders of a refiner, of its CMVAE, and of another CMVAE."""
    refiner, cmvae, other = (tmp_path / name for name in ("refiner", "cmvae", "other"))
    make_cmvae().save_pretrained(cmvae)
    make_cmvae(seed=1).save_pretrained(other)
    make_refiner(cmvae_sha256=weights_sha256(cmvae)).save_pretrained(refiner)
    return refiner, cmvae, other


def test_exports_that_belong_together_generate_as_before(exports):
    refiner, cmvae, _ = exports
    both = DCMVAE.from_pretrained(refiner, cmvae)
    expected = DCMVAE(make_cmvae(), make_refiner()).generate(3, generator=stream())
    made = both.generate(3, generator=stream())
    for name in NAMES:
        torch.testing.assert_close(made[name], expected[name], rtol=0, atol=1e-4)
    fewer = DCMVAE.from_pretrained(refiner, cmvae, sampler=SamplerConfig(num_steps=1))
    calls = record_calls(fewer.refiner)
    fewer.generate(2, generator=stream())
    assert len(calls) == 3


def test_the_hash_of_an_export_is_that_of_its_weights(exports):
    refiner, cmvae, other = exports
    digest = hashlib.sha256((cmvae / "model.safetensors").read_bytes()).hexdigest()
    assert DCMVAE.from_pretrained(refiner, cmvae).refiner.cmvae_sha256 == digest != weights_sha256(other)


def test_a_refiner_of_another_cmvae_is_refused(exports):
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
