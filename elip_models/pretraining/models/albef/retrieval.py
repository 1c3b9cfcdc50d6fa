"""ALBEF fine-tuned for image-text retrieval: rank by features, re-rank the best by ITM.

Source: models/model_retrieval.py, Retrieval.py and configs/Retrieval_{coco,flickr}.yaml of ALBEF.
"""

from dataclasses import dataclass
from typing import ClassVar

from elip_models.pretraining.models.albef.model import ALBEF, ALBEFConfig, ALBEFTowers
from elip_models.pretraining.models.downstream import (
    DistillationConfig,
    MomentumRetrieval,
    Weights,
    retrieval_weights,
    select_parts,
)
from elip_models.validation import Size


@dataclass(frozen=True, kw_only=True)
class ALBEFRetrievalConfig(ALBEFConfig, DistillationConfig):
    """Hyper-parameters of an ALBEF for retrieval; the defaults are the official code's.

    For the fields, see `ALBEFConfig` and `DistillationConfig`. The fields of masked tokens have no
    effect.
    """

    image_size: Size = 384


class ALBEFRetrieval(MomentumRetrieval, ALBEF):
    """ALBEF without a language head, with image ids in its queue."""

    family = "albef_retrieval"
    config_class = ALBEFRetrievalConfig
    config: ALBEFRetrievalConfig
    pretraining: ClassVar[type[ALBEF]] = ALBEF
    encoders_class = ALBEFTowers
    encoders: ALBEFTowers

    @classmethod
    def from_pretraining(cls, weights: Weights, config: ALBEFRetrievalConfig) -> Weights:
        """Map weights of a pre-trained `ALBEF` to this model, without the language head."""
        parts = ("visual.", "text.", "image_projection.", "text_projection.")
        return retrieval_weights(weights, config, lambda encoders: select_parts(encoders, *parts))
