"""Encoders and decoders: shapes for every kind of modality, supported sizes, and the published layers."""

import itertools

import pytest
import torch
from commands import ROOT
from torch.utils.flop_counter import FlopCounterMode

from cmvae.config import ModalityConfig, ModelConfig, ObjectiveConfig, load_config
from cmvae.modalities import BinaryModality, CategoricalModality, ImageModality, TextModality, VectorModality
from cmvae.modalities.text import SPECIAL_TOKENS
from cmvae.models.cmvae import CMVAE
from cmvae.models.networks import NETWORKS, network_family
from cmvae.models.networks.convolutions import PooledConv
from cmvae.models.networks.image import PooledResidualBlock, ResidualBlock, UpsampledResidualBlock
from cmvae.training.tasks import CMVAETask
from cmvae.utils.errors import UserError

D_Z, D_W, B = 5, 3, 4


def image(height, width, channels=3):
    return ImageModality(shape=(channels, height, width))


def text(length, num_words=11):
    words = (*SPECIAL_TOKENS, *(f"w{place}" for place in range(num_words - len(SPECIAL_TOKENS))))
    return TextModality(shape=(length,), categories=words)


VECTOR = VectorModality(shape=(6,), mean=(0.0,) * 6, std=(1.0,) * 6)
BINARY = BinaryModality(shape=(7,))
CATEGORICAL = CategoricalModality(categories=("a", "b", "c"))


def made_up_data(modality, batch_size=B):
    if modality.num_categories:
        return torch.randint(modality.num_categories, (batch_size, *modality.shape))
    return torch.rand(batch_size, *modality.shape)


def build(name, modality, width):
    torch.manual_seed(0)
    family = network_family(name, modality, "a")
    return family.encoder(modality, width, D_Z, D_W), family.decoder(modality, width, D_Z, D_W)


@pytest.mark.parametrize(
    ("name", "modality", "width"),
    [
        ("resnet", image(28, 28), 4),
        ("resnet", image(16, 32, channels=1), 3),
        ("resnet", image(64, 64), 2),
        ("resnet", image(256, 128), 2),
        ("strided", image(28, 28), 8),
        ("strided", image(16, 32, channels=1), 4),
        ("strided", image(64, 64), 4),
        ("strided", image(256, 128), 2),
        ("bag_of_words", text(32), 4),
        ("caption", text(32), 32),
        ("caption", text(8), 2),
        ("caption", text(56), 12),
        ("mlp", VECTOR, 8),
        ("mlp", BINARY, 8),
        ("mlp", CATEGORICAL, 8),
        ("mlp", text(5), 8),
        ("mlp", image(5, 3), 8),
    ],
)
def test_networks_map_data_to_likelihood_parameters(name, modality, width):
    encoder, decoder = build(name, modality, width)
    shapes = [output.shape for output in encoder(made_up_data(modality))]
    assert shapes == [(B, D_Z), (B, D_Z), (B, D_W), (B, D_W)]
    parameters = decoder(torch.randn(B, D_Z + D_W))
    assert parameters.shape == (B, *modality.parameter_shape)


@pytest.mark.parametrize(
    ("name", "modality"), [("caption", text(16)), ("mlp", VECTOR), ("resnet", image(8, 8))]
)
def test_z_and_w_have_separate_trunks(name, modality):
    encoder, _ = build(name, modality, 4)
    shared_loc, shared_raw, _, _ = encoder(made_up_data(modality))
    (shared_loc.sum() + shared_raw.sum()).backward()
    reached = {name for name, parameter in encoder.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in encoder.named_parameters() if not name.startswith("private")}


def test_only_z_ignores_the_order_of_words():
    encoder, _ = build("bag_of_words", text(16), 4)
    tokens = made_up_data(text(16))
    shuffled = tokens[:, torch.randperm(16)]
    before, after = encoder(tokens), encoder(shuffled)
    torch.testing.assert_close(before[:2], after[:2])
    assert not torch.allclose(before[2], after[2])
    torch.testing.assert_close(encoder.encode_shared(tokens), before[0])
    special = tokens.clone()
    special[:, 3:] = 0  # Padding is not a word.
    padded = torch.cat([special, torch.ones_like(special)], dim=1)[:, :16]
    torch.testing.assert_close(encoder(special)[0], encoder(padded)[0])


