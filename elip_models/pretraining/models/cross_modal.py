"""Shared part of ALBEF, BLIP and METER: image tower, guidance of its reduction, tokenizer.

Shapes, here and in the models: images (B, 3, H, W); input_ids and attention_mask (B, L), 1 = real
token; image tokens (B, N, D); hidden states of a text (B, L, D); features (B, E).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers import BertConfig

from elip_models.engine.encode import run_tower
from elip_models.pretraining.models.base import PretrainedModel
from elip_models.pretraining.models.config import ReductionConfig, TokenId
from elip_models.pretraining.models.layers.bert import BertTower
from elip_models.strategies.strategy import StageInfo
from elip_models.towers.base import scoring_context
from elip_models.validation import Depth, Positive, PositiveInt, Size, divisor_of, same_as

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FUSED = "since the CLS tokens of text and image are fused"


@dataclass(frozen=True, kw_only=True)
class CrossModalConfig(ReductionConfig):
    """Image tower, its reduction, and the sizes of the texts.

    For the other fields, and for errors, see `VisionConfig` and `ReductionConfig`.

    Attributes:
        text_width: width of the text encoder, whose CLS output guides; equal to `vision_width`.
        text_hidden: width of the MLPs of the text encoder.
        context_length: number of tokens of a text.
        max_positions: rows of the position embeddings of the text encoder.
        pad_token_id: fills texts; `cls_token_id` is their first token, `sep_token_id` their last.
        initializer_range: standard deviation of new weights. The default of ViT and BERT suits a
            width of 768. It is too small to train a narrow tower; use width^-0.5 there.
        gather: 'local' contrasts within a rank and averages over its tokens. 'global' does so over
            all ranks: the mean over ranks, and its gradient, equal one process with the whole
            batch.
    """

    text_width: Annotated[Size, same_as("vision_width", FUSED)] = 768
    text_depth: Depth = 12
    text_heads: Annotated[PositiveInt, divisor_of("text_width")] = 12
    text_hidden: Size = 3072
    context_length: Size = 30
    max_positions: Size = 512
    vocab_size: Size = 30522
    pad_token_id: TokenId = 0
    cls_token_id: TokenId = 101
    sep_token_id: TokenId = 102
    initializer_range: Positive = 0.02
    gather: Literal["local", "global"] = "local"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context_length > self.max_tokens:
            raise ValueError(
                f"context_length: expected at most {self.max_tokens}, the limit for "
                f"max_positions = {self.max_positions}, got {self.context_length}"
            )
        if self.reduction.drops_patches:
            raise ValueError(
                "strategy: expected one that leaves patches for the text encoder, got "
                f"{self.reduction}; leave out class_token_only"
            )

    @property
    def max_tokens(self) -> int:
        """Maximum number of tokens of a text, padding included."""
        return self.max_positions

    @property
    def end_token_id(self) -> int:
        """Id of the last token of a text."""
        return self.sep_token_id

    def bert_config(self, part: str, *, dropout: float, **options: Any) -> BertConfig:
        """Return the config of a stack of BERT layers, whose sizes are the fields `part`_width etc.

        `options` are those of `BertConfig`.
        """
        return BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=getattr(self, f"{part}_width"),
            num_hidden_layers=getattr(self, f"{part}_depth"),
            num_attention_heads=getattr(self, f"{part}_heads"),
            intermediate_size=getattr(self, f"{part}_hidden"),
            hidden_dropout_prob=float(dropout),
            attention_probs_dropout_prob=float(dropout),
            max_position_embeddings=self.max_positions,
            initializer_range=float(self.initializer_range),
            pad_token_id=self.pad_token_id,
            **options,
        )

    def vit(self, **options: Any) -> VisionTransformer:
        """Create the image tower with weights of `initializer_range`; `options` are timm's."""
        visual = super().vit(**options)
        for module in visual.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.initializer_range)
        return visual


class CrossModalModel(PretrainedModel):
    """Model that encodes the text first and guides the image tower by its CLS output."""

    masks_text: ClassVar[bool] = True

    def __init__(self, config: CrossModalConfig) -> None:
        super().__init__()
        self.config = config

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode texts alone: input_ids and attention_mask (B, L) -> (B, L, D)."""
        raise NotImplementedError

    def text_cls(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the CLS outputs (B, D) of texts (B, L), which guide the image tower."""
        return self.encode_text(input_ids, attention_mask)[:, 0]

    def encode_image(
        self, images: Tensor, text_cls: Tensor | None = None
    ) -> tuple[Tensor, list[StageInfo]]:
        """Encode images by the reduced tower; `text_cls` (B, D) guides, None means no text.

        The result is the remaining tokens (B, N, D), which are K+2 of the last stage for ELIP, and
        one info for each reduction.
        """
        return run_tower(self.tower, images, text_cls, self.reduction)

    def dense_cls(self, images: Tensor) -> Tensor:
        """Return the CLS outputs (B, D) of images (B, 3, H, W), without reduction or gradient."""
        with scoring_context(self.visual, images):
            tokens, _ = run_tower(self.tower, images, None, self.dense, cls_only=True)
        return tokens[:, 0]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.visual.set_grad_checkpointing(enable)
        for name, module in self.named_modules():
            if isinstance(module, BertTower) and not name.startswith("encoders_m."):
                module.set_grad_checkpointing(enable)

    @classmethod
    def fit_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase", context_length: int
    ) -> dict[str, int]:
        """Return the config fields that follow from a tokenizer: sizes and special token ids."""
        ids = tokenizer("a").input_ids
        if tokenizer.cls_token_id is None or ids[0] != tokenizer.cls_token_id:
            raise ValueError(
                f"tokenizer: expected one that starts a text with its cls token, as BERT's, for "
                f"{cls.__name__}, got {tokenizer.cls_token!r} and a text with the ids {ids}"
            )
        special = {"pad": tokenizer.pad_token_id, "cls": ids[0], "sep": ids[-1]}
        if cls.masks_text:
            special["mask"] = tokenizer.mask_token_id
        missing = [name for name, token in special.items() if token is None]
        if missing:
            raise ValueError(f"tokenizer: expected one with a {missing[0]} token, got none")
        sizes = {"vocab_size": len(tokenizer), "context_length": context_length}
        return sizes | {f"{name}_token_id": token for name, token in special.items()}
