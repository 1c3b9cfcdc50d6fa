"""What the configs of the cross-modal models share: the image tower, and momentum distillation."""

from dataclasses import dataclass
from typing import Any, Literal

from timm.models.vision_transformer import VisionTransformer
from transformers import BertConfig

from elip_models.reduction.stage import Elip


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of a timm VisionTransformer, and how it is reduced.

    text_width: of the text encoder, whose CLS output guides; as wide as the image tower.
    schedule: '2(100%) 2(90%) 6(65%) 2(40%)', or None for a dense image tower.
    scorer, fusion, guidance_norm, without_text, merge: see `elip_models.encode_image`.

    Raises:
        ValueError: naming the field, what was expected, what came.
    """

    image_size: int = 224
    patch_size: int = 16
    vision_width: int = 768
    vision_depth: int = 12
    vision_heads: int = 12
    vision_mlp_ratio: float = 4.0
    text_width: int = 768
    schedule: str | None = None
    scorer: str | int = "exact"
    fusion: float = 0.8
    guidance_norm: Literal["none", "match"] = "none"
    without_text: Literal["dense", "vision"] = "dense"
    merge: bool = True

    def __post_init__(self) -> None:
        if self.text_width != self.vision_width:
            raise ValueError(
                f"text_width: expected vision_width = {self.vision_width}, whose CLS token the "
                f"text's is fused with, got {self.text_width}"
            )
        for name, whole in (("vision_heads", "vision_width"), ("patch_size", "image_size")):
            part = getattr(self, name)
            if part < 1 or getattr(self, whole) % part:
                raise ValueError(
                    f"{name}: expected a divisor of {whole} = {getattr(self, whole)}, got {part}"
                )
        self.reduction.schedule.check_depth(self.vision_depth)

    @property
    def reduction(self) -> Elip:
        """How the image tower is reduced."""
        names = ("scorer", "fusion", "guidance_norm", "without_text", "merge")
        settings = {name: getattr(self, name) for name in names}
        return Elip(self.schedule or f"{self.vision_depth}(100%)", **settings)

    def vit(self, **options: Any) -> VisionTransformer:
        """The image tower, without a head; `options` are timm's."""
        return VisionTransformer(
            img_size=self.image_size,
            patch_size=self.patch_size,
            embed_dim=self.vision_width,
            depth=self.vision_depth,
            num_heads=self.vision_heads,
            mlp_ratio=self.vision_mlp_ratio,
            num_classes=0,
            **options,
        )

    def check_shares(self, *names: str) -> None:
        """Raises where a field is no share in [0, 1]."""
        for name in names:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a float in [0, 1], got {getattr(self, name)!r}")


@dataclass(frozen=True)
class DistilledConfig(VisionConfig):
    """BERT beside the image tower, momentum encoders and a queue of their features.

    embed_dim: of the features. temperature: of their similarities, at the start.
    queue_size: features in the queue. momentum: of the momentum encoders.
    alpha: weight of the momentum targets.
    momentum_reduction: 'none' shows the momentum image tower all patches, as the papers do;
        'shared' the tokens that the online one kept and merged, by the same weights: no scoring.
    """

    text_depth: int = 12
    text_heads: int = 12
    text_hidden: int = 3072
    text_dropout: float = 0.1
    vocab_size: int = 30522
    max_positions: int = 512
    pad_token_id: int = 0
    embed_dim: int = 256
    temperature: float = 0.07
    queue_size: int = 65536
    momentum: float = 0.995
    alpha: float = 0.4
    momentum_reduction: Literal["none", "shared"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_shares("momentum", "alpha", "text_dropout")
        if self.momentum_reduction not in ("none", "shared"):
            raise ValueError(
                f"momentum_reduction: expected 'none' or 'shared', got {self.momentum_reduction!r}"
            )

    @property
    def bert(self) -> BertConfig:
        """Of the text encoder."""
        return BertConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.text_width,
            num_hidden_layers=self.text_depth,
            num_attention_heads=self.text_heads,
            intermediate_size=self.text_hidden,
            hidden_dropout_prob=self.text_dropout,
            attention_probs_dropout_prob=self.text_dropout,
            max_position_embeddings=self.max_positions,
            pad_token_id=self.pad_token_id,
        )
