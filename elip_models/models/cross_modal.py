"""What ALBEF, BLIP and METER share: the image tower, how its reduction is guided, the tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from elip_models.models.base import PretrainedModel
from elip_models.models.config import ReductionConfig, TokenId
from elip_models.reduction.encode import run_tower
from elip_models.reduction.strategy import StageInfo
from elip_models.towers.reducible_model import random_ids
from elip_models.towers.base import scoring_context
from elip_models.validation import Positive, Size, same_as

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FUSED = "whose CLS token the text's is fused with"


@dataclass(frozen=True, kw_only=True)
class CrossModalConfig(ReductionConfig):
    """An image tower, how it is reduced, and the texts beside it.

    text_width: of the text encoder, whose CLS output guides; as wide as the image tower.
    context_length: tokens of a text; max_positions: those that the text encoder has places for.
    pad_token_id, cls_token_id, sep_token_id: what fills, begins and ends a text.
    initializer_range: standard deviation of fresh weights. That of ViT and BERT suits a width of
        768; in a narrow tower tokens hardly see one another then, and width^-0.5 trains.
    gather: 'local' contrasts within a rank and means over its own tokens; 'global' over all ranks,
        so that the mean over ranks, and its gradient, equal one process with the whole batch.
    The other fields: see `VisionConfig` and `ReductionConfig`.

    Raises:
        TypeError, ValueError: naming the field, what was expected, what came.
    """

    text_width: Annotated[Size, same_as("vision_width", FUSED)] = 768
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
                f"context_length: expected at most {self.max_tokens}, the tokens that "
                f"max_positions = {self.max_positions} has room for, got {self.context_length}"
            )

    @property
    def max_tokens(self) -> int:
        """How long a text may be, padding included."""
        return self.max_positions

    def vit(self, **options: Any) -> VisionTransformer:
        """The image tower, its linear layers drawn by `initializer_range`; `options` are timm's."""
        visual = super().vit(**options)
        for module in visual.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=self.initializer_range)
        return visual


class CrossModalModel(PretrainedModel):
    """Text first: its CLS output guides the image tower, `tower`, reduced as `reduction` says; as
    `dense` says it keeps all tokens.
    """

    masks_text: ClassVar[bool] = True

    def __init__(self, config: CrossModalConfig) -> None:
        super().__init__()
        self.config = config

    def random_inputs(self, images: Tensor) -> dict[str, Any]:
        """Also what a step draws, fixed as `fixed_draw` says."""
        text = self.random_text(images)
        ids, mask = text.values()
        inputs = {"images": images, **text, "drawn": self.fixed_draw(images, ids)}
        guides = {"guide_ids": ids.roll(1, 0), "guide_mask": mask}
        return inputs | (guides if self.config.reads_guide_captions else {})

    def random_text(self, images: Tensor) -> dict[str, Tensor]:
        """input_ids and attention_mask, (B, L) each, of a text of full length for each image."""
        config = self.config
        ids = random_ids(images, config.context_length, config.vocab_size, config.sep_token_id)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def fixed_draw(self, images: Tensor, input_ids: Tensor) -> tuple[Tensor, ...]:
        """What a step of pre-training draws at random, fixed instead: the same for the same inputs.

        Two forms of the model that are given the same draw do the same work, so that they can be
        compared, timed and counted. The negatives of a pair are the next one's, every seventh token
        is masked, and every second text keeps its image.

        Args:
            images: (B, 3, H, W), on any device.
            input_ids: (B, L).

        Returns:
            The `drawn` of the model's forward.
        """
        raise NotImplementedError

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, L) -> hidden states (B, L, D) of the text alone."""
        raise NotImplementedError

    def text_cls(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask (B, L) -> (B, D), what guides the image tower."""
        return self.encode_text(input_ids, attention_mask)[:, 0]

    def encode_image(
        self,
        images: Tensor,
        text_cls: Tensor | None = None,
        rows: Mapping[int, Tensor] | None = None,
    ) -> tuple[Tensor, list[StageInfo]]:
        """Images (B, 3, H, W), guided by text_cls (B, D) or by `rows` that were read elsewhere ->
        tokens (B, N, D) that are left, K+2 of the last stage by ELIP, and infos of the steps;
        `mask_after(infos)` says which are real.
        """
        return run_tower(self.tower, images, text_cls, self.reduction, rows=rows)

    def dense_cls(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> (B, D), the CLS output of all patches, without gradient."""
        with scoring_context(self.visual, images):
            tokens, _ = run_tower(self.tower, images, None, self.dense, cls_only=True)
        return tokens[:, 0]

    @classmethod
    def fit_tokenizer(
        cls, tokenizer: "PreTrainedTokenizerBase", context_length: int
    ) -> dict[str, int]:
        """Sizes of vocabulary and text, and the ids of the special tokens in the config."""
        ids = tokenizer("a").input_ids
        if tokenizer.cls_token_id is None or ids[0] != tokenizer.cls_token_id:
            raise ValueError(
                f"tokenizer: expected one that begins a text with its cls token, as BERT's, for "
                f"{cls.__name__} reads a text off there, got {tokenizer.cls_token!r} and a text "
                f"of the ids {ids}"
            )
        special = {"pad": tokenizer.pad_token_id, "cls": ids[0], "sep": ids[-1]}
        if cls.masks_text:
            special["mask"] = tokenizer.mask_token_id
        missing = [name for name, token in special.items() if token is None]
        if missing:
            raise ValueError(f"tokenizer: expected one with a {missing[0]} token, got none")
        sizes = {"vocab_size": len(tokenizer), "context_length": context_length}
        return sizes | {f"{name}_token_id": token for name, token in special.items()}
