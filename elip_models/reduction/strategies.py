"""The strategies that ELIP is compared with, and all of them by name.

`elip` stands in stage.py, `evit` and `tome` in inside.py. Each is frozen data, an argument of
`encode_image` and `reduce_`: a name, or an instance such as `ToMe(r=13)`.
"""

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elip_models.reduction.adaptive import Adaptive
from elip_models.reduction.flops import nearest
from elip_models.reduction.inside import EViT, ToMe, check_flag, check_share, least_share
from elip_models.reduction.schedule import PRESETS, Schedule, Stage
from elip_models.reduction.stage import Elip, Staged
from elip_models.reduction.strategy import Context, Layer, StageInfo, Strategy, tower_of
from elip_models.towers import Size, Tower


@dataclass(frozen=True)
class Trips(Elip):
    """Text alone selects, by the first layer of each stage (TRIPS, Jiang et al., EMNLP 2022).

    The query is the text's vector through that layer's own norm and projection; merging and
    schedule are ELIP's, so that the scorer is all that differs.
    """

    name: ClassVar[str] = "trips"

    scorer: str | int = 1
    fusion: float = 0.0


class Drawn(Staged):
    """A schedule whose patches are drawn at random."""

    @torch.no_grad()
    def score(self, tower: Tower, stage: Stage, tokens: Tensor, text: Tensor | None) -> Tensor:
        """A row (B, N): 2 for `stage.keep` patches, 1 for the others, which so merge evenly."""
        B, N, _ = tokens.shape
        p = tower.num_prefix_tokens
        drawn = torch.rand(B, N - p, device=tokens.device).topk(stage.keep, dim=1).indices
        return torch.ones(B, N, device=tokens.device).scatter(1, drawn + p, 2.0)

    def step(
        self, tower: Tower, stage: Stage, tokens: Tensor, context: Context
    ) -> tuple[Tensor, StageInfo]:
        if context.replay is not None:  # its forward drew here: dropout that follows must agree
            self.score(tower, stage, tokens, None)
        return super().step(tower, stage, tokens, context)


@dataclass(frozen=True)
class Random(Drawn):
    """ELIP's schedule with patches kept at random and the others averaged: the control.

    schedule, merge: as of `Elip`.
    """

    name: ClassVar[str] = "random"

    schedule: Schedule
    merge: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", Schedule.parse(self.schedule))
        check_flag("merge", self.merge)


@dataclass(frozen=True)
class PatchDropout(Drawn):
    """Drop patches at random before block 0, in training alone (FLIP, Li et al., CVPR 2023).

    keep: share of the patches that stay, in (0, 1].
    until: the first step of training that sees all patches again, or None: all steps drop.
        `at(step)` is what to reduce by in that step.
    """

    name: ClassVar[str] = "patch_dropout"

    keep: float = 0.5
    until: int | None = None
    merge: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        if self.until is not None and (type(self.until) is not int or self.until < 0):
            raise ValueError(f"until: expected a step from 0 on, or None, got {self.until!r}")

    def at(self, step: int) -> "PatchDropout":
        """What step `step` of training is reduced by: nothing from step `until` on.

        `reduce_(model, strategy=dropout.at(step))` in every step changes the model only once.
        """
        over = self.until is not None and step >= self.until
        return replace(self, keep=1.0, until=None) if over else replace(self, until=None)

    def refuses(self, tower: Tower) -> str | None:
        return None

    def stages(self, size: Size) -> tuple[Stage, ...]:
        keep = max(1, int(self.keep * size.num_patches))
        return () if keep == size.num_patches else (Stage(0, size.depth, keep),)

    def token_counts(self, size: Size) -> tuple[Layer, ...]:
        tokens = size.num_prefix_tokens + max(1, int(self.keep * size.num_patches))
        return (Layer(tokens, tokens),) * size.depth

    def reduces(self, text_cls: Tensor | None, training: bool) -> bool:
        return training

    def at_strength(self, size: Size, strength: float) -> Strategy:
        return replace(self, keep=1 - strength * (1 - least_share(size)))


