"""Families of encoders and decoders, one file per family, by name."""

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
    """An encoder, a decoder and a check of the modality that they are used for.

    `encoder` and `decoder` take (modality, width, shared_dim, private_dim).
    """

    encoder: Callable[[Modality, int, int, int], TwoTrunkEncoder]
    """Maps data (B, *shape), see `cmvae.modalities`, to loc and raw scale of q(z|x) and of q(w|x)."""
    decoder: Callable[[Modality, int, int, int], nn.Module]
    """Maps (z, w), (B, D_z + D_w), to parameters of the likelihood, (B, *parameter_shape)."""
    check: Callable[[Modality, str], None]
    """Takes a modality and its name; raises a UserError if the networks do not fit it."""
    decoder_map_size: float = 1.0
    """Size of the decoder's largest feature map, divided by the number of output values times the width."""


NETWORKS: dict[str, NetworkFamily] = {
    "resnet": NetworkFamily(ImageEncoder, ImageDecoder, check_image_size),
    "strided": NetworkFamily(StridedImageEncoder, StridedImageDecoder, check_strided_size, 1 / 8),
    "caption": NetworkFamily(CaptionEncoder, CaptionDecoder, check_caption),
    "bag_of_words": NetworkFamily(BagOfWordsEncoder, CaptionDecoder, check_caption),
    "mlp": NetworkFamily(VectorEncoder, VectorDecoder, check_vector),
}

IMAGE_NETWORKS = ("resnet", "strided")
"""Families that take only images."""


def network_family(network: str, modality: Modality, name: str) -> NetworkFamily:
    """Look up a family and check that it fits a modality.

    Args:
        network: name of the family.
        modality: modality that it is used for.
        name: name of the modality, for error messages.

    Raises:
        UserError: the family does not exist or does not fit the modality.
    """
    if network not in NETWORKS:
        raise UserError(
            f"model.modalities.{name}.network: unknown network {network!r}. Set one of {', '.join(NETWORKS)}"
        )
    family = NETWORKS[network]
    family.check(modality, name)
    return family