def test_embedding_equals_linear_map_of_one_hot_tokens():
    encoder, _ = build("caption", text(16), 32)
    tokens = made_up_data(text(16))
    one_hot = torch.nn.functional.one_hot(tokens, 11).float()
    linear = torch.nn.functional.linear(one_hot, encoder.embedding.weight.T, encoder.embedding.bias)
    torch.testing.assert_close(encoder.prepare(tokens), linear[:, None])
    assert linear.shape == (B, 16, 128)


def test_each_stem_of_the_caption_decoder_reads_its_own_latent():
    _, decoder = build("caption", text(16), 4)
    read = {}
    for name in ("shared_stem", "private_stem"):
        decoder.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: read.update({name: inputs[0].flatten(1)})
        )
    latents = torch.randn(B, D_Z + D_W)
    decoder(latents)
    assert torch.equal(read["shared_stem"], latents[:, :D_Z])
    assert torch.equal(read["private_stem"], latents[:, D_Z:])


def test_unsuitable_networks_are_rejected_with_advice():
    for name, modality, message in (
        ("caption", text(30), r"'a'.*multiple of 8, not 30.*32 tokens"),
        ("caption", VECTOR, r"model\.modalities\.a\.network: caption networks take text, not .* vector"),
        ("resnet", text(32), r"model\.modalities\.a\.network: resnet takes .*, not .* text"),
        ("resnet", image(8, 10), r"divisible by 4, not 8×10"),
        ("strided", image(8, 10), r"multiples of 4, not 8×10.*Resize"),
        ("strided", image(72, 72), r"multiples of 16, not 72×72.*Resize"),
        ("strided", text(32), r"model\.modalities\.a\.network: strided takes images, not .* text"),
        ("bag_of_words", VECTOR, r"model\.modalities\.a\.network: .* take text, not .* vector"),
        ("resnet", image(100, 100), r"reduces 100×100 to 25×25.*Resize.*64×64"),
    ):
        with pytest.raises(UserError, match=message):
            network_family(name, modality, "a")
    assert {
        modality.network for modality in (image(8, 8), text(16), VECTOR, BINARY, CATEGORICAL)
    } <= NETWORKS.keys()


def linear(inputs, outputs):
    return inputs * outputs + outputs


def conv(inputs, outputs, kernel=9):
    return inputs * outputs * kernel + outputs


def normed(inputs, outputs, kernel=9):
    return conv(inputs, outputs, kernel) + 2 * outputs


def block(inputs, outputs):
    hidden = min(inputs, outputs)
    shortcut = inputs * outputs if inputs != outputs else 0
    return conv(inputs, hidden) + conv(hidden, outputs) + shortcut


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_cubicc_captions_have_the_released_number_of_parameters():
    # Layer by layer from the released cnn_cub_text.py: 32 tokens of 1,590, base 32, embedding 128.
    modality, d_z, d_w = text(32, 1590), 64, 32
    trunk_w = normed(1, 32, 16) + normed(32, 64, 16) + normed(64, 128, 16)
    trunk_z = trunk_w + normed(128, 256, 4) + normed(256, 512, 4)
    heads = 2 * linear(128 * 4 * 16, d_w) + 2 * conv(512, d_z, 16)
    encoder = NETWORKS["caption"].encoder(modality, 32, d_z, d_w)
    assert count(encoder) == linear(1590, 128) + trunk_w + trunk_z + heads
    stem_w = normed(d_w, 512, 16) + normed(512, 256, 4) + normed(256, 128, 4)
    stem_z = normed(d_z, 512, 16) + normed(512, 256, 4) + normed(256, 256, 9) + normed(256, 128, 4)
    tail = normed(256, 128, 9) + normed(128, 64, 16) + normed(64, 32, 16) + conv(32, 1, 16)
    decoder = NETWORKS["caption"].decoder(modality, 32, d_z, d_w)
    assert count(decoder) == stem_w + stem_z + tail + linear(128, 1590)


