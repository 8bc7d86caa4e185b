"""Make PolyMNIST from single images: pair images of a class, invert colours under the digit.

Source: Sutter, Daunhawer, Vogt, "Generalized Multimodal ELBO", ICLR 2021.
"""

from __future__ import annotations

import numpy as np


def pair_within_classes(labels: np.ndarray, num_modalities: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the underlying image of every sample and modality.

    The images of each class are permuted separately for each modality. Every image is used exactly once per
    modality, and the images of a sample share only their class.

    Args:
        labels: (N,) class of each underlying image; sample i has the class of image i.
        num_modalities: M, number of modalities.
        rng: random number generator.

    Returns:
        (M, N) indices of the underlying images.
    """
    partners = np.empty((num_modalities, len(labels)), dtype=np.int64)
    for modality in range(num_modalities):
        for label in np.unique(labels):
            members = np.flatnonzero(labels == label)
            partners[modality, members] = rng.permutation(members)
    return partners


def invert_under(background: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Invert the colours of the background where the digit is.

    Args:
        background: (height, width, 3) uint8.
        mask: (height, width) bool.

    Returns:
        (3, height, width) uint8.
    """
    return np.where(mask[..., None], 255 - background, background).transpose(2, 0, 1)
