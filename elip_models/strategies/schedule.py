"""Schedules: which blocks run on which share of the patches, as in the paper's Table 8.

`2(100%) 2(90%) 6(65%) 2(40%)` is twelve layers in four groups. Tokens are reduced before the first
layer of every group below 100%. Ratios refer to the patches at the input: K = int(N0 * ratio).
"""

import math
import re
from dataclasses import dataclass, field, replace
from decimal import Decimal

from elip_models.strategies.shares import floor_of
from elip_models.validation import check_fields, shortened

GROUP = re.compile(r"([0-9]{1,4})\(([0-9]{1,3}(?:\.[0-9]{1,400})?)%\)")
MAX_LAYERS = 1024
FORM = "groups 'layers(ratio%)' as in '2(100%) 2(90%) 6(65%) 2(40%)'"
PRESETS = {
    "clip": "2(100%) 2(90%) 6(65%) 2(40%)",
    "albef": "2(100%) 2(90%) 6(65%) 2(40%)",
    "blip": "2(100%) 2(90%) 6(65%) 2(40%)",
    "meter": "2(100%) 2(90%) 5(70%) 2(45%)",
}


@dataclass(frozen=True)
class Stage:
    """One stage of a reduction: the blocks that run on the same kept patches.

    Attributes:
        first: the 0-based block before which the tokens are reduced.
        layers: the number of blocks in the stage.
        keep: the number of patches that stay.
        last: the last block of the stage.
    """

    first: int
    layers: int
    keep: int
    last: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "last", self.first + self.layers - 1)