def test_cubicc_images_have_the_released_number_of_parameters():
    # Layer by layer from the released resnet_cub_image.py: 64 px to 2 px, 64 to 256 filters.
    d_z, d_w = 64, 32
    filters = [64, 128, 256, 256, 256, 256]
    ways = list(itertools.pairwise(filters))
    trunk = conv(3, 64) + block(64, 64) + sum(block(*way) for way in ways)
    heads = 2 * linear(256 * 2 * 2, d_z) + 2 * linear(256 * 2 * 2, d_w)
    encoder = NETWORKS["resnet"].encoder(image(64, 64), 64, d_z, d_w)
    assert count(encoder) == 2 * trunk + heads
    decoder = NETWORKS["resnet"].decoder(image(64, 64), 64, d_z, d_w)
    layers = block(64, 64) + sum(block(after, before) for before, after in ways) + conv(64, 3)
    assert count(decoder) == linear(d_z + d_w, 256 * 2 * 2) + layers


@pytest.mark.parametrize("size", [(28, 28), (16, 16), (32, 32)])
def test_weight_names_are_stable(size):
    encoder, decoder = build("resnet", image(*size), 4)
    block = {"branch.1.weight", "branch.1.bias", "branch.3.weight", "branch.3.bias"}
    wider = block | {"shortcut.weight"}

    def under(prefix, names):
        return {f"{prefix}.{name}" for name in names}

    both = {"weight", "bias"}
    expected = set()
    for part in ("shared", "private"):
        expected |= under(f"{part}_heads.loc", both) | under(f"{part}_heads.raw_scale", both)
        layers = f"{part}_trunk.layers"
        expected |= under(f"{layers}.0", both) | under(f"{layers}.1", block)
        expected |= under(f"{layers}.2", wider) | under(f"{layers}.3", wider)
    assert encoder.state_dict().keys() == expected
    expected = under("stem", both) | under("layers.0", wider) | under("layers.1", wider)
    assert decoder.state_dict().keys() == expected | under("layers.2", block) | under("layers.4", both)
    assert decoder.stem.out_features == 16 * (size[0] // 4) * (size[1] // 4)


def values_and_gradients(network, x, towards):
    """Output `y` of a network, and the gradients of `x` and of the parameters, by name."""
    leaf = x.clone().requires_grad_()
    y = network(leaf)
    names = ["x", *(name for name, _ in network.named_parameters())]
    gradients = torch.autograd.grad((y * towards).sum(), [leaf, *network.parameters()])
    return {"y": y, **dict(zip(names, gradients, strict=True))}


def assert_close_to_the_largest(found, expected, rtol):
    """Compare relative to the largest value, because single values may cancel out."""
    for one, other in zip(found.values(), expected.values(), strict=True):
        assert (one - other).abs().max() <= rtol * other.abs().max()


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 4), (4, 4), (3, 5)])
def test_upsampled_block_equals_upsampling_then_block(dtype, rtol, inputs, outputs):
    torch.manual_seed(0)
    fast = UpsampledResidualBlock(inputs, outputs).to(dtype)
    block = ResidualBlock(inputs, outputs).to(dtype)
    block.load_state_dict(fast.state_dict())
    plain = torch.nn.Sequential(torch.nn.Upsample(scale_factor=2, mode="nearest"), block)
    x = torch.randn(2, inputs, 7, 5, dtype=dtype)
    towards = torch.randn(2, outputs, 14, 10, dtype=dtype)
    found, expected = (values_and_gradients(network, x, towards) for network in (fast, plain))
    assert_close_to_the_largest(found, expected, rtol)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 24), (24, 24), (24, 30), (4, 4)])
