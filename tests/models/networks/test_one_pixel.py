"""Convolutions to and from one pixel, compared with torch's layers; networks use them for such maps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from cmvae.modalities import ImageModality, TextModality
from cmvae.modalities.text import SPECIAL_TOKENS
from cmvae.models.networks import network_family
from cmvae.models.networks.convolutions import conv_transpose2d as with_plain_bias_gradient
from cmvae.models.networks.one_pixel import Conv2d, ConvTranspose2d


class RecordConvolutions(TorchDispatchMode):
    """Records the size (H, W) of the smaller map of every convolution and of every gradient of one."""

    def __init__(self):
        super().__init__()
        self.smaller = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        maps = {
            torch.ops.aten.convolution.default: lambda: (args[0], result),
            torch.ops.aten.convolution_backward.default: lambda: args[:2],
        }.get(function)
        if maps is not None:
            self.smaller.append(min((tuple(x.shape[2:]) for x in maps()), key=lambda size: size[0] * size[1]))
        return result


def recorded(network, x):
    with RecordConvolutions() as record:
        y = network(x)
        (y if isinstance(y, torch.Tensor) else torch.cat(y, 1)).sum().backward()
    return record.smaller


def values_and_gradients(layer, x, towards):
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    inputs = [leaf, *layer.parameters()]
    return [y, *torch.autograd.grad(y, inputs, towards)]


def assert_same_layer(own, plain, inputs, outputs, arguments, size, one_pixel):
    torch.manual_seed(0)
    layer = own(inputs, outputs, **arguments).double()
    after = torch.rand(1)
    torch.manual_seed(0)
    expected = plain(inputs, outputs, **arguments).double()
    assert torch.equal(after, torch.rand(1)), "initialisation draws as many random numbers"
    assert layer.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name])
    x = torch.randn(4, inputs, *size, dtype=torch.float64)
    towards = torch.randn_like(expected(x))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        layer.to(memory_format=memory_format)
        found = values_and_gradients(layer, x, towards)
        for one, other in zip(found, values_and_gradients(expected, x, towards), strict=True):
            assert one.shape == other.shape
            assert (one - other).abs().max() <= 1e-12 * other.abs().max()
    assert (not recorded(layer, x.clone().requires_grad_())) == one_pixel


@pytest.mark.parametrize(
    ("arguments", "size", "one_pixel"),
    [
        # Stems of caption decoders for 8, 16 and 32 tokens.
        ({"kernel_size": (1, 1)}, (1, 1), True),
        ({"kernel_size": (2, 1)}, (1, 1), True),
        ({"kernel_size": (4, 4)}, (1, 1), True),
        ({"kernel_size": (2, 3), "bias": False}, (1, 1), True),
        ({"kernel_size": (1, 4), "stride": (1, 2), "padding": (0, 1)}, (1, 1), True),
        ({"kernel_size": 4, "stride": 2, "padding": 1}, (1, 1), True),
        ({"kernel_size": 3, "padding": 1}, (1, 1), True),
        ({"kernel_size": (1, 4), "stride": (1, 2), "padding": (0, 1)}, (2, 1), False),
        ({"kernel_size": 4, "stride": 2, "padding": 1}, (3, 2), False),
    ],
)
@pytest.mark.parametrize("channels", [(3, 64), (5, 2)])
def test_conv_transpose2d_of_one_pixel_matches_torch(channels, arguments, size, one_pixel):
    assert_same_layer(ConvTranspose2d, nn.ConvTranspose2d, *channels, arguments, size, one_pixel)


@pytest.mark.parametrize(
    ("arguments", "size", "one_pixel"),
    [
        ({"kernel_size": 1, "bias": False}, (1, 1), True),
        ({"kernel_size": 3, "padding": 1}, (1, 1), True),
        ({"kernel_size": 3, "stride": 2, "padding": 1}, (2, 2), True),
        ({"kernel_size": 4, "stride": 2, "padding": 1}, (3, 2), True),
        ({"kernel_size": (2, 3)}, (2, 3), True),
        # No weight is multiplied with the last column.
        ({"kernel_size": 2, "stride": 2}, (2, 3), True),
        ({"kernel_size": (1, 4), "stride": (1, 2), "padding": (0, 1)}, (1, 2), True),
        ({"kernel_size": (1, 4), "stride": (1, 2), "padding": (0, 1)}, (2, 2), False),
        ({"kernel_size": 3, "padding": 1}, (1, 2), False),
    ],
)
@pytest.mark.parametrize("channels", [(3, 64), (5, 2)])
def test_conv2d_to_one_pixel_matches_torch(channels, arguments, size, one_pixel):
    assert_same_layer(Conv2d, nn.Conv2d, *channels, arguments, size, one_pixel)


def test_a_kernel_larger_than_the_padded_map_is_rejected():
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        Conv2d(2, 2, 4)(torch.randn(1, 2, 1, 1))


def test_plain_bias_gradient_is_correct_for_one_pixel():
    torch.manual_seed(0)
    leaves = [torch.randn(*shape, dtype=torch.float64) for shape in ((4, 5, 1, 1), (5, 3, 4, 4), (3,))]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    found = with_plain_bias_gradient(*leaves, stride=2, padding=1)
    expected = F.conv_transpose2d(*leaves, stride=2, padding=1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    towards = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(found, leaves, towards),
        torch.autograd.grad(expected, leaves, towards),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "size", "width"), [("caption", (8,), 4), ("caption", (16,), 4), ("resnet", (3, 4, 4), 8)]
)
def test_no_network_convolves_one_pixel(name, size, width, precision):
    torch.manual_seed(0)
    if name == "caption":
        words = (*SPECIAL_TOKENS, "a", "b", "c")
        modality = TextModality(shape=size, categories=words)
        x = torch.randint(len(words), (4, *size))
    else:
        modality = ImageModality(shape=size)
        x = torch.rand(4, *size)
    networks = network_family(name, modality, "a")
    for network, inputs in (
        (networks.encoder(modality, width, 4, 3), x),
        (networks.decoder(modality, width, 4, 3), torch.randn(12, 7, requires_grad=True)),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is not None):
            smaller = recorded(network, inputs)
        assert smaller, "convolutions are recorded"
        assert (1, 1) not in smaller