@dataclass(frozen=True)
class Resize(Strategy):
    """A smaller image through the dense tower, positions interpolated: the plainest saving.

    size: pixels of the image's height, a multiple of the patch; its width shrinks alike.
    """

    name: ClassVar[str] = "resize"
    changes_embedding: ClassVar[bool] = True

    size: int

    def __post_init__(self) -> None:
        if type(self.size) is not int or self.size < 1:
            raise ValueError(f"size: expected pixels from 1 on, got {self.size!r}")

    def pixels(self, size: Size) -> tuple[int, int]:
        """(h, w) of the images that the tower sees."""
        (height, width), patch = size.image, size.patch
        if self.size % patch or self.size > height:
            raise ValueError(
                f"size: expected a multiple of the patch, {patch}, up to {height}, the image's "
                f"height, got {self.size}"
            )
        return self.size, max(patch, round(self.size * width / height / patch) * patch)

    def refuses(self, tower: Tower) -> str | None:
        return tower.refuses_resizing()

    def stages(self, size: Size) -> tuple[Stage, ...]:
        self.pixels(size)
        return ()

    def token_counts(self, size: Size) -> tuple[Layer, ...]:
        height, width = self.pixels(size)
        tokens = size.num_prefix_tokens + (height // size.patch) * (width // size.patch)
        return (Layer(tokens, tokens),) * size.depth

    def embed_flops(self, size: Size) -> int:
        return size._replace(image=self.pixels(size)).embed_flops()

    def smaller(self, tower: Tower, images: Tensor) -> Tensor:
        """images (B, 3, H, W) -> (B, 3, h, w)."""
        at_least_fp32 = torch.promote_types(images.dtype, torch.float32)
        pixels, wide = self.pixels(tower.size), images.to(at_least_fp32)
        return F.interpolate(wide, pixels, mode="bicubic", antialias=True).to(images.dtype)

    def patchify(self, tower: Tower, images: Tensor) -> Tensor:
        """What the tower's entrance makes of the images, smaller."""
        return tower.patchify(self.smaller(tower, images))

    def embed(self, tower: Tower, images: Tensor) -> Tensor:
        return tower.enter(self.patchify(tower, images))

    def at_strength(self, size: Size, strength: float) -> Strategy:
        rows = size.image[0] // size.patch
        return replace(self, size=size.patch * (rows - round(strength * (rows - 1))))

    def at_flops(self, model: nn.Module | Tower, ratio: float) -> "Resize":
        """The size whose training FLOPs are nearest to `ratio` of dense; whole patches seldom
        meet it exactly."""
        return nearest(self, tower_of(model).size, ratio, exactly=False)


STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy
    for strategy in (Elip, EViT, ToMe, Trips, PatchDropout, Random, Resize, Adaptive)
}


def get_strategy(strategy: str | Strategy, **options: Any) -> Strategy:
    """The strategy of a name with `options`, those that are None left to its defaults.

    Raises:
        TypeError, ValueError: another name, an option that it does not take, or a bad value.
    """
    given = {name: value for name, value in options.items() if value is not None}
    if isinstance(strategy, Strategy):
        if given:
            raise ValueError(
                f"{next(iter(given))}: expected it in the strategy, {strategy.name}(...), when one "
                f"is passed whole, got {next(iter(given.values()))!r} beside it"
            )
        return strategy
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise ValueError(
            f"strategy: expected one of {list(STRATEGIES)} or a Strategy, got {strategy!r}"
        )
    cls = STRATEGIES[strategy]
    known = [field.name for field in fields(cls)]
    for name, value in given.items():
        if name not in known:
            raise ValueError(
                f"{name}: expected none with strategy={strategy!r}, which takes "
                f"{', '.join(known)}, got {value!r}"
            )
    if "schedule" in known and "schedule" not in given:
        raise ValueError(
            f"schedule: expected one for strategy={strategy!r}, such as '{PRESETS['albef']}', got "
            "none"
        )
    needed = [f.name for f in fields(cls) if f.default is MISSING and f.name not in given]
    if needed:
        raise ValueError(
            f"{needed[0]}: expected one for strategy={strategy!r}, got none; pass the strategy "
            f"whole, {cls.__name__}({needed[0]}=..)"
        )
    return cls(**given)


def default_strategy(name: str, size: Size) -> Strategy:
    """The strategy as its paper runs it: ELIP's schedule scaled to the tower's depth; for `resize`,
    three quarters of the image's height."""
    cls = STRATEGIES[name]
    if cls is Resize:
        return cls(size.patch * round(0.75 * size.image[0] / size.patch))
    if "schedule" not in [field.name for field in fields(cls)]:
        return cls()
    return cls(schedule=Schedule.parse(PRESETS["albef"]).scaled(size.depth))
