"""ALBEF fine-tuned for image-text retrieval: ranked by features, the best again by ITM.

Source: ALBEF's models/model_retrieval.py, Retrieval.py and configs/Retrieval_{coco,flickr}.yaml.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from elip_models.models.albef.model import ALBEF, ALBEFConfig, ALBEFTowers
from elip_models.models.layers.distillation import DistillationConfig, Weights
from elip_models.models.momentum_retrieval import MomentumRetrieval, retrieval_from_pretraining
from elip_models.validation import Size


@dataclass(frozen=True, kw_only=True)
class ALBEFRetrievalConfig(ALBEFConfig, DistillationConfig):
    """Hyper-parameters of an ALBEF for retrieval; the defaults are the official code's.

    The fields: see `ALBEFConfig`, of which those of masked tokens say nothing here, and
    `DistillationConfig`.
    """

    image_size: Size = 384


class ALBEFRetrieval(MomentumRetrieval, ALBEF):
    """ALBEF without a language head, whose queue knows the images."""

    family = "albef_retrieval"
    config_class = ALBEFRetrievalConfig
    config: ALBEFRetrievalConfig
    pretraining: ClassVar[type[ALBEF]] = ALBEF
    encoders_class = ALBEFTowers
    encoders: ALBEFTowers

    @classmethod
    def from_pretraining(
        cls, weights: dict[str, Tensor], config: ALBEFRetrievalConfig
    ) -> dict[str, Tensor]:
        """Weights of an `ALBEF`, by its names -> what retrieval begins with."""

        def without_head(encoders: Weights) -> Weights:
            return {n: w for n, w in encoders.items() if not n.startswith("language_head.")}

        return retrieval_from_pretraining(weights, config, without_head)
