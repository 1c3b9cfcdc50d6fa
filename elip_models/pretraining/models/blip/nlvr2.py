"""BLIP fine-tuned for NLVR2: classify whether a statement about two images is true.

    text     h = [ENC] t_1 .. t_n; every layer has two cross attentions, c_0 and c_1, one per image
    merging  h + mean(W_0 c_0, W_1 c_1); from layer `merge_from` on, h + W [W_0 c_0, W_1 c_1]
    logits   two linear layers over the state of [ENC]: 0 = false, 1 = true

Source: models/blip_nlvr.py, models/nlvr_encoder.py and configs/nlvr.yaml of BLIP.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertAttention

from elip_models.pretraining.models.blip.base import BLIPEncoders
from elip_models.pretraining.models.blip.downstream import BLIPEncoderTask, BLIPTaskConfig
from elip_models.pretraining.models.blip.model import BLIP
from elip_models.pretraining.models.downstream import TaskOutput, Weights, select_parts
from elip_models.pretraining.models.layers.losses import at_least_fp32
from elip_models.validation import Count, Rate, Size

DUPLICATED = "crossattention.self.", "crossattention.output.dense."
"""Parts of BLIP's names that this model has twice."""


@dataclass(frozen=True, kw_only=True)
class BLIPNLVR2Config(BLIPTaskConfig):
    """Hyper-parameters of BLIP for NLVR2; for the other fields, see `BLIPTaskConfig`.

    Attributes:
        merge_from: first layer that merges both images by a linear layer, not by their mean.
        context_length: in tokens; the original cuts statements after 40 words.
    """

    image_size: Size = 384
    context_length: Size = 64
    drop_path: Rate = 0.1
    merge_from: Count = 6


class TwoImageOutput(nn.Module):
    """Output projections of two cross attentions, their merging, and the residual connection."""

    def __init__(self, outputs: tuple[nn.Module, nn.Module], merges: bool) -> None:
        super().__init__()
        self.dense0, self.dense1 = (output.dense for output in outputs)
        self.dropout, self.LayerNorm = outputs[0].dropout, outputs[0].LayerNorm
        width = self.dense0.out_features
        self.merge_layer = nn.Linear(2 * width, width) if merges else None

    def forward(self, first: Tensor, second: Tensor, hidden: Tensor) -> Tensor:
        """Merge the outputs of two attentions, (B, L, D) each, and add hidden (B, L, D)."""
        projected = self.dense0(first), self.dense1(second)
        if self.merge_layer is None:
            merged = sum(projected) / 2
        else:
            merged = self.merge_layer(torch.cat(projected, 2))
        return self.LayerNorm(self.dropout(merged) + hidden)


class TwoImageAttention(nn.Module):
    """Cross attention to two images in a BERT layer; its parts have the original's names."""

    def __init__(self, config: BertConfig, layer: int, merges: bool) -> None:
        super().__init__()
        both = [BertAttention(config, layer_idx=layer, is_cross_attention=True) for _ in range(2)]
        self.self0, self.self1 = (attention.self for attention in both)
        self.output = TwoImageOutput((both[0].output, both[1].output), merges)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        image_tokens: Tensor,
        image_bias: Tensor | None,
        **named: Any,
    ) -> tuple[Tensor, None]:
        """Attend to image_tokens (B, 2N, D) of two images -> (B, L, D), and None for the weights.

        The mask `image_bias` is (B, 1, 1, 2N). As in transformers, other arguments are unused.
        """
        images = image_tokens.chunk(2, dim=1)
        biases = (None, None) if image_bias is None else image_bias.chunk(2, dim=-1)
        first, _ = self.self0(hidden, images[0], biases[0])
        second, _ = self.self1(hidden, images[1], biases[1])
        return self.output(first, second, hidden), None


class NLVR2Encoders(BLIPEncoders):
    """Towers of BLIP, with two cross attentions in each layer of the text tower."""

    def __init__(self, config: BLIPNLVR2Config) -> None:
        super().__init__(config, projects=False)
        for i, layer in enumerate(self.text.layers):
            bert = layer.crossattention.self.config
            layer.crossattention = TwoImageAttention(bert, i, i >= config.merge_from)
            layer.crossattention.apply(self.text.init)


class BLIPNLVR2(BLIPEncoderTask):
    """BLIP with an encoder of two images and a classifier."""

    family = "blip_nlvr2"
    task = "nlvr2"
    config_class = BLIPNLVR2Config
    config: BLIPNLVR2Config
    pretraining = BLIP

    def __init__(self, config: BLIPNLVR2Config) -> None:
        super().__init__(config, NLVR2Encoders(config))
        width = config.text_width
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    @classmethod
    def from_pretraining(cls, weights: Weights, config: BLIPNLVR2Config) -> Weights:
        """Map weights of a pre-trained BLIP to this model; each cross attention is copied twice.

        The merging layers and the classifier keep their initial weights.
        """
        found = {}
        for name, weight in select_parts(weights, "encoders.visual.", "encoders.text.").items():
            part = next((part for part in DUPLICATED if part in name), None)
            names = (name.replace(part, f"{part[:-1]}{i}.") for i in (0, 1)) if part else (name,)
            found |= dict.fromkeys(names, weight)
        return found

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Return pairs of neighbouring images with statements that are all true."""
        pairs = torch.stack([images, images.roll(-1, 0)], 1)
        labels = torch.ones(len(images), dtype=torch.long, device=images.device)
        return super().random_inputs(images) | {"images": pairs, "labels": labels}

    def logits(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits (B, 2), 0 = false, of images (B, 2, 3, H, W) and texts (B, L)."""
        guides = self.text_guidance(input_ids, attention_mask)
        guides = None if guides is None else guides.repeat_interleave(2, 0)
        tokens, mask = self.encode_masked(images.flatten(0, 1), guides)
        pairs = tokens.unflatten(0, (-1, 2)).flatten(1, 2)
        mask = None if mask is None else mask.unflatten(0, (-1, 2)).flatten(1, 2)
        return self.classifier(self.fuse(input_ids, attention_mask, pairs, mask)[:, 0])

    def forward(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> TaskOutput:
        """Return the loss of statements (B, L) on images (B, 2, 3, H, W); labels (B,), 1 = true."""
        logits = self.logits(images, input_ids, attention_mask)
        loss = F.cross_entropy(at_least_fp32(logits), labels)
        return TaskOutput(loss, logits)
