"""CLIP with a text-guided, token-reduced image tower, for pre-training.

    text      f_text = normalise(W_t text[EOS])
    guidance  t = f_text @ W_i, detached: the text feature in the width of the image tower
    image     f_image = normalise(W_i image[CLS]), ViT reduced by ELIP under t
    loss      contrastive loss of the pairs (ITC), or SigLIP's sigmoid loss

Source: CLIP (Radford et al., 2021); SigLIP (Zhai et al., 2023); ELIP, section 3, and its official
CLIP code.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextConfig

from elip_models.engine.encode import run_tower
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.config import ReductionConfig, TokenId
from elip_models.pretraining.models.layers.clip_text import CLIPTextTower
from elip_models.pretraining.models.layers.losses import contrastive_loss, sigmoid_loss
from elip_models.strategies.strategy import Strategy
from elip_models.validation import (
    Bounds,
    Depth,
    NonNegative,
    Positive,
    PositiveInt,
    Rate,
    Size,
    check,
    divisor_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPERATURES = {"itc": 0.07, "sigmoid": 0.1}
INITIAL_BIAS = -10.0
"""Initial bias of SigLIP (Zhai et al., 2023), since most pairs of a batch are negatives."""


@dataclass(frozen=True, kw_only=True)
class CLIPConfig(ReductionConfig):
    """Hyper-parameters of a CLIP model.

    For the other fields, see `VisionConfig` and `ReductionConfig`.

    Attributes:
        activation: of all MLPs; OpenAI's models use 'quick_gelu', x sigmoid(1.702 x).
        loss: 'itc', the softmax over all pairs, or 'sigmoid', SigLIP's loss with a learned bias.
        temperature: initial temperature of the similarities; None is 0.07, and 0.1 for 'sigmoid'.
        gather: where negatives come from, see `contrastive_loss`.
    """

    vision_norm_eps: NonNegative = 1e-5
    text_width: Size = 512
    text_depth: Depth = 12
    text_heads: Annotated[PositiveInt, divisor_of("text_width")] = 8
    text_mlp_ratio: Positive = 4.0
    text_norm_eps: NonNegative = 1e-5
    vocab_size: Size = 49408
    context_length: Size = 77
    eos_token_id: TokenId = 49407
    pad_token_id: TokenId = 0
    embed_dim: Size = 512
    activation: Literal["gelu", "quick_gelu"] = "gelu"
    drop_path: Rate = 0.0
    loss: Literal["itc", "sigmoid"] = "itc"
    temperature: Annotated[float, Bounds(1e-4, 1e4)] | None = None
    gather: Literal["local", "global"] = "local"

    def vit(self, **options: Any) -> VisionTransformer:
        visual = super().vit(
            act_layer=self.activation, drop_path_rate=self.drop_path, pre_norm=True, **options
        )
        _init_visual(visual)
        return visual

    @property
    def end_token_id(self) -> int:
        """Id of the last token of a text."""
        return self.eos_token_id

    @property
    def text(self) -> CLIPTextConfig:
        """Config of the text tower."""
        return CLIPTextConfig(
            hidden_size=self.text_width,
            intermediate_size=int(self.text_width * self.text_mlp_ratio),
            num_hidden_layers=self.text_depth,
            num_attention_heads=self.text_heads,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.context_length,
            hidden_act=self.activation,
            layer_norm_eps=float(self.text_norm_eps),
            eos_token_id=self.eos_token_id,
            pad_token_id=self.pad_token_id,
            bos_token_id=None,
            attn_implementation="sdpa",
        )


@dataclass
class CLIPOutput:
    """Output of a step: the scalar loss, and normalised features (B, E) of images and texts."""

    loss: Tensor
    image_features: Tensor
    text_features: Tensor


class CLIP(PretrainedModel):
    """Image tower of timm, text tower of transformers, a projection for each, and a temperature."""

    family = "clip"
    config_class = CLIPConfig
    batch_slices = 1

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = config.vit()
        self.read_tower()
        self.text = CLIPTextTower(config.text)
        self.image_projection = nn.Linear(config.vision_width, config.embed_dim, bias=False)
        self.text_projection = nn.Linear(config.text_width, config.embed_dim, bias=False)
        for projection in (self.image_projection, self.text_projection):
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5)
        temperature = config.temperature or TEMPERATURES[config.loss]
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        if config.loss == "sigmoid":
            self.logit_bias = nn.Parameter(torch.tensor(INITIAL_BIAS))

    def guidance(self, text_features: Tensor) -> Tensor:
        """Map text features (B, E) to the width of the image tower -> (B, D), detached."""
        return (text_features @ self.image_projection.weight.to(text_features.dtype)).detach()

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return normalised features (B, E) of texts (B, L)."""
        return F.normalize(self.text_projection(self.text(input_ids, attention_mask)), dim=-1)

    def encode_image(self, images: Tensor, text_features: Tensor | None = None) -> Tensor:
        """Return normalised features (B, E) of images (B, 3, H, W).

        text_features (B, E), normalised, guide the reduction; without them, `config.without_text`
        applies. Without gradient, in eval mode, the last block computes the CLS token alone.
        """
        text_cls = None if text_features is None else self.guidance(text_features)
        return self._encode_image(images, text_cls, self.reduction)

    def _encode_image(self, images: Tensor, text_cls: Tensor | None, strategy: Strategy) -> Tensor:
        tokens, _ = run_tower(self.tower, images, text_cls, strategy, cls_only=True)
        return self.project_image(tokens)

    def project_image(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.image_projection(tokens[:, 0]), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        return self.encode_image(images)

    def text_features(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.encode_text(input_ids, attention_mask)

    def text_cls(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.guidance(self.encode_text(input_ids, attention_mask))

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
    ) -> CLIPOutput:
        """Return the contrastive loss of a batch; row i of images and texts is one pair."""
        features = self.encode_pairs(images, input_ids, attention_mask)
        return CLIPOutput(self._loss(*features), *features)

    def encode_pairs(
        self, images: Tensor, input_ids: Tensor, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the features (B, E) of images, guided by their texts, and of the texts."""
        slices = self.batch_slices
        text_features = encode_in_slices(self.encode_text, slices, input_ids, attention_mask)
        encode = partial(self._encode_image, strategy=self.reduction)
        image_features = encode_in_slices(encode, slices, images, self.guidance(text_features))
        return image_features, text_features

    def set_batch_slices(self, count: int) -> None:
        """Encode a batch in `count` slices, see `encode_in_slices`."""
        check("count", count, PositiveInt)
        self.batch_slices = count

    def _loss(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        features, scale = (image_features, text_features), self.logit_scale.exp()
        gather = self.config.gather
        if self.config.loss == "sigmoid":
            return sigmoid_loss(*features, scale, self.logit_bias, gather=gather)
        return contrastive_loss(*features, scale, gather=gather)

    @torch.no_grad()
    def clamp_temperature_(self) -> None:
        """Keep the temperature at 0.01 or above, as CLIP does; SigLIP has no limit."""
        if self.config.loss == "itc":
            self.logit_scale.clamp_(0, math.log(100))

    def monitored(self) -> dict[str, Tensor]:
        """Return the temperature, and the bias of the sigmoid loss."""
        temperature = {"temperature": (-self.logit_scale).exp()}
        return temperature | ({"bias": self.logit_bias} if self.config.loss == "sigmoid" else {})

    @classmethod
    def fit_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase", context_length: int
    ) -> dict[str, int]:
        """Return the config fields that follow from a tokenizer: sizes, EOS and padding ids."""
        return {
            "vocab_size": len(tokenizer),
            "context_length": context_length,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)


def encode_in_slices(encode: Callable[..., Tensor], count: int, *inputs: Tensor | None) -> Tensor:
    """Encode a batch in `count` slices, at most one per row; without gradient, encode it whole.

    `encode` maps inputs with the rows of a slice, (b, ..) each or None, to (b, E). Backward encodes
    the slices again, one at a time: the gradients equal those of the whole batch, with the memory
    of one slice. A contrastive loss needs the features of all pairs, but not their activations.
    Source: gradient caching (Gao et al., 2021), here by activation checkpointing.
    """
    if count == 1 or not torch.is_grad_enabled():
        return encode(*inputs)
    parts = [repeat(None) if part is None else part.chunk(count) for part in inputs]
    slices = zip(*parts, strict=False)  # repeat(None) is infinite
    return torch.cat([checkpoint(encode, *rows, use_reentrant=False) for rows in slices])


@torch.no_grad()
def _init_visual(visual: VisionTransformer) -> None:
    """Draw initial weights by width and depth, as CLIP does for its text tower."""
    width, depth = visual.embed_dim, len(visual.blocks)
    for table in (visual.cls_token, visual.pos_embed):
        nn.init.normal_(table, std=width**-0.5)
    for block in visual.blocks:
        nn.init.normal_(block.attn.qkv.weight, std=width**-0.5)
        nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
        for output in (block.attn.proj, block.mlp.fc2):
            nn.init.normal_(output.weight, std=(2 * width * depth) ** -0.5)
