"""A model's config as data: how its image tower and its texts are reduced."""

from collections.abc import Collection
from dataclasses import dataclass, fields
from functools import partial
from typing import Annotated, Any, Literal, Self

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from elip_models.models.layers.text_reduction import TextReduction, TextStrategy
from elip_models.reduction.schedule import Schedule, check_merge
from elip_models.reduction.scorers import ScorerName
from elip_models.reduction.serialization import settings_of
from elip_models.reduction.strategies.dense import Dense
from elip_models.reduction.strategies.elip import ELIP, ELIPOptions
from elip_models.reduction.strategy import Merge, Strategy
from elip_models.reduction.strategy_spec import get_strategy, kinds_of, parse_spec
from elip_models.validation import (
    Count,
    Depth,
    NonNegative,
    Positive,
    PositiveInt,
    Rate,
    Share,
    Size,
    below,
    check_fields,
    did_you_mean,
    divisor_of,
)

TokenId = Annotated[Count, below("vocab_size")]
OF_ELIP = ELIPOptions.__annotations__.keys() - {"without_text"}  # that all guided ones are given


class Config:
    """Base of the frozen dataclasses that hold a model's hyper-parameters, each as annotated."""

    def __post_init__(self) -> None:
        check_fields(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises ValueError for a name that is none of the fields."""
        known = [field.name for field in fields(cls)]
        unknown = sorted(values.keys() - set(known))
        if unknown:
            close = did_you_mean(unknown[0], known)
            raise ValueError(f"config: expected names among {known}, got {unknown}{close}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class InputConfig(Config):
    """How an image and a caption become what the model reads, in training and evaluation.

    resize: 'crop' shows the centre of an image, 'squash' all of it whatever the ratio of its sides.
    captions: 'plain', or by the rules of 'albef' or 'blip', see `data/caption_rules.py`.
    """

    resize: Literal["crop", "squash"] = "crop"
    captions: Literal["plain", "albef", "blip"] = "plain"

    @property
    def reads_guide_captions(self) -> bool:
        """A step of training takes a second caption of each image, which guides it."""
        return False


@dataclass(frozen=True, kw_only=True)
class VisionConfig(InputConfig):
    """Sizes of the image tower, a timm VisionTransformer without a head."""

    image_size: Size = 224
    patch_size: Annotated[Size, divisor_of("image_size")] = 16
    vision_width: Size = 768
    vision_depth: Depth = 12
    vision_heads: Annotated[PositiveInt, divisor_of("vision_width")] = 12
    vision_mlp_ratio: Positive = 4.0
    vision_norm_eps: NonNegative = 1e-6

    def vit(self, **options: Any) -> VisionTransformer:
        """The image tower; `options` are timm's."""
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
    """How the image tower of a model is reduced: by default by ELIP, as the paper does.

    strategy: 'elip', or a line that `get_strategy` reads, such as 'tome' or 'evit:keep_ratio=0.7'.
    strategy_options: its settings by name, {'r': 13}, beside those in the line. The options of
        'elip' are the fields below; the others take of them `schedule` and `without_text`, where
        they have such a setting that is not given here.
    schedule: '2(100%) 2(90%) 6(65%) 2(40%)', or a preset; None for a dense image tower, and for the
        others their own.
    count_cls: keep ratios count CLS among the patches, as the official CLIP code.
    scorer, fusion, guidance_norm, without_text, merge, proportional: see `ELIPOptions`.
    guide_dropout: share of the images that training reduces without text, each by itself alone.

    Raises:
        TypeError, ValueError: naming the field, what was expected, what came.
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
    guide_dropout: Share = 0.0

    def __post_init__(self) -> None:
        check_merge(self.merge)
        super().__post_init__()
        if self.schedule is not None:
            self.elip(self.schedule).schedule.for_depth(self.vision_depth)
        reduction = self.reduction  # raises what is wrong with it
        if not reduction.is_guided and not isinstance(reduction, Dense):
            self._check_unguided(reduction)

    def _check_unguided(self, reduction: Strategy) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("guide") and value != field.default:
                raise ValueError(
                    f"{field.name}: expected {field.default!r} where no text guides the reduction, "
                    f"which is {reduction}, got {value!r}"
                )

    @property
    def reduction(self) -> Strategy:
        """How the image tower is reduced."""
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
        ours = {"schedule": schedule, "without_text": self.without_text}
        left = kinds_of(name).keys() - written.keys() - options.keys()
        self._check_own(name, left)
        taken = {name: value for name, value in ours.items() if name in left}
        return get_strategy(self.strategy, **taken, **options)

    def _check_own(self, strategy: str, left: Collection[str]) -> None:
        """Raises for an option of ELIP that another strategy has too, and would not get."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in OF_ELIP & left and value != field.default:
                raise ValueError(
                    f"{field.name}: expected strategy='elip', whose option it is, got {value!r} "
                    f"with strategy={strategy!r}; set strategy='{strategy}:{field.name}={value}'"
                )

    def elip(self, schedule: Schedule | str) -> ELIP:
        """ELIP by that schedule, with the options that stand here."""
        return ELIP(schedule, **{name: getattr(self, name) for name in ELIPOptions.__annotations__})


def reduction_fields(strategy: Strategy) -> dict[str, Any]:
    """The fields of `ReductionConfig` that say a strategy's settings, but for those that are fields
    of their own: `count_cls`, `without_text` and the options of ELIP.
    """
    schedule = getattr(strategy, "schedule", None)
    found = {} if schedule is None else {"schedule": schedule.exact}
    if type(strategy) is not ELIP:
        settings = settings_of(strategy)["settings"]
        own = {key: v for key, v in settings.items() if key not in ("schedule", "without_text")}
        found |= {"strategy": strategy.name, "strategy_options": own}
    return found


@dataclass(frozen=True, kw_only=True)
class ContrastiveConfig(ReductionConfig):
    """Which caption guides the image that ITC contrasts with its own, in training.

    guide: 'own' is the paper's, the caption that the image is contrasted with: *which* tokens
        stay tells the loss which caption that was. 'other' is another caption of the same image,
        `guide_ids` of the forward.
    guide_negatives: share of the images that a caption of another image guides, the more alike the
        more often.
    guide_dropout: as the other fields, see `ReductionConfig`.
    """

    guide: Literal["own", "other"] = "own"
    guide_negatives: Share = 0.0

    @property
    def reads_guide_captions(self) -> bool:
        return self.guide == "other"


@dataclass(frozen=True, kw_only=True)
class TextReductionConfig(Config):
    """How text tokens are dropped half way through the layers of a text tower.

    text_reduction: 'random', 'post' or 'learned', see `TextReduction`; or None.
    text_drop: share of a text's tokens that it drops.
    """

    text_reduction: TextStrategy | None = None
    text_drop: Rate = 0.4

    @property
    def text_token_reduction(self) -> TextReduction | None:
        """How texts are reduced; None where they are not, and where nothing would be dropped."""
        if self.text_reduction is None or self.text_drop == 0:
            return None
        return TextReduction(self.text_reduction, self.text_drop)

    @property
    def image_guides_text(self) -> bool:
        """Which text tokens are dropped is learned from the image."""
        return self.text_reduction == "learned" and self.text_drop > 0
