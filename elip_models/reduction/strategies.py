"""The strategies that ELIP is compared with, and all of them by name.

`elip` stands in stage.py, `evit` and `tome` in inside.py. Each is frozen data, an argument of
`encode_image` and `reduce_`: a name, or an instance such as `ToMe(r=13)`.
"""

from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from elip_models.reduction.inside import EViT, ToMe, check_share
from elip_models.reduction.schedule import PRESETS, Schedule, Stage
from elip_models.reduction.stage import Elip, Staged
from elip_models.reduction.strategy import Layer, Strategy
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


@dataclass(frozen=True)
class Random(Staged):
    """ELIP's schedule with patches kept at random and the others averaged: the control.

    schedule, merge: as of `Elip`.
    """

    name: ClassVar[str] = "random"

    schedule: Schedule
    merge: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "schedule", Schedule.parse(self.schedule))

    def score(self, tower: Tower, stage: Stage, tokens: Tensor, text: Tensor | None) -> Tensor:
        return random_row(tokens, stage.keep, tower.num_prefix_tokens)


@dataclass(frozen=True)
class PatchDropout(Staged):
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

    def score(self, tower: Tower, stage: Stage, tokens: Tensor, text: Tensor | None) -> Tensor:
        return random_row(tokens, stage.keep, tower.num_prefix_tokens)

    def at_strength(self, size: Size, strength: float) -> Strategy:
        return replace(self, keep=1 - strength * (1 - 1.5 / size.num_patches))


@torch.no_grad()
def random_row(tokens: Tensor, keep: int, num_prefix_tokens: int) -> Tensor:
    """A row (B, N) of scores: 2 for `keep` patches drawn at random, 1 for the others."""
    B, N, _ = tokens.shape
    drawn = torch.rand(B, N - num_prefix_tokens, device=tokens.device)
    chosen = drawn.topk(keep, dim=1).indices
    return torch.ones(B, N, device=tokens.device).scatter(1, chosen + num_prefix_tokens, 2.0)


STRATEGIES: dict[str, type[Strategy]] = {
    strategy.name: strategy for strategy in (Elip, EViT, ToMe, Trips, PatchDropout, Random)
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
    return cls(**given)


def default_strategy(name: str, depth: int) -> Strategy:
    """The strategy as its paper runs it; ELIP's schedule scaled to the tower's depth."""
    cls = STRATEGIES[name]
    if "schedule" not in [field.name for field in fields(cls)]:
        return cls()
    return cls(schedule=Schedule.parse(PRESETS["albef"]).scaled(depth))
