"""ALBEF fine-tuned for NLVR2: whether a statement about two images is true.

    image    one tower sees both; the statement guides both
    fusion   each fusion layer becomes two, one for each image in turn, self-attention and MLP
             included; keys and values of their cross attention are the same

Source: ALBEF's models/model_nlvr.py, xbert.py, NLVR.py and configs/NLVR.yaml. There the layers are
doubled by Pretrain_nlvr.py, which then trains on pairs of images before fine-tuning.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig

from elip_models.models.albef.downstream import (
    ALBEFClassifier,
    ALBEFClassifierConfig,
    ClassifierEncoders,
)
from elip_models.models.layers.distillation import Weights
from elip_models.validation import Size


@dataclass(frozen=True, kw_only=True)
class ALBEFNLVR2Config(ALBEFClassifierConfig):
    """Hyper-parameters of an ALBEF for NLVR2; the defaults are the official code's.

    The fields: see `ALBEFClassifierConfig`; `text_depth` is that of pre-training.
    """

    num_classes: Size = 2

    @property
    def fusion_layers(self) -> range:
        return range(self.text_layers, 2 * self.text_depth - self.text_layers)

    @property
    def bert(self) -> BertConfig:
        bert = super().bert
        bert.num_hidden_layers = self.fusion_layers.stop
        return bert


class PairEncoders(ClassifierEncoders):
    """Encoders whose fusion layers see one image and the other in turn."""

    def __init__(self, config: ALBEFNLVR2Config) -> None:
        super().__init__(config)
        for i in self.fuses[::2]:
            first, second = (self.text.layers[j].crossattention.self for j in (i, i + 1))
            first.key, first.value = second.key, second.value

    def fuse(
        self, hidden: Tensor, mask: Tensor, image_tokens: Tensor, image_mask: Tensor | None = None
    ) -> Tensor:
        """Hidden (B, L, D) attends to image_tokens (2B, N, D), the images of a text one behind the
        other, where image_mask (2B, N) says that they are real -> (B, L, D).
        """
        images = image_tokens[0::2], image_tokens[1::2]
        masks = (None, None) if image_mask is None else (image_mask[0::2], image_mask[1::2])
        for i in self.fuses:
            turn = (i - self.fuses.start) % 2
            hidden = self.text.run(hidden, mask, range(i, i + 1), images[turn], masks[turn])
        return hidden


class ALBEFNLVR2(ALBEFClassifier):
    """ALBEF that says whether a statement about two images is false (0) or true (1)."""

    family = "albef_nlvr2"
    task = "nlvr2"
    config_class = ALBEFNLVR2Config
    config: ALBEFNLVR2Config
    encoders_class = PairEncoders
    encoders: PairEncoders
    encoders_m: PairEncoders | None

    @classmethod
    def encoders_from_pretraining(cls, weights: Weights, config: ALBEFNLVR2Config) -> Weights:
        """Both layers of a pair begin as pre-training's fusion layer."""
        begun = {}
        for name, weight in super().encoders_from_pretraining(weights, config).items():
            begun |= dict.fromkeys(_doubled(name, config.text_layers), weight)
        return begun

    def shown(self, images: Tensor, text_cls: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 2, 3, H, W), text_cls (B, D) -> (2B, 3, H, W) and (2B, D)."""
        return images.flatten(0, 1), text_cls.repeat_interleave(2, 0)

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Each image beside the one before it."""
        pairs = torch.stack([images, images.roll(1, 0)], dim=1)
        return super().random_inputs(images) | {"images": pairs}


LAYERS = "text.layers."


def _doubled(name: str, text_layers: int) -> list[str]:
    """The names that a weight of pre-training's encoders has here: two of each fusion layer."""
    if not name.startswith(LAYERS):
        return [name]
    number, _, rest = name.removeprefix(LAYERS).partition(".")
    if int(number) < text_layers:
        return [name]
    first = 2 * int(number) - text_layers
    return [f"{LAYERS}{i}.{rest}" for i in (first, first + 1)]
