"""The settings that a calibration tries: each strategy at falling shares of the dense FLOPs."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from elip_models.strategies import STRATEGIES as BUILT_IN
from elip_models.strategies.flops import at_flops, inference_ratio, kept_share
from elip_models.strategies.resize import ImageResize
from elip_models.strategies.serialization import settings_of
from elip_models.strategies.spec import fit_strategy, get_strategy, option_types, parse_spec
from elip_models.strategies.strategy import Strategy
from elip_models.towers import as_reducible, as_tower
from elip_models.validation import as_config_error, shortened

LEFT_OUT = ("trips", "random")  # needs a text; a control
STRATEGIES = tuple(
    f"{name}:without_text=vision" if "without_text" in option_types(name) else name
    for name, strategy in BUILT_IN.items()
    if not strategy.training_only and name not in LEFT_OUT
)
"""Every built-in strategy that reduces in inference and needs no text, except the control `random`.
They are in the order of their results on photographs: a good one first saves trials of others."""
SHARES = tuple(round(0.95 - 0.05 * i, 2) for i in range(14))
"""Of the dense FLOPs, from 0.95 to 0.30."""


class Candidate(NamedTuple):
    """A setting that may be tried.

    Attributes:
        name: the strategy and the share of the tokens that it keeps, as `reduce_` takes both.
        strategy: the strategy at this setting, as `reduce_` takes it.
        settings: the strategy as plain JSON.
        flops: its share of the dense FLOPs, scoring included.
        kept: the mean share of the tokens over the layers.
    """

    name: str
    strategy: Any
    settings: dict[str, Any]
    flops: float
    kept: float

    @property
    def is_control(self) -> bool:
        """Whether this is a smaller image, which a reduction has to be better than."""
        return isinstance(self.strategy, ImageResize)


class Candidates(Protocol):
    """The settings of the strategies of a model.

    Attributes:
        strategies: texts for `falling`, those that are tried by default, the best first.
    """

    strategies: Sequence[str]

    def falling(self, text: str) -> list[Candidate]:
        """Return the settings of a strategy whose FLOPs are below the dense ones, from high to low.

        Raises:
            TypeError: the strategy cannot reduce the model, with the reason.
        """

    def control(self, share: float) -> Candidate | None:
        """Return the smaller image whose FLOPs are nearest to a share; None if there is none."""

    def compared(self, text: str) -> Candidate:
        """Return the setting that a text such as "evit 0.7" describes.

        Raises:
            TypeError, ValueError: no strategy, or one that cannot reduce the model.
        """


class TowerCandidates(Candidates):
    """The settings of the strategies of an image tower.

    Args:
        model: an image model, or an image-text model.
        images: (1, 3, H, W) an image as the model reads it, whose size is that of all; None: images
            of the model's own size.
        class_token_only: strategies with this setting get it.
    """

    strategies = STRATEGIES

    def __init__(
        self, model: nn.Module, images: Tensor | None = None, *, class_token_only: bool = False
    ) -> None:
        self.tower = as_tower(as_reducible(model).image_model)
        self.size = self.tower.size
        self.class_token_only = class_token_only
        if images is None:
            return
        if self.tower.has_dynamic_size:
            tokens = self.tower.embed(images).shape[1]
            self.size = self.size._replace(num_patches=tokens - self.tower.num_prefix_tokens)
        elif tuple(images.shape[2:]) != self.tower.image_size:
            height, width = self.tower.image_size
            raise ValueError(
                f"images: expected {height} x {width} pixels, got {tuple(images.shape[2:])}; "
                f"{self.tower.size_advice}"
            )

    def falling(self, text: str) -> list[Candidate]:
        name, settings = parse_spec(text)
        if self.class_token_only and "class_token_only" in option_types(name):
            text += f"{',' if settings else ':'}class_token_only=true"
        strategy = get_strategy(text).fitted(self.tower)
        found: list[Candidate] = []
        for share in SHARES:
            setting = self._at_share(strategy, share)
            if setting.flops < min((other.flops for other in found), default=1.0):
                found.append(setting)
        return found

    def control(self, share: float) -> Candidate | None:
        if self.tower.refuses_resizing() is not None:
            return None
        setting = self._at_share(ImageResize(), share)
        return setting if setting.flops < 1 else None

    def compared(self, text: str) -> Candidate:
        name, keep = strategy_and_keep(text)
        with as_config_error("compare", inner="strategy"):
            return self._candidate(fit_strategy(get_strategy(name), self.tower, keep))

    def _at_share(self, strategy: Strategy, share: float) -> Candidate:
        """Return the setting whose FLOPs are nearest to a share of the dense ones."""
        return self._candidate(at_flops(strategy, self.size, share, training=False, exactly=False))

    def _candidate(self, strategy: Strategy) -> Candidate:
        """Return a strategy whose rate is set as a candidate."""
        kept = kept_share(strategy, self.size)
        name = line_of(strategy, strategy.keep_field, "without_text")
        flops = inference_ratio(strategy, self.size)
        return Candidate(f"{name} {kept:.2f}", strategy, settings_of(strategy), flops, kept)


def line_of(strategy: Any, *left_out: str | None) -> str:
    """Return a strategy as "name:option=value" with the options that are not the default.

    `left_out` are the names of further options that are left out.
    """
    options = ",".join(
        f"{option.name}={getattr(strategy, option.name)}".lower()
        for option in fields(strategy)
        if option.name not in left_out and getattr(strategy, option.name) != option.default
    )
    return f"{strategy.name}:{options}" if options else strategy.name


def strategy_and_keep(text: str) -> tuple[str, float | None]:
    """Return the strategy and its keep, or None, in a text such as "evit 0.7"."""
    name, _, number = text.strip().rpartition(" ")
    try:
        keep = float(number)
    except ValueError:
        name, keep = text.strip(), None
    if not name:
        raise ValueError(
            f"compare: expected a strategy and its keep, such as 'evit 0.7', got {shortened(text)}"
        )
    return name, keep
