"""BLIP fine-tuned for image-text retrieval: rank by features, re-rank the best by ITM.

Negatives of ITM are drawn by similarities between online features, not to momentum features.
Source: models/blip_retrieval.py and configs/retrieval_{coco,flickr}.yaml of BLIP.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from elip_models.pretraining.models.blip.base import BLIPEncoders, BLIPWithEncoder
from elip_models.pretraining.models.blip.downstream import BLIPFinetuningConfig
from elip_models.pretraining.models.blip.model import BLIP
from elip_models.pretraining.models.downstream import MomentumRetrieval, Weights, retrieval_weights
from elip_models.pretraining.models.layers.distributed import all_gather
from elip_models.pretraining.models.layers.momentum import similarities
from elip_models.pretraining.models.momentum_model import ContrastiveOutput
from elip_models.validation import NonNegative, Share, Size


@dataclass(frozen=True, kw_only=True)
class BLIPRetrievalConfig(BLIPFinetuningConfig):
    """Hyper-parameters of BLIP for retrieval: see `BLIPFinetuningConfig`."""

    image_size: Size = 384
    context_length: Size = 35
    alpha_warmup_epochs: NonNegative = 1.0
    negative_epsilon: Share = 0.0


class BLIPRetrieval(BLIPWithEncoder, MomentumRetrieval):
    """BLIP without a decoder, with image ids in its queue."""

    family = "blip_retrieval"
    config_class = BLIPRetrievalConfig
    config: BLIPRetrievalConfig
    pretraining = BLIP
    encoders: BLIPEncoders

    def __init__(self, config: BLIPRetrievalConfig) -> None:
        super().__init__(config, BLIPEncoders(config))

    @classmethod
    def from_pretraining(cls, weights: Weights, config: BLIPRetrievalConfig) -> Weights:
        """Map weights of a pre-trained BLIP, and of its momentum encoders, to this model."""
        return retrieval_weights(weights, config, dict)

    def contrast(self, *pairs: Tensor | None) -> ContrastiveOutput:
        """Return the output of the base class, with similarities of the online features."""
        output = super().contrast(*pairs)
        with torch.no_grad():
            keys = tuple(all_gather(each, self.config.gather).T for each in output.features)
            similar = similarities(output.features, keys, self.temperature)
        return output._replace(similar=similar)
