"""Encoder and decoder pairs, one file a family, found by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from cmvae.modalities import Modality
from cmvae.models.networks.bag_of_words import BagOfWordsEncoder
from cmvae.models.networks.caption import CaptionDecoder, CaptionEncoder, check_caption
from cmvae.models.networks.encoder import TwoTrunkEncoder
from cmvae.models.networks.image import ImageDecoder, ImageEncoder, check_image_size
from cmvae.models.networks.strided import StridedImageDecoder, StridedImageEncoder, check_strided_size
from cmvae.models.networks.vector import VectorDecoder, VectorEncoder, check_vector
from cmvae.utils.errors import UserError


@dataclass(frozen=True)
class NetworkFamily:
    """An encoder, a decoder and the check of what they can be used for.

    `encoder` and `decoder` are built from (modality, width, shared_dim, private_dim). The encoder takes data
    (B, *shape), see `cmvae.modalities`, and returns loc and raw scale of q(z|x), then of q(w|x); the decoder
    takes (B, D_z + D_w) and returns the likelihood's parameters, (B, *parameter shape).
    """

    encoder: Callable[[Modality, int, int, int], TwoTrunkEncoder]
    decoder: Callable[[Modality, int, int, int], nn.Module]
    check: Callable[[Modality, str], None]


NETWORKS: dict[str, NetworkFamily] = {
    "resnet": NetworkFamily(ImageEncoder, ImageDecoder, check_image_size),
    "strided": NetworkFamily(StridedImageEncoder, StridedImageDecoder, check_strided_size),
    "caption": NetworkFamily(CaptionEncoder, CaptionDecoder, check_caption),
    "bag_of_words": NetworkFamily(BagOfWordsEncoder, CaptionDecoder, check_caption),
    "mlp": NetworkFamily(VectorEncoder, VectorDecoder, check_vector),
}


IMAGE_NETWORKS = ("resnet", "strided")
"""Those that take images and nothing else."""


def network_family(network: str, modality: Modality, name: str) -> NetworkFamily:
    """The family called `network`, checked against the modality that it is for.

    Raises:
        UserError: there is no such family, or it does not fit the modality.
    """
    if network not in NETWORKS:
        raise UserError(
            f"model.modalities.{name}.network: no network {network!r}; known are {', '.join(NETWORKS)}"
        )
    family = NETWORKS[network]
    family.check(modality, name)
    return family
