"""Contrastive loss, compared with brute force, cross-entropy and a known mutual information."""

import math

import pytest
import torch
import torch.nn.functional as F

from cmvae.models.alignment import augment, contrast
from cmvae.utils.seeds import sample_generators


def brute_force(anchors, present, candidates, candidate_present, positions, variance):
    """Compute one logit at a time."""
    num_modalities, batch_size, _ = anchors.shape
    losses = []
    for i in range(batch_size):
        terms = []
        for m in range(num_modalities):
            for n in range(num_modalities):
                if m == n or not (present[m, i] and present[n, i]):
                    continue
                logits = {
                    j: -float((anchors[m, i] - candidates[n, j]).square().sum()) / (2 * variance)
                    for j in range(candidates.shape[1])
                    if candidate_present[n, j]
                }
                total = math.log(sum(math.exp(value) for value in logits.values()))
                terms.append(total - logits[int(positions[i])])
        losses.append(sum(terms) / len(terms) if terms else 0.0)
    return torch.tensor(losses)


@pytest.mark.parametrize("max_logits", [2**24, 40, 1])
def test_contrast_equals_brute_force(max_logits):
    torch.manual_seed(0)
    candidates = torch.randn(3, 11, 4)
    candidate_present = torch.rand(3, 11) < 0.7
    candidate_present[:, 2:4] = torch.tensor([[True, False], [False, False], [True, False]])
    positions = torch.arange(2, 9)
    anchors, present = candidates[:, positions], candidate_present[:, positions]
    found = contrast(anchors, present, candidates, candidate_present, positions, 0.7, max_logits)
    expected = brute_force(anchors, present, candidates, candidate_present, positions, 0.7)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found[1] == 0  # This sample has no modality.


def test_gradient_does_not_depend_on_the_parts():
    torch.manual_seed(0)
    z = torch.randn(3, 16, 4, dtype=torch.float64)
    present = torch.rand(3, 16) < 0.8
    gradients = []
    for max_logits in (2**24, 200):
        leaf = z.clone().requires_grad_()
        contrast(leaf, present, leaf, present, torch.arange(16), 1.0, max_logits).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert gradients[0].isfinite().all()


def test_contrast_of_two_modalities_is_a_symmetric_cross_entropy():
    torch.manual_seed(0)
    z = torch.randn(2, 9, 3)
    logits = -torch.cdist(z[0], z[1]).square() / (2 * 1.3)
    target = torch.arange(9)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    present = torch.ones(2, 9, dtype=torch.bool)
    found = contrast(z, present, z, present, target, 1.3).mean()
    torch.testing.assert_close(found, expected)


def test_contrast_is_zero_if_a_modality_is_missing_everywhere():
    z = torch.randn(2, 4, 3, requires_grad=True)
    present = torch.tensor([[True] * 4, [False] * 4])
    loss = contrast(z, present, z, present, torch.arange(4), 1.0).sum()
    loss.backward()
    assert loss == 0
    assert z.grad is not None
    assert z.grad.isfinite().all()


def test_minimum_is_the_mutual_information():
    """Ten equally likely, perfectly separated classes: the loss is the log of the class size."""
    means = 50 * torch.eye(10)
    labels = torch.arange(200) % 10
    z = means[labels].expand(3, -1, -1)
    present = torch.ones(3, 200, dtype=torch.bool)
    loss = contrast(z, present, z, present, torch.arange(200), 1.0).mean()
    assert math.log(200) - loss.item() == pytest.approx(math.log(10), abs=1e-4)


def test_augmented_images_are_mirrored_or_cropped():
    torch.manual_seed(0)
    ramp = torch.linspace(0, 1, 16)
    images = ramp.expand(64, 1, 16, 16)
    flipped = augment(images, ("flip",))
    mirrored = (flipped[:, 0, 0, 0] > 0.5).sum()
    assert 16 < mirrored < 48
    torch.testing.assert_close(flipped.sort(dim=-1).values, images, atol=1e-5, rtol=0)
    cropped = augment(images, ("crop",))
    span = cropped[..., -1] - cropped[..., 0]
    assert span.min() > 0.5
    assert span.max() < 1
    assert span.flatten(1).std(1).max() < 1e-4  # All rows of an image have the same crop.
    assert len(span[:, 0, 0].unique()) > 32  # Crops differ between images.
    torch.testing.assert_close(augment(images, ()), images, atol=1e-5, rtol=0)


def test_augmentation_does_not_depend_on_the_batch():
    torch.manual_seed(0)
    images, names = torch.rand(6, 3, 8, 8), ("flip", "crop")

    def augmented(places):
        return augment(images[places], names, sample_generators(3, places, torch.device("cpu")))

    whole = augmented(range(6))
    torch.testing.assert_close(augmented(range(2, 5)), whole[2:5])
    assert not torch.allclose(whole, images, atol=0.01)
