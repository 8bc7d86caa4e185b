"""CMVAE: shapes, calls of decoders, precision, generation and exports."""

import math

import pytest
import torch
from mixed import mixed_model

from cmvae import CMVAE
from cmvae.config import LikelihoodConfig, ModalityConfig, ModelConfig, load_config
from cmvae.modalities import ImageModality
from cmvae.utils.errors import UserError

IMAGE = ImageModality(shape=(3, 8, 12))
GREY = ImageModality(shape=(1, 16, 16))


def make_model(num_clusters=5, autocast_dtype=None, modalities=None, width=4):
    modalities = modalities or {"a": IMAGE, "b": GREY}
    configs = {name: ModalityConfig(width=width, likelihood=LikelihoodConfig()) for name in modalities}
    config = ModelConfig(shared_dim=6, private_dim=3, num_clusters=num_clusters, modalities=configs)
    torch.manual_seed(0)
    return CMVAE(config, modalities, autocast_dtype).eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return {"a": torch.rand(7, 3, 8, 12), "b": torch.rand(7, 1, 16, 16)}


def test_shapes_of_posteriors_and_decoded_images(inputs):
    model = make_model()
    posteriors = model.encode(inputs)
    assert posteriors["a"].shared.loc.shape == posteriors["a"].shared.scale.shape == (7, 6)
    assert posteriors["b"].private.loc.shape == posteriors["b"].private.scale.shape == (7, 3)
    decoded = model.decode(torch.zeros(2, 4, 7, 6), {"a": torch.zeros(2, 4, 7, 3)})
    assert {name: image.shape for name, image in decoded.items()} == {"a": (2, 4, 7, 3, 8, 12)}


def test_rows_are_decoded_independently():
    model = make_model()
    z, w = torch.randn(2, 3, 6), torch.randn(2, 3, 3)
    together = model.decode(z, {"b": w})["b"]
    for i in range(2):
        for j in range(3):
            alone = model.decode(z[i, j][None], {"b": w[i, j][None]})["b"][0]
            torch.testing.assert_close(together[i, j], alone)


def test_decoders_are_called_in_parts_on_a_cpu(monkeypatch):
    model, sizes = make_model(width=4), []
    for name in ("a", "b"):
        model.decoders[name].register_forward_hook(
            lambda _, inputs, __, name=name: sizes.append((name, len(inputs[0])))
        )
    latents = torch.randn(2, 7, 6), {"a": torch.randn(2, 7, 3), "b": torch.randn(2, 7, 3)}
    whole = model.decode_parameters(*latents)
    assert sizes == [("a", 14), ("b", 14)]
    sizes.clear()
    # An image of a has 288 values, an image of b 256; both networks have four filters.
    monkeypatch.setattr("cmvae.models.cmvae.MAX_DECODED_SIZE", 5 * 256 * 4)
    in_parts = model.decode_parameters(*latents)
    assert sizes == [("a", 4), ("a", 4), ("a", 4), ("a", 2), ("b", 5), ("b", 5), ("b", 4)]
    for name in ("a", "b"):
        torch.testing.assert_close(in_parts[name], whole[name])


def test_a_decoder_with_batch_norm_is_called_once_in_training(monkeypatch):
    model, sizes = mixed_model(), []
    monkeypatch.setattr("cmvae.models.cmvae.MAX_DECODED_SIZE", 1)
    model.decoders["caption"].register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    for training, expected in ((True, [3]), (False, [1, 1, 1])):
        sizes.clear()
        model.train(training).decode_parameters(torch.randn(3, 4), {"caption": torch.randn(3, 3)})
        assert sizes == expected


def test_polymnist_has_the_published_number_of_parameters():
    config = load_config("configs/polymnist.yaml").model
    modality = ImageModality(shape=(3, 28, 28))
    model = CMVAE(config, dict.fromkeys(config.modalities, modality))
    count = sum(parameter.numel() for parameter in model.parameters())
    assert count == pytest.approx(22.17e6, rel=1e-3)


def test_images_must_halve_twice():
    with pytest.raises(UserError, match=r"'a'.*divisible by 4, not 8×10"):
        make_model(modalities={"a": ImageModality(shape=(3, 8, 10))})


