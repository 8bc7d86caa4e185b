"""The contrast where members of one group lie in a batch: they are no candidates for each other."""

import pytest
import torch

from cmvae.models.alignment import contrast

GROUPS = torch.tensor([5, 5, -1, 9, 5, -1, 9, 3])


def without_the_others(z, present, i):
    """The loss of sample i where the other members of its group are not there at all."""
    others = (GROUPS[i] == GROUPS) & (GROUPS >= 0)
    others[i] = False
    kept = (~others).nonzero().flatten()
    place = (kept == i).nonzero().flatten()
    return contrast(z[:, [i]], present[:, [i]], z[:, kept], present[:, kept], place, 0.7)[0]


@pytest.mark.parametrize("max_logits", [2**24, 1])
def test_a_loss_is_that_without_the_other_members_of_the_group(max_logits):
    torch.manual_seed(0)
    z, present = torch.randn(3, 8, 4), torch.rand(3, 8) < 0.8
    places = torch.arange(1, 7)
    found = contrast(z[:, places], present[:, places], z, present, places, 0.7, max_logits, GROUPS)
    expected = torch.stack([without_the_others(z, present, i) for i in places.tolist()])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found, contrast(z[:, places], present[:, places], z, present, places, 0.7))


def test_without_groups_nothing_changes():
    torch.manual_seed(0)
    z, present, places = torch.randn(2, 5, 3), torch.ones(2, 5, dtype=torch.bool), torch.arange(5)
    alone = contrast(z, present, z, present, places, 1.0, groups=torch.full((5,), -1))
    torch.testing.assert_close(alone, contrast(z, present, z, present, places, 1.0))


def test_a_batch_of_one_group_has_nothing_to_tell_apart():
    torch.manual_seed(0)
    z = torch.randn(2, 4, 3, requires_grad=True)
    present = torch.ones(2, 4, dtype=torch.bool)
    loss = contrast(z, present, z, present, torch.arange(4), 1.0, groups=torch.full((4,), 2))
    assert loss.tolist() == [0, 0, 0, 0]
    loss.sum().backward()
    assert not z.grad.any()
