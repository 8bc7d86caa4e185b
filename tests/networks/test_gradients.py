"""Operations with gradients of their own against torch's."""

import pytest
import torch
import torch.nn.functional as F

from cmvae.networks.gradients import LeakyReLU, conv_transpose2d


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_leaky_relu_has_torchs_numbers_and_gradient(dtype):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-40, -1e-40])]).to(dtype).requires_grad_()
    towards = torch.randn(1004).to(dtype)
    found, expected = LeakyReLU(0.2)(x), F.leaky_relu(x, 0.2)
    assert torch.equal(found, expected)
    (found_gradient,) = torch.autograd.grad(found, x, towards)
    (expected_gradient,) = torch.autograd.grad(expected, x, towards)
    assert torch.equal(found_gradient, expected_gradient)


def test_a_leaky_relu_keeps_only_what_the_next_layer_keeps_too():
    torch.manual_seed(0)
    weight = torch.randn(5, 7, requires_grad=True)

    def kept(activation):
        storages = set()

        def pack(tensor):
            storages.add(tensor.data_ptr())
            return tensor

        hidden = torch.randn(3, 5, requires_grad=True) * 2
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            activation(hidden) @ weight
        return storages - {weight.data_ptr()}

    assert len(kept(LeakyReLU(0.2))) == 1
    assert len(kept(torch.nn.LeakyReLU(0.2))) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_transposed_convolution_has_torchs_numbers_and_gradients(dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6, dtype=dtype, requires_grad=True)
    kernel = torch.randn(4, 2, 4, 4, dtype=dtype, requires_grad=True)
    bias = torch.randn(2, dtype=dtype, requires_grad=True)
    found = conv_transpose2d(x, kernel, bias, stride=2, padding=1)
    expected = F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)
    assert torch.equal(found, expected)
    towards = torch.randn_like(found)
    gradients = [torch.autograd.grad(y, (x, kernel, bias), towards) for y in (found, expected)]
    for mine, torchs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, torchs)


def test_under_autocast_the_bias_gets_a_gradient_of_its_own_precision():
    torch.manual_seed(0)
    x, kernel = torch.randn(3, 4, 5, 6), torch.randn(4, 2, 4, 4)
    bias = torch.randn(2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv_transpose2d(x, kernel, bias, stride=2, padding=1)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((2,), 3.0 * 10 * 12))