@dataclass(frozen=True)
class Schedule:
    """The keep ratios of a tower's layers, as groups of (layers, ratio of the patches).

        Schedule.parse("2(100%) 2(90%) 6(65%) 2(40%)").keep_counts(256)     # [230, 166, 102]

    Attributes:
        groups: (number of layers, ratio in (0, 1]) of each group, in the order of the layers.
        count_cls: ratios refer to patches and CLS together, as in the official CLIP code.
        scales: the groups are shares of the depth, so that the schedule fits a tower of any depth.
            True for a preset, False for text with numbers of layers.

    Raises:
        ValueError: no group, a group without layers, a ratio outside (0, 1], or ratios that rise.
    """

    groups: tuple[tuple[int, float], ...]
    count_cls: bool = False
    scales: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.groups:
            raise ValueError(f"schedule: expected {FORM}, got no group")
        if self.depth > MAX_LAYERS:
            raise ValueError(
                f"schedule: expected at most {MAX_LAYERS} layers, got {shortened(self.depth)}"
            )
        previous = 1.0
        for layers, ratio in self.groups:
            if layers < 1 or not 0.0 < ratio <= 1.0:
                raise ValueError(
                    "schedule: expected at least one layer and a ratio in (0%, 100%] in each "
                    f"group, got {_format(layers, ratio)} in {shortened(str(self))}"
                )
            if ratio > previous:
                raise ValueError(
                    "schedule: expected ratios that never rise, since dropped tokens do not come "
                    f"back, got {_format(layers, ratio)} after {previous:.0%} in "
                    f"{shortened(str(self))}"
                )
            previous = ratio

    @classmethod
    def parse(cls, text: "str | Schedule", *, count_cls: bool = False) -> "Schedule":
        """Return the schedule that a text describes.

        Args:
            text: groups such as '2(100%) 10(50%)'; or 'clip', 'albef', 'blip' or 'meter', the
                schedules of the paper's models, which scale to any depth; or a `Schedule`, which is
                returned unchanged.
            count_cls: see `Schedule`.

        Raises:
            TypeError: neither a string nor a `Schedule`.
            ValueError: a string of another form, or see `Schedule`.
        """
        if isinstance(text, Schedule):
            return text
        if not isinstance(text, str):
            raise TypeError(
                f"schedule: expected {FORM}, got {shortened(text)} ({type(text).__name__})"
            )
        name = text.strip().lower()
        words = PRESETS.get(name, text).split()
        matches = [GROUP.fullmatch(word) for word in words]
        if not words or None in matches:
            raise ValueError(
                f"schedule: expected {FORM} or one of {sorted(PRESETS)}, got {shortened(text)}"
            )
        groups = tuple((int(m[1]), float(Decimal(m[2]) / 100)) for m in matches if m)
        return cls(groups, count_cls, scales=name in PRESETS)

    def __str__(self) -> str:
        return " ".join(_format(layers, ratio) for layers, ratio in self.groups)

    @property
    def exact(self) -> str:
        """Return the groups as text with all digits, which `parse` reads back exactly."""
        percent = ((n, (Decimal(repr(ratio)) * 100).normalize()) for n, ratio in self.groups)
        return " ".join(f"{layers}({ratio:f}%)" for layers, ratio in percent)

    @property
    def depth(self) -> int:
        """Return the number of layers."""
        return sum(layers for layers, _ in self.groups)

    def stages(self, num_patches: int) -> tuple[Stage, ...]:
        """Return the stages for a tower of `num_patches` patches, without groups of 100%.

        Raises:
            ValueError: a ratio that keeps no patch.
        """
        stages, first = [], 0
        counted = num_patches + 1 if self.count_cls else num_patches
        for layers, ratio in self.groups:
            if ratio < 1.0:
                keep = floor_of(ratio, counted)
                if not 1 <= keep <= num_patches:
                    raise ValueError(
                        f"schedule: expected 1 to {num_patches} kept patches of {num_patches}, got "
                        f"{keep} from {_format(layers, ratio)}"
                    )
                stages.append(Stage(first, layers, keep))
            first += layers
        return tuple(stages)

    def keep_counts(self, num_patches: int) -> list[int]:
        """Return the number of kept patches of each stage."""
        return [stage.keep for stage in self.stages(num_patches)]

    def tokens_per_layer(
        self, num_patches: int, *, num_merged: int = 1, num_prefix_tokens: int = 1
    ) -> list[int]:
        """Return the number of tokens that enter each layer.

        Args:
            num_patches: patches at the input.
            num_merged: merged tokens that a stage appends, 1 or 0.
            num_prefix_tokens: tokens before the patches, such as CLS.
        """
        tokens = [num_patches + num_prefix_tokens] * self.depth
        for stage in self.stages(num_patches):
            reduced = min(stage.keep + num_prefix_tokens + num_merged, tokens[stage.first])
            tokens[stage.first :] = [reduced] * (self.depth - stage.first)
        return tokens

    def scaled(self, depth: int) -> "Schedule":
        """Return the same ratios over `depth` layers, at least one per group if possible."""
        sizes, done, least = [], 0.0, 1 if depth >= len(self.groups) else 0
        for layers, _ in self.groups:
            start, done = round(done), done + layers * depth / self.depth
            sizes.append(max(least, round(done) - start))
        while sum(sizes) > depth:
            sizes[sizes.index(max(sizes))] -= 1
        groups = ((n, ratio) for n, (_, ratio) in zip(sizes, self.groups, strict=True) if n)
        return replace(self, groups=tuple(groups), scales=False)

    def at_strength(self, num_patches: int, strength: float) -> "Schedule":
        """Return the schedule at a strength from 0 (drops nothing) to 1 (keeps about one patch).

        Each ratio is raised to the power s/(1-s), so that the share that a stage keeps of its input
        changes by the same power in all stages. A strength of 0.5 returns this schedule.
        """
        power = math.inf if strength == 1.0 else strength / (1 - strength)
        least = min(1.0, 1.5 / num_patches)
        groups = tuple((n, max(least, ratio**power)) for n, ratio in self.groups)
        return replace(self, groups=groups)

    def for_depth(self, depth: int) -> "Schedule":
        """Return the schedule for a tower of `depth` layers, scaled if it `scales`.

        Raises:
            ValueError: the layers do not add up to `depth`; the message has the scaled text.
        """
        if self.depth == depth and not self.scales:
            return self
        if not self.scales:
            raise ValueError(
                f"schedule: expected {depth} layers, as the tower has, got {self.depth} in "
                f"{shortened(str(self))}; scaled to the tower: {shortened(str(self.scaled(depth)))}"
            )
        return self.scaled(depth)


def _format(layers: int, ratio: float) -> str:
    """Return a group as text."""
    return f"{layers}({ratio * 100:.6g}%)"


PAPER = Schedule.parse("clip")
"""The default schedule of strategies: the paper's for twelve layers, scaled to any depth."""
