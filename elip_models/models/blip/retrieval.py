"""BLIP fine-tuned for image-text retrieval: ranked by features, the best again by ITM.

Negatives are drawn by the online features of the batch, not by those of the momentum encoders.
Source: BLIP's models/blip_retrieval.py, configs/retrieval_coco.yaml and retrieval_flickr.yaml.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from elip_models.models.blip.model import BLIP
from elip_models.models.blip.shared import BLIPEncoders, Reader
from elip_models.models.downstream.blip import BLIPTaskConfig
from elip_models.models.layers.distributed import all_gather
from elip_models.models.layers.momentum import similarities
from elip_models.models.momentum_model import Contrast
from elip_models.models.momentum_retrieval import MomentumRetrieval, retrieval_from_pretraining
from elip_models.validation import NonNegative, Share, Size


@dataclass(frozen=True, kw_only=True)
class BLIPRetrievalConfig(BLIPTaskConfig):
    """Hyper-parameters of BLIP for retrieval: see `BLIPTaskConfig`."""

    image_size: Size = 384
    context_length: Size = 35
    alpha_warmup_epochs: NonNegative = 1.0
    negative_epsilon: Share = 0.0


class BLIPRetrieval(Reader, MomentumRetrieval):
    """BLIP without a decoder, whose queue knows the images."""

    family = "blip_retrieval"
    config_class = BLIPRetrievalConfig
    config: BLIPRetrievalConfig
    pretraining = BLIP
    encoders: BLIPEncoders

    def __init__(self, config: BLIPRetrievalConfig) -> None:
        super().__init__(config, BLIPEncoders(config))

    @classmethod
    def from_pretraining(
        cls, weights: dict[str, Tensor], config: BLIPRetrievalConfig
    ) -> dict[str, Tensor]:
        """Weights of BLIP -> of this model, all of them, its momentum encoders too."""
        return retrieval_from_pretraining(weights, config, dict)

    def contrast(self, *pairs: Tensor | None) -> Contrast:
        """As of `MomentumModel`, but for `similar`, which is that of the online features."""
        seen = super().contrast(*pairs)
        with torch.no_grad():
            keys = tuple(all_gather(each, self.config.gather).T for each in seen.features)
            similar = similarities(seen.features, keys, self.temperature)
        return seen._replace(similar=similar)
