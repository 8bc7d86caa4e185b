"""Contrast between modalities: what they share is found by telling which encodings belong to one sample.

Pure functions of tensors. Axes: M modalities, B samples of the batch, J candidates, D dimensions of z.

The bound alone teaches z slowly where data is hard, as the private latents explain each modality at once. A
contrast needs no decoder. Source of the loss: InfoNCE (van den Oord et al., 2018), between modalities as in
CLIP (Radford et al., 2021), here over squared distances, because clusters are read from distances; beside a
multimodal bound as in Shi et al. (ICLR 2021).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cmvae.config import AugmentationName
from cmvae.utils.seeds import Generators, draw_uniform

MAX_LOGITS = 2**24
"""Logits that are kept for the gradient. Those of more samples are computed in parts, and again in the
backward pass: memory then grows with the number of candidates, not with its square."""
_SMALLEST_CROP = 0.6
"""Side of a crop, as a share of the image's."""


def contrast(
    anchors: Tensor,
    present: Tensor,
    candidates: Tensor,
    candidate_present: Tensor,
    places: Tensor,
    variance: Tensor | float,
    max_logits: int = MAX_LOGITS,
    groups: Tensor | None = None,
) -> Tensor:
    """InfoNCE of every sample: −log of the probability of its own encoding among the candidates.

    Modality m of sample i finds modality n ≠ m of the same sample among all candidates that have n, with
    logits −‖z_m,i − z_n,j‖² / (2 · variance). The mean over the ordered pairs (m, n) that the sample has. Its
    negative plus log J is a lower bound of the mutual information between z_m and z_n.

    Args:
        anchors: (M, B, D).
        present: (M, B) bool, the modalities that a sample has.
        candidates: (M, J, D), `anchors` among them: with several ranks those of all ranks.
        candidate_present: (M, J) bool.
        places: (B,) int64, which candidate is the sample itself.
        variance: of the difference between two encodings that belong together, per dimension; a number, or
            (D,).
        max_logits: see `MAX_LOGITS`.
        groups: (J,) int64, the group of each candidate, −1 for none. The other members of a sample's group
            belong with it, so that they are no candidates for it. None if there are no groups.

    Returns:
        (B,) in nats, zero for samples with fewer than two modalities.
    """
    num_modalities, batch_size, _ = anchors.shape
    scale = torch.as_tensor(variance, dtype=anchors.dtype, device=anchors.device).mul(2).sqrt()
    anchors, candidates = anchors / scale, candidates / scale
    rows = max(1, max_logits // (num_modalities * num_modalities * candidates.shape[1]))

    def log_probabilities(part: slice) -> Tensor:
        """Of the own encoding, (M, M, part): from m to n."""
        found = []
        hidden = ~candidate_present[:, None]
        if groups is not None:
            hidden = hidden | _others_of_group(groups, places[part])
        for m in range(num_modalities):
            # (M, part, J), from m to every n
            logits = -torch.cdist(anchors[m, part].expand(num_modalities, -1, -1), candidates).square()
            logits = logits.masked_fill(hidden, -torch.inf)
            own = places[part].expand(num_modalities, -1).unsqueeze(-1)
            # A target that the sample lacks is not counted below, and must stay finite.
            own_logit = logits.gather(-1, own).squeeze(-1)
            own_logit = torch.where(present[:, part], own_logit, 0)
            found.append(own_logit - _finite_logsumexp(logits))
        return torch.stack(found)

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
    pairs = (
        present[:, None]
        & present
        & ~torch.eye(num_modalities, dtype=torch.bool, device=present.device)[..., None]
    )
    return -(log_p * pairs).sum((0, 1)) / pairs.sum((0, 1)).clamp(min=1)


def _others_of_group(groups: Tensor, places: Tensor) -> Tensor:
    """(len(places), J) bool: the candidates of the group of each place, without the place itself."""
    own = groups[places, None]
    candidate = torch.arange(len(groups), device=groups.device)
    return (own == groups) & (own >= 0) & (candidate != places[:, None])


def _finite_logsumexp(logits: Tensor) -> Tensor:
    """Logsumexp over the last axis, zero where all are −∞: nobody has that modality."""
    nobody = logits.isneginf().all(-1, keepdim=True)
    return logits.masked_fill(nobody, 0).logsumexp(-1).masked_fill(nobody.squeeze(-1), 0)


def augment(images: Tensor, names: tuple[AugmentationName, ...], generators: Generators = None) -> Tensor:
    """Images that show the same thing in another way, each changed on its own.

    Args:
        images: (B, C, H, W).
        names: `flip` mirrors half of them; `crop` enlarges a random part, at least 0.6 of each side.
        generators: one per image.

    Returns:
        (B, C, H, W).
    """
    drawn = draw_uniform((len(images), 4), images.device, generators).T
    side, mirror = torch.ones_like(drawn[0]), torch.ones_like(drawn[0])
    if "crop" in names:
        side = _SMALLEST_CROP + (1 - _SMALLEST_CROP) * drawn[0]
    centre = (2 * drawn[1:3] - 1) * (1 - side)
    if "flip" in names:
        mirror = torch.where(drawn[3] < 0.5, -1.0, 1.0)
    nothing = torch.zeros_like(side)
    # (B, 2, 3): from places in the result to places in the image, both in [−1, 1].
    maps = torch.stack(
        [
            torch.stack([side * mirror, nothing, centre[0]], dim=1),
            torch.stack([nothing, side, centre[1]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)
