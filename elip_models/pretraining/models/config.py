"""Configuration of models: inputs, image tower, and token reduction of images and texts."""

from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Any, Literal

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from elip_models.pretraining.models.layers.text_reduction import TextReduction, TextStrategy
from elip_models.strategies.dense import Dense
from elip_models.strategies.elip import ELIP
from elip_models.strategies.elip_options import ELIPOptions
from elip_models.strategies.schedule import Schedule
from elip_models.strategies.scorers import ScorerName
from elip_models.strategies.serialization import settings_of
from elip_models.strategies.spec import get_strategy, option_types, parse_spec
from elip_models.strategies.strategy import Strategy
from elip_models.towers.merge import Merge, check_merge
from elip_models.validation import (
    Config,
    Count,
    Depth,
    NonNegative,
    Positive,
    PositiveInt,
    Rate,
    Share,
    Size,
    below,
    divisor_of,
)

TokenId = Annotated[Count, below("vocab_size")]
OF_ELIP = ELIPOptions.__annotations__.keys() - {"without_text"}  # which all guided strategies have


@dataclass(frozen=True, kw_only=True)
class VisionConfig(Config):
    """Sizes of the image tower, a timm VisionTransformer without a head, and the preprocessing.

    Attributes:
        resize: 'crop' uses the centre of an image; 'squash' all of it, with another aspect ratio.
        captions: 'plain', or another rule of `pretraining/data/caption_rules.py`.
        max_words: Number of words of a text that all rules except 'plain' keep.
    """

    resize: Literal["crop", "squash"] = "crop"
    captions: Literal["plain", "albef", "blip", "blip_question"] = "plain"
    max_words: PositiveInt = 30
    image_size: Size = 224
    patch_size: Annotated[Size, divisor_of("image_size")] = 16
    vision_width: Size = 768
    vision_depth: Depth = 12
    vision_heads: Annotated[PositiveInt, divisor_of("vision_width")] = 12
    vision_mlp_ratio: Positive = 4.0
    vision_norm_eps: NonNegative = 1e-6

    def vit(self, **options: Any) -> VisionTransformer:
        """Return the image tower; `options` are passed to timm."""
        return VisionTransformer(
            img_size=self.image_size,
            patch_size=self.patch_size,
            embed_dim=self.vision_width,
            depth=self.vision_depth,
            num_heads=self.vision_heads,
            mlp_ratio=self.vision_mlp_ratio,
            norm_layer=partial(nn.LayerNorm, eps=self.vision_norm_eps),
            num_classes=0,
            **options,
        )


@dataclass(frozen=True, kw_only=True)
class ReductionConfig(VisionConfig):
    """Token reduction of a model's image tower, by default ELIP as in the paper.

    `scorer`, `fusion`, `guidance_norm`, `without_text`, `merge` and `proportional` are documented
    in `ELIPOptions`.

    Attributes:
        strategy: 'elip', or a text for `get_strategy`, such as 'tome' or 'evit:keep_ratio=0.7'.
        strategy_options: further options of a strategy other than 'elip', such as {'r': 13}. Such a
            strategy also gets `schedule` and `without_text`, if it has them and they are not here.
        schedule: '2(100%) 2(90%) 6(65%) 2(40%)', or a preset. None: 'elip' does not reduce, and
            other strategies without a rate of their own keep 0.7 of the tokens, as in `reduce_`.
        count_cls: whether keep ratios count CLS among the patches, as in the official CLIP code.

    Raises:
        TypeError, ValueError: a field is invalid; the message has its name and value.
    """

    strategy: str = "elip"
    strategy_options: dict[str, Any] | None = None
    schedule: str | None = None
    count_cls: bool = False
    scorer: ScorerName = "exact"
    fusion: Share = ELIP.fusion
    guidance_norm: Literal["none", "match"] = ELIP.guidance_norm
    without_text: Literal["dense", "vision"] = "dense"
    merge: Merge = ELIP.merge
    proportional: bool = ELIP.proportional

    def __post_init__(self) -> None:
        check_merge(self.merge)
        super().__post_init__()
        if self.schedule is not None:
            self.elip(self.schedule).schedule.for_depth(self.vision_depth)
        self.reduction  # noqa: B018, raises an error for invalid options

    @property
    def reduction(self) -> Strategy:
        """The strategy of the image tower."""
        name, written = parse_spec(self.strategy)
        options = self.strategy_options or {}
        schedule = self.schedule and Schedule.parse(self.schedule, count_cls=self.count_cls)
        if name == ELIP.name:
            if written or options:
                raise ValueError(
                    "strategy_options: expected None with strategy='elip', whose options are "
                    f"fields of their own, got {options or written!r}"
                )
            return self.elip(schedule) if schedule else Dense()
        open_options = option_types(name).keys() - written.keys() - options.keys()
        for field in fields(self):  # options of ELIP that the strategy has too, and would not get
            value = getattr(self, field.name)
            if field.name in OF_ELIP & open_options and value != field.default:
                raise ValueError(
                    f"{field.name}: expected strategy='elip', whose option it is, got {value!r} "
                    f"with strategy={name!r}; set strategy='{name}:{field.name}={value}'"
                )
        own = {"schedule": schedule, "without_text": self.without_text}
        own = {option: own[option] for option in own.keys() & open_options}
        return get_strategy(self.strategy, **own, **options)

    def elip(self, schedule: Schedule | str) -> ELIP:
        """Return ELIP with that schedule and the options of this config."""
        return ELIP(schedule, **{name: getattr(self, name) for name in ELIPOptions.__annotations__})


def reduction_fields(strategy: Strategy) -> dict[str, Any]:
    """Return the fields of `ReductionConfig` that describe a strategy."""
    values: dict[str, Any] = {"strategy": ELIP.name, "strategy_options": None, "schedule": None}
    schedule = getattr(strategy, "schedule", None)
    if schedule is not None:
        values |= {"schedule": schedule.exact, "count_cls": schedule.count_cls}
    if type(strategy) is ELIP:
        return values | {name: getattr(strategy, name) for name in ELIPOptions.__annotations__}
    if isinstance(strategy, Dense):
        return values
    stored = settings_of(strategy)
    own = {k: v for k, v in stored["settings"].items() if k not in ("schedule", "without_text")}
    return values | {"strategy": stored["strategy"], "strategy_options": own}


@dataclass(frozen=True, kw_only=True)
class TextReductionConfig(Config):
    """Pruning of text tokens after half of the layers of a text tower.

    Attributes:
        text_reduction: 'random', 'post' or 'learned', see `TextReduction`; or None.
        text_drop: share of a text's tokens that are dropped.
    """

    text_reduction: TextStrategy | None = None
    text_drop: Rate = 0.4

    @property
    def text_token_reduction(self) -> TextReduction | None:
        """The reduction of texts, or None if no token would be dropped."""
        if self.text_reduction is None or self.text_drop == 0:
            return None
        return TextReduction(self.text_reduction, self.text_drop)

    @property
    def image_guides_text(self) -> bool:
        """Whether the dropped text tokens depend on the image."""
        return self.text_reduction == "learned" and self.text_drop > 0