def test_unknown_network_is_rejected():
    config = ModelConfig(modalities={"a": ModalityConfig(network="transformer")})
    with pytest.raises(
        UserError, match=r"model\.modalities\.a\.network: unknown network 'transformer'.*resnet"
    ):
        CMVAE(config, {"a": IMAGE})


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_networks_run_in_the_set_precision_and_outputs_are_fp32(inputs, precision):
    model = make_model(autocast_dtype=precision)
    seen = []
    model.encoders["a"].shared_heads.register_forward_hook(lambda _, __, output: seen.append(output[0].dtype))
    # An autocast that a launcher enabled around the call must have no effect.
    with torch.autocast("cpu", dtype=torch.float16):
        posterior = model.encode(inputs)["a"]
    assert seen == [precision or torch.float32]
    assert posterior.shared.loc.dtype == posterior.private.scale.dtype == torch.float32


def test_scales_of_the_prior_are_fixed_and_neutral():
    model = make_model()
    torch.testing.assert_close(model.cluster_prior.scale, torch.ones(6))
    torch.testing.assert_close(model.private_prior.scale, torch.ones(3))
    learned = {name for name, _ in model.named_parameters()}
    assert "cluster_prior.scale" not in learned
    assert "private_scale" not in learned
    assert model.cluster_prior.means.abs().max() <= 1


def test_one_modality_has_no_auxiliary_prior():
    assert len(make_model(modalities={"a": IMAGE}).auxiliary_priors) == 0
    assert len(make_model().auxiliary_priors) == 2


def test_dropped_clusters_leave_the_prior():
    model = make_model()
    model.cluster_prior.active[:] = torch.tensor([True, False, True, False, False])
    log_weights, _ = model.cluster_prior(torch.zeros(1, 6))
    torch.testing.assert_close(log_weights.exp(), torch.tensor([0.5, 0, 0.5, 0, 0]))
    with torch.no_grad():
        model.cluster_prior.means.copy_(1000.0 * torch.arange(5)[:, None].expand(5, 6))
    z = model.sample_latents(500, generator=torch.Generator().manual_seed(0)).shared
    assert set((z.mean(1) / 1000).round().tolist()) == {0.0, 2.0}


def test_samples_are_assigned_to_the_nearest_active_cluster(inputs):
    model = make_model()
    shared = model.encode(inputs)
    with torch.no_grad():
        # For each of the first five samples, a cluster midway between its two encodings.
        for c in range(5):
            model.cluster_prior.means[c] = (shared["a"].shared.loc[c] + shared["b"].shared.loc[c]) / 2
    before = model.assign(inputs)
    log_density = torch.stack(
        [
            torch.stack(
                [
                    torch.distributions.Laplace(mean, 1.0).log_prob(shared[name].shared.loc).sum(-1)
                    for mean in model.cluster_prior.means
                ],
                dim=-1,
            )
            for name in ("a", "b")
        ],
        dim=1,
    )
    torch.testing.assert_close(before.responsibilities, log_density.softmax(-1).double(), atol=1e-5, rtol=0)
    assert before.cluster.shape == before.confidence.shape == (7,)
    model.cluster_prior.active[before.cluster[0]] = False
    after = model.assign(inputs)
    assert after.cluster[0] != before.cluster[0]
    assert (after.responsibilities[..., before.cluster[0]] == 0).all()


def test_generation_is_seeded_and_depends_on_given_modalities(inputs):
    model = make_model()

    def generate(**arguments):
        return model.generate(generator=torch.Generator().manual_seed(5), **arguments)

    first, again = generate(num_samples=4), generate(num_samples=4)
    assert {name: images.shape for name, images in first.items()} == {"a": (4, 3, 8, 12), "b": (4, 1, 16, 16)}
    torch.testing.assert_close(first["a"], again["a"], rtol=0, atol=0)
    from_a = generate(given={"a": inputs["a"]})
    assert from_a["b"].shape == (7, 1, 16, 16)
    assert not torch.equal(from_a["b"], generate(given={"b": inputs["b"]})["b"])


