"""Operations with gradients of their own against torch's."""

import pytest
import torch
import torch.nn.functional as F

from cmvae.models.networks.convolutions import LeakyReLU, add_to_borders, box_mean, conv_transpose2d


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


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_means_and_borders_have_the_gradients_of_torchs_operations(layout):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 4, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    expected = F.avg_pool2d(x, 3, stride=1, padding=1), x[:, :, 0].mT, x[..., 0].mT
    found = box_mean(x)
    towards = [torch.randn_like(part) for part in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    (gradient,) = torch.autograd.grad(found, x, towards)
    (expected_gradient,) = torch.autograd.grad(expected, x, towards)
    torch.testing.assert_close(gradient, expected_gradient)


def test_what_is_added_to_the_borders_is_added_in_the_corner_twice():
    torch.manual_seed(0)
    x, top, left = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 6, 4), (2, 4, 3), (2, 6, 3)))
    y = add_to_borders(x * 1, top, left)
    expected = x + F.pad(top.mT[:, :, None], (0, 0, 0, 5)) + F.pad(left.mT[..., None], (0, 3))
    torch.testing.assert_close(y, expected)
    towards = torch.randn_like(y)
    gradients = [torch.autograd.grad((z * towards).sum(), (x, top, left)) for z in (y, expected)]
    for found, other in zip(*gradients, strict=True):
        torch.testing.assert_close(found, other)