@pytest.mark.parametrize("size", [(8, 14), (2, 2), (4, 2)])
def test_pooled_block_equals_block_then_pooling(dtype, rtol, inputs, outputs, size):
    torch.manual_seed(0)
    fast = PooledResidualBlock(inputs, outputs).to(dtype)
    block = ResidualBlock(inputs, outputs).to(dtype)
    block.load_state_dict(fast.state_dict())
    plain = torch.nn.Sequential(block, torch.nn.AvgPool2d(3, stride=2, padding=1))
    x = torch.randn(2, inputs, *size, dtype=dtype)
    towards = torch.randn(2, outputs, size[0] // 2, size[1] // 2, dtype=dtype)
    found, expected = (values_and_gradients(network, x, towards) for network in (fast, plain))
    assert_close_to_the_largest(found, expected, rtol)


def test_pooled_block_is_as_accurate_in_bf16():
    torch.manual_seed(0)
    fast, block = PooledResidualBlock(24, 30), ResidualBlock(24, 30)
    block.load_state_dict(fast.state_dict())
    plain = torch.nn.Sequential(block, torch.nn.AvgPool2d(3, stride=2, padding=1))
    x, towards = torch.randn(2, 24, 8, 8), torch.randn(2, 30, 4, 4)
    exact = values_and_gradients(plain, x, towards)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (values_and_gradients(network, x, towards) for network in (fast, plain))
    dtypes = [value.dtype for value in found.values()]
    assert dtypes == [torch.bfloat16] + [torch.float32] * (len(dtypes) - 1)
    for one, other, true in zip(found.values(), expected.values(), exact.values(), strict=True):
        assert (one - true).abs().max() <= 2 * (other - true).abs().max()


def test_pooled_conv_takes_a_quarter_of_the_operations():
    conv, x = PooledConv(32, 32), torch.randn(2, 32, 16, 16)
    with FlopCounterMode(display=False) as counter:
        conv(x)
    plain = 2 * 2 * 16 * 16 * 32 * 32 * 9
    # Border: two lines of eight positions with three weights each, and the sums of their pixels.
    border = 2 * 2 * 2 * 8 * 3 * 32 * (32 + 16)
    assert counter.get_total_flops() == plain / 4 + border
    few = PooledConv(16, 32)
    with FlopCounterMode(display=False) as counter:
        few(x[:, :16])
    assert counter.get_total_flops() == plain / 2, "with few filters the convolution comes first"


def test_pooled_conv_trains_after_use_in_inference_mode():
    conv, x = PooledConv(24, 24), torch.randn(1, 24, 18, 22, requires_grad=True)
    with torch.inference_mode():
        conv(x)
    conv(x).sum().backward()
    assert x.grad is not None


def test_cubicc_has_the_published_settings():
    config = load_config(ROOT / "configs/cubicc.yaml")
    assert config.objective == ObjectiveConfig(name="dreg", num_samples=10, beta=1.0)
    model, image, caption = config.model, *config.model.modalities.values()
    assert (model.family, model.shared_dim, model.private_dim, model.num_clusters) == ("normal", 64, 32, 35)
    assert model.cluster_mean_range == 0.5
    assert (image.likelihood.family, image.likelihood.scale) == ("laplace", 0.01)
    assert image.likelihood.weight == pytest.approx(32 / (3 * 64 * 64))
    assert (caption.likelihood.family, caption.likelihood.weight) == ("categorical", 5.0)
    assert (config.optimizer.learning_rate, config.optimizer.amsgrad, config.train.batch_size) == (
        1e-3,
        True,
        32,
    )


def test_cubicc_has_the_expected_number_of_parameters():
    config = load_config(ROOT / "configs/cubicc.yaml").model
    model = CMVAE(config, {"image": image(64, 64), "caption": text(32, 1590)})
    networks = 8_618_048 + 4_309_699 + 2_764_416 + 3_358_167
    assert count(model) == networks + 35 * 64 + 35 + 2 * 32


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_a_model_of_all_kinds_trains_and_generates(precision):
    modalities = {
        "photo": image(16, 16),
        "caption": text(16),
        "sizes": VECTOR,
        "marks": BINARY,
        "colour": CATEGORICAL,
    }
    config = ModelConfig(
        shared_dim=4,
        private_dim=3,
        num_clusters=3,
        modalities={name: ModalityConfig(width=4) for name in modalities},
    )
    torch.manual_seed(0)
    model = CMVAE(config, modalities, precision)
    task = CMVAETask(model, ObjectiveConfig(name="dreg", num_samples=3))
    batch = {name: made_up_data(modality) for name, modality in modalities.items()}
    batch |= {"valid": torch.ones(B, dtype=torch.bool), "mask": torch.ones(B, 5, dtype=torch.bool)}
    batch["_place"] = range(B)
    optimizer = torch.optim.Adam(task.parameters(), 3e-3)
    losses = []
    for step in range(30):
        loss, _ = task({**batch, "_seed": step})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(parameter.grad is not None for parameter in task.parameters())
    generated = model.eval().generate(6)
    assert {name: tuple(x.shape[1:]) for name, x in generated.items()} == {
        name: modality.shape for name, modality in modalities.items()
    }