def test_z_is_sampled_from_the_mixture_over_given_modalities(inputs):
    model = make_model()
    posteriors = model.encode(inputs)
    many = {name: images[:1].expand(400, -1, -1, -1) for name, images in inputs.items()}
    with torch.no_grad():
        for head in (model.encoders["a"].shared_heads, model.encoders["b"].shared_heads):
            head.loc.weight.zero_()
        model.encoders["a"].shared_heads.loc.bias.fill_(100.0)
        model.encoders["b"].shared_heads.loc.bias.fill_(-100.0)
    z = model.sample_latents(given=many, generator=torch.Generator().manual_seed(0)).shared
    from_a = (z.mean(1) > 0).float().mean().item()
    assert from_a == pytest.approx(0.5, abs=0.1)
    assert posteriors.keys() == {"a", "b"}
    # Missing modalities are never the source.
    mask = torch.tensor([[True, False], [False, True], [True, True], [True, True]]).repeat(100, 1)
    z = model.sample_latents(given=many, mask=mask, generator=torch.Generator().manual_seed(0)).shared
    from_a = z[:, 0] > 0
    assert from_a[0::4].all()
    assert not from_a[1::4].any()
    assert 70 < from_a[2::4].sum() + from_a[3::4].sum() < 130


def test_contradictory_arguments_are_rejected(inputs):
    model = make_model()
    for arguments in ({}, {"num_samples": 2, "given": inputs}, {"given": inputs, "cluster": 1}):
        with pytest.raises(ValueError, match="num_samples"):
            model.generate(**arguments)


def test_export_restores_the_model(tmp_path, inputs):
    model = make_model()
    model.cluster_prior.active[3] = False
    model.save_pretrained(tmp_path / "export")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == [
        "config.yaml",
        "model.safetensors",
    ]
    again = CMVAE.from_pretrained(tmp_path / "export")
    assert not again.training
    assert torch.equal(again.cluster_prior.active, model.cluster_prior.active)
    torch.testing.assert_close(
        again.reconstruct(inputs)["a"], model.reconstruct(inputs)["a"], rtol=1e-5, atol=1e-6
    )
    model.save_pretrained(tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["export"], "no leftovers after replacing an export"


def test_modalities_may_have_names_of_attributes(tmp_path):
    # Columns of tables are called so.
    inputs = {"type": torch.rand(2, 3, 8, 12), "values": torch.rand(2, 1, 16, 16)}
    model = make_model(modalities={"type": IMAGE, "values": GREY})
    model.save_pretrained(tmp_path)
    loaded = CMVAE.from_pretrained(tmp_path)
    assert loaded.assign(inputs).cluster.equal(model.assign(inputs).cluster)
    assert set(loaded.generate(given=inputs)) == {"type", "values"}


def test_damaged_exports_are_reported(tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*missing.*not an export"):
        CMVAE.from_pretrained(tmp_path / "nowhere")
    folder = tmp_path / "export"
    make_model().save_pretrained(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="damaged"):
        CMVAE.from_pretrained(folder)
    (folder / "model.safetensors").write_bytes(weights)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("num_clusters: 5", "num_clusters: 6"))
    with pytest.raises(UserError, match="damaged"):
        CMVAE.from_pretrained(folder)
    (folder / "config.yaml").write_text(text.replace("format_version: 3", "format_version: 2"))
    with pytest.raises(UserError, match=r"export format 2, .* reads format 3\. Use the"):
        CMVAE.from_pretrained(folder)
    (folder / "config.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="damaged"):
        CMVAE.from_pretrained(folder)


def test_cluster_density_equals_the_closed_form():
    model = make_model()
    z = torch.randn(4, 6)
    _, log_density = model.cluster_prior(z)
    for c in range(5):
        expected = -(z - model.cluster_prior.means[c]).abs().sum(1) - 6 * math.log(2)
        torch.testing.assert_close(log_density[:, c], expected, rtol=1e-4, atol=1e-4)


def test_non_finite_weights_are_reported(tmp_path):
    model = make_model()
    with torch.no_grad():
        model.cluster_prior.means[1, 0] = float("nan")
    model.save_pretrained(tmp_path / "export")
    with pytest.raises(UserError, match=r"cluster_prior\.means: holds values that are not finite"):
        CMVAE.from_pretrained(tmp_path / "export")
