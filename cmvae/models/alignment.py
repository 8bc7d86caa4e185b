"""Contrastive loss between modalities: it matches the encodings of a sample across modalities.

Pure functions of tensors. Axes: M modalities, B samples of the batch, J candidates, D dimensions of z.

With the bound alone, z is learned slowly on difficult data, because the private latents explain each modality
by themselves. The contrastive loss needs no decoder. It is InfoNCE (van den Oord et al., 2018) between
modalities, as in CLIP (Radford et al., 2021), but its logits are squared distances, because clusters depend
on distances. Shi et al. (ICLR 2021) add a contrastive loss to a multimodal bound.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cmvae.config import AugmentationName
from cmvae.utils.seeds import Generators, draw_uniform

MAX_LOGITS = 2**24
"""Maximum number of logits that are kept for the gradient. More are computed in parts, and again in the
backward pass: memory then grows with the number of candidates, not with its square."""
# Smallest side of a crop, as a fraction of the image's side.
_MIN_CROP = 0.6


def contrast(
    anchors: Tensor,
    present: Tensor,
    candidates: Tensor,
    candidate_present: Tensor,
    positions: Tensor,
    variance: Tensor | float,
    max_logits: int = MAX_LOGITS,
    groups: Tensor | None = None,
) -> Tensor:
    """InfoNCE loss of every sample: −log p of its own encoding among the candidates.

    Modality m of sample i identifies modality n ≠ m of the same sample among all candidates j that have n,
    with logits −‖z_m,i − z_n,j‖² / (2 · variance). The loss is the mean over the ordered pairs (m, n) of
    modalities that the sample has. Its negative plus log J is a lower bound on the mutual information between
    z_m and z_n.

    Args:
        anchors: (M, B, D) encodings of the batch.
        present: (M, B) bool, the modalities that a sample has.
        candidates: (M, J, D) encodings that include `anchors`; those of all ranks, if there are several.
        candidate_present: (M, J) bool, the modalities that a candidate has.
        positions: (B,) int64, the index of each sample among the candidates.
        variance: expected variance of the difference between two encodings of one sample, per dimension; a
            number or (D,).
        max_logits: see `MAX_LOGITS`.
        groups: (J,) int64, the group of each candidate, −1 for none. The other members of a sample's group
            are not used as negatives for it. None if the data has no groups.

    Returns:
        (B,) in nats; zero for samples with fewer than two modalities.
    """
    num_modalities, batch_size, _ = anchors.shape
    scale = torch.as_tensor(variance, dtype=anchors.dtype, device=anchors.device).mul(2).sqrt()
    anchors, candidates = anchors / scale, candidates / scale
    rows = max(1, max_logits // (num_modalities * num_modalities * candidates.shape[1]))

    def log_probabilities(part: slice) -> Tensor:
        """Log p of the own encodings of the samples in `part`, (M, M, part), from modality m to n."""
        log_p = []
        excluded = ~candidate_present[:, None]
        if groups is not None:
            excluded = excluded | _others_of_group(groups, positions[part])
        for m in range(num_modalities):
            # (M, part, J): from m to every n.
            logits = -torch.cdist(anchors[m, part].expand(num_modalities, -1, -1), candidates).square()
            logits = logits.masked_fill(excluded, -torch.inf)
            own = positions[part].expand(num_modalities, -1).unsqueeze(-1)
            # Missing targets are not counted below, but must stay finite.
            own_logit = logits.gather(-1, own).squeeze(-1)
            own_logit = torch.where(present[:, part], own_logit, 0)
            log_p.append(own_logit - _finite_logsumexp(logits))
        return torch.stack(log_p)

    parts = [slice(first, first + rows) for first in range(0, batch_size, rows)]
    if len(parts) == 1:
        log_p = log_probabilities(parts[0])
    else:
        log_p = torch.cat(
            [
                checkpoint(log_probabilities, part, use_reentrant=False, preserve_rng_state=False)
                for part in parts
            ],
            dim=-1,
        )
    is_other = ~torch.eye(num_modalities, dtype=torch.bool, device=present.device)
    pairs = present[:, None] & present & is_other[..., None]
    return -(log_p * pairs).sum((0, 1)) / pairs.sum((0, 1)).clamp(min=1)


def _others_of_group(groups: Tensor, positions: Tensor) -> Tensor:
    """Other candidates of the same group, (len(positions), J) bool."""
    own = groups[positions, None]
    candidate = torch.arange(len(groups), device=groups.device)
    return (own == groups) & (own >= 0) & (candidate != positions[:, None])


def _finite_logsumexp(logits: Tensor) -> Tensor:
    """Logsumexp over the last axis; zero where all are −∞, because no candidate has the modality."""
    is_empty = logits.isneginf().all(-1, keepdim=True)
    return logits.masked_fill(is_empty, 0).logsumexp(-1).masked_fill(is_empty.squeeze(-1), 0)


def augment(images: Tensor, names: tuple[AugmentationName, ...], generators: Generators = None) -> Tensor:
    """Augment each image at random, independently of the others.

    Args:
        images: (B, C, H, W).
        names: `flip` mirrors an image with probability 1/2; `crop` enlarges a random part of it, at least 0.6
            of each side.
        generators: random number generators, one per image.

    Returns:
        (B, C, H, W)
    """
    drawn = draw_uniform((len(images), 4), images.device, generators).T
    side, mirror = torch.ones_like(drawn[0]), torch.ones_like(drawn[0])
    if "crop" in names:
        side = _MIN_CROP + (1 - _MIN_CROP) * drawn[0]
    centre = (2 * drawn[1:3] - 1) * (1 - side)
    if "flip" in names:
        mirror = torch.where(drawn[3] < 0.5, -1.0, 1.0)
    zero = torch.zeros_like(side)
    # (B, 2, 3): from coordinates in the result to coordinates in the image, both in [−1, 1].
    theta = torch.stack(
        [
            torch.stack([side * mirror, zero, centre[0]], dim=1),
            torch.stack([zero, side, centre[1]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
