"""BLIP says whether a statement is true of two images: each layer attends to both.

    text     [ENC] t_1 .. t_n; in each layer h sees image 0 and image 1 by attentions of their own
    joined   h + mean(W_0 c_0, W_1 c_1); from layer `merge_from` on h + W [W_0 c_0, W_1 c_1]
    logits   two layers over the state of [ENC]: 0 = false, 1 = true

Source: BLIP's models/blip_nlvr.py and models/nlvr_encoder.py, configs/nlvr.yaml.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertAttention

from elip_models.models.blip.model import BLIP
from elip_models.models.blip.shared import BLIPEncoders
from elip_models.models.downstream.blip import BLIPAloneConfig, BLIPReadingTask, under
from elip_models.models.layers.losses import at_least_fp32
from elip_models.models.task_output import TaskOutput
from elip_models.validation import Count, Rate, Size

DOUBLED = "crossattention.self.", "crossattention.output.dense."
"""What is there twice, in names of BLIP."""


@dataclass(frozen=True, kw_only=True)
class BLIPNLVR2Config(BLIPAloneConfig):
    """Hyper-parameters of BLIP for NLVR2.

    merge_from: first layer of the encoder that joins both images by a layer, not by their mean.
    context_length: the original cuts statements after 40 words, not after so many tokens.
    The other fields: see `BLIPAloneConfig`.
    """

    image_size: Size = 384
    context_length: Size = 64
    drop_path: Rate = 0.1
    merge_from: Count = 6


class JoinedOutput(nn.Module):
    """What both attentions saw, joined, and the residual."""

    def __init__(self, outputs: tuple[nn.Module, nn.Module], merges: bool) -> None:
        super().__init__()
        self.dense0, self.dense1 = (output.dense for output in outputs)
        self.dropout, self.LayerNorm = outputs[0].dropout, outputs[0].LayerNorm
        width = self.dense0.out_features
        self.merge_layer = nn.Linear(2 * width, width) if merges else None

    def forward(self, first: Tensor, second: Tensor, hidden: Tensor) -> Tensor:
        """first, second: (B, L, D) of the attentions; hidden: (B, L, D) before them."""
        seen = self.dense0(first), self.dense1(second)
        joined = sum(seen) / 2 if self.merge_layer is None else self.merge_layer(torch.cat(seen, 2))
        return self.LayerNorm(self.dropout(joined) + hidden)


class TwinAttention(nn.Module):
    """Cross attention to two images, in the place of a BERT layer's to one; names of the
    original's.
    """

    def __init__(self, config: BertConfig, layer: int, merges: bool) -> None:
        super().__init__()
        both = [BertAttention(config, layer_idx=layer, is_cross_attention=True) for _ in range(2)]
        self.self0, self.self1 = (attention.self for attention in both)
        self.output = JoinedOutput((both[0].output, both[1].output), merges)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        image_tokens: Tensor,
        image_bias: Tensor | None,
        **named: Any,
    ) -> tuple[Tensor, None]:
        """Hidden (B, L, D), image_tokens (B, 2N, D) and image_bias (B, 1, 1, 2N), of the first
        image before the second -> (B, L, D).
        """
        images = image_tokens.chunk(2, dim=1)
        biases = (None, None) if image_bias is None else image_bias.chunk(2, dim=-1)
        first, _ = self.self0(hidden, images[0], biases[0])
        second, _ = self.self1(hidden, images[1], biases[1])
        return self.output(first, second, hidden), None


class TwinEncoders(BLIPEncoders):
    """The towers of BLIP, the text's with a second cross attention in each layer."""

    def __init__(self, config: BLIPNLVR2Config) -> None:
        super().__init__(config, projects=False)
        for i, layer in enumerate(self.text.layers):
            bert = layer.crossattention.self.config
            layer.crossattention = TwinAttention(bert, i, i >= config.merge_from)
            layer.crossattention.apply(self.text.init)


class BLIPNLVR2(BLIPReadingTask):
    """Image tower, encoder of two images, classifier."""

    family = "blip_nlvr2"
    task = "nlvr2"
    config_class = BLIPNLVR2Config
    config: BLIPNLVR2Config
    pretraining = BLIP

    def __init__(self, config: BLIPNLVR2Config) -> None:
        super().__init__(config, TwinEncoders(config))
        width = config.text_width
        self.classifier = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))

    @classmethod
    def from_pretraining(
        cls, weights: dict[str, Tensor], config: BLIPNLVR2Config
    ) -> dict[str, Tensor]:
        """Weights of BLIP -> of this model: both cross attentions begin as the one of BLIP; the
        layers that merge them and the classifier are new.
        """
        begun = {}
        for name, weight in under(("encoders.visual.", "encoders.text."), weights).items():
            part = next((part for part in DOUBLED if part in name), None)
            names = (name.replace(part, f"{part[:-1]}{i}.") for i in (0, 1)) if part else (name,)
            begun |= dict.fromkeys(names, weight)
        return begun

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Each image with the next one, statements that are all true."""
        pairs = torch.stack([images, images.roll(-1, 0)], 1)
        labels = torch.ones(len(images), dtype=torch.long, device=images.device)
        return super().random_inputs(images) | {"images": pairs, "labels": labels}

    def logits(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Images (B, 2, 3, H, W), input_ids, attention_mask (B, L) -> (B, 2), 0 = false."""
        guides = self.task_guides(input_ids, attention_mask)
        guides = None if guides is None else guides.repeat_interleave(2, 0)
        tokens, mask = self.see(images.flatten(0, 1), guides)
        pairs = tokens.unflatten(0, (-1, 2)).flatten(1, 2)
        mask = None if mask is None else mask.unflatten(0, (-1, 2)).flatten(1, 2)
        return self.classifier(self.fuse(input_ids, attention_mask, pairs, mask)[:, 0])

    def forward(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Tensor
    ) -> TaskOutput:
        """Compute the loss of a batch of statements.

        Args:
            images: (B, 2, 3, H, W).
            input_ids, attention_mask: (B, L) of the statements, 1 = real.
            labels: (B,) int64, 0 = false, 1 = true.
        """
        logits = self.logits(images, input_ids, attention_mask)
        loss = F.cross_entropy(at_least_fp32(logits), labels)
        return TaskOutput(loss, logits)
