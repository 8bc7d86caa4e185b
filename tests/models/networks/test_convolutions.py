"""Operations with custom gradients, compared with those of torch."""

import pytest
import torch
import torch.nn.functional as F

from cmvae.models.networks.convolutions import LeakyReLU, add_to_borders, box_mean, conv_transpose2d


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_leaky_relu_matches_torch(dtype):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1000), torch.tensor([0.0, -0.0, 1e-40, -1e-40])]).to(dtype).requires_grad_()
    towards = torch.randn(1004).to(dtype)
    found, expected = LeakyReLU(0.2)(x), F.leaky_relu(x, 0.2)
    assert torch.equal(found, expected)
    (found_gradient,) = torch.autograd.grad(found, x, towards)
    (expected_gradient,) = torch.autograd.grad(expected, x, towards)
    assert torch.equal(found_gradient, expected_gradient)


def test_leaky_relu_saves_no_tensor_of_its_own():
    torch.manual_seed(0)
    weight = torch.randn(5, 7, requires_grad=True)

    def saved(activation):
        storages = set()

        def pack(tensor):
            storages.add(tensor.data_ptr())
            return tensor

        hidden = torch.randn(3, 5, requires_grad=True) * 2
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            activation(hidden) @ weight
        return storages - {weight.data_ptr()}

    # The input of the next layer, and with torch's activation its own input, too.
    assert len(saved(LeakyReLU(0.2))) == 1
    assert len(saved(torch.nn.LeakyReLU(0.2))) == 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_conv_transpose2d_matches_torch(dtype):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 6, dtype=dtype, requires_grad=True)
    kernel = torch.randn(4, 2, 4, 4, dtype=dtype, requires_grad=True)
    bias = torch.randn(2, dtype=dtype, requires_grad=True)
    found = conv_transpose2d(x, kernel, bias, stride=2, padding=1)
    expected = F.conv_transpose2d(x, kernel, bias, stride=2, padding=1)
    assert torch.equal(found, expected)
    towards = torch.randn_like(found)
    gradients = [torch.autograd.grad(y, (x, kernel, bias), towards) for y in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_bias_gradient_keeps_its_dtype_under_autocast():
    torch.manual_seed(0)
    x, kernel = torch.randn(3, 4, 5, 6), torch.randn(4, 2, 4, 4)
    bias = torch.randn(2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = conv_transpose2d(x, kernel, bias, stride=2, padding=1)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    torch.testing.assert_close(bias.grad, torch.full((2,), 3.0 * 10 * 12))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_box_mean_matches_torch(layout):
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


def test_add_to_borders_adds_both_in_the_corner():
    torch.manual_seed(0)
    x, top, left = (torch.randn(shape, requires_grad=True) for shape in ((2, 3, 6, 4), (2, 4, 3), (2, 6, 3)))
    y = add_to_borders(x * 1, top, left)
    expected = x + F.pad(top.mT[:, :, None], (0, 0, 0, 5)) + F.pad(left.mT[..., None], (0, 3))
    torch.testing.assert_close(y, expected)
    towards = torch.randn_like(y)
    gradients = [torch.autograd.grad((z * towards).sum(), (x, top, left)) for z in (y, expected)]
    for found, other in zip(*gradients, strict=True):
        torch.testing.assert_close(found, other)
