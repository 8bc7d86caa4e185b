"""How PolyMNIST is made from single images: partners of the same class, colours inverted under the digit.

Source: Sutter, Daunhawer, Vogt, "Generalized Multimodal ELBO", ICLR 2021.
"""

from __future__ import annotations

import numpy as np


def pair_within_classes(labels: np.ndarray, num_modalities: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the underlying image of every sample and modality.

    For each class and modality a separate random permutation of the images of that class: every image is
    used exactly once in each modality, and the images of a sample share nothing but their class.

    Args:
        labels: (N,) class of each underlying image; sample i has the class of image i.
        num_modalities: M.
        rng: where the permutations come from.

    Returns:
        (M, N) numbers of the underlying images.
    """
    partners = np.empty((num_modalities, len(labels)), dtype=np.int64)
    for modality in range(num_modalities):
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            partners[modality, members] = rng.permutation(members)
    return partners


def invert_under(background: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The background with its colours inverted where the digit is.

    Args:
        background: (height, width, 3) uint8.
        mask: (height, width) bool.

    Returns:
        (3, height, width) uint8.
    """
    return np.where(mask[..., None], 255 - background, background).transpose(2, 0, 1)
