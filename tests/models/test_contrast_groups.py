"""Contrastive loss for batches with several members of a group, which are not negatives for each other."""

import pytest
import torch

from cmvae.models.alignment import contrast

GROUPS = torch.tensor([5, 5, -1, 9, 5, -1, 9, 3])


def loss_without_others(z, present, i):
    """Loss of sample i if the other members of its group are removed from the candidates."""
    others = (GROUPS[i] == GROUPS) & (GROUPS >= 0)
    others[i] = False
    kept = (~others).nonzero().flatten()
    position = (kept == i).nonzero().flatten()
    return contrast(z[:, [i]], present[:, [i]], z[:, kept], present[:, kept], position, 0.7)[0]


@pytest.mark.parametrize("max_logits", [2**24, 1])
def test_other_members_of_the_group_are_excluded(max_logits):
    torch.manual_seed(0)
    z, present = torch.randn(3, 8, 4), torch.rand(3, 8) < 0.8
    positions = torch.arange(1, 7)
    found = contrast(z[:, positions], present[:, positions], z, present, positions, 0.7, max_logits, GROUPS)
    expected = torch.stack([loss_without_others(z, present, i) for i in positions.tolist()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(
        found, contrast(z[:, positions], present[:, positions], z, present, positions, 0.7)
    )


def test_samples_without_a_group_are_not_excluded():
    torch.manual_seed(0)
    z, present, positions = torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool), torch.arange(5)
    alone = contrast(z, present, z, present, positions, 1.0, groups=torch.full((5,), -1))
    torch.testing.assert_close(alone, contrast(z, present, z, present, positions, 1.0))


def test_loss_is_zero_if_the_batch_is_one_group():
    torch.manual_seed(0)
    z = torch.randn(2, 4, 3, requires_grad=True)
    present = torch.ones(2, 4, dtype=torch.bool)
    loss = contrast(z, present, z, present, torch.arange(4), 1.0, groups=torch.full((4,), 2))
    assert loss.tolist() == [0, 0, 0, 0]
    loss.sum().backward()
    assert not z.grad.any()
