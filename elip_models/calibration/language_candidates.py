"""The settings that are tried on a multimodal language model, before, inside and after its tower.

FLOPs are those of the prefill of one prompt. What is not the language model, is the difference
between the FLOPs that are counted in a dense forward pass and the formula of the language model. It
counts as the image tower.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from elip_models.calibration.candidates import (
    STRATEGIES,
    Candidate,
    Candidates,
    TowerCandidates,
    line_of,
    strategy_and_keep,
)
from elip_models.profiling.measure import count_step
from elip_models.strategies.serialization import settings_of
from elip_models.strategies.spec import name_in
from elip_models.vlm.families import find_multimodal
from elip_models.vlm.install import language_strategy
from elip_models.vlm.strategies import LANGUAGE_STRATEGIES
from elip_models.vlm.strategies.base import LanguageStrategy
from elip_models.vlm.strategies.dedup import Dedup
from elip_models.vlm.strategies.layer_strategy import LayerStrategy
from elip_models.vlm.summary import prefill_flops

LEFT_OUT = ("evs", "pool", "random_tokens")  # of videos; of square grids; a control
OF_LANGUAGE_MODEL = tuple(name for name in LANGUAGE_STRATEGIES if name not in LEFT_OUT)
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)
TOLERANCES = (0.0, 0.1, 0.2, 0.4)
"""Of `dedup`."""
SIZES = tuple(round(1 - 0.05 * i, 2) for i in range(1, 19))
"""Of smaller images: shares of the pixels, from 0.95 to 0.10."""


@dataclass(frozen=True)
class FewerPixels:
    """The control: the processor gets smaller images, and nothing is reduced.

    Attributes:
        share: of the pixels.
    """

    name: ClassVar[str] = "pixels"
    share: float


class LanguageCandidates(Candidates):
    """The settings of the strategies of a multimodal language model.

    Args:
        model: the dense model.
        prompt: the arguments of its forward pass for one prompt.
        kept_by: returns the mean share of the image tokens of some prompts that a strategy leaves
            before the language model; ValueError if it cannot reduce them.
        tokens_at: returns the tokens of the images of the prompt at a share of their pixels.
    """

    def __init__(
        self,
        model: nn.Module,
        prompt: dict[str, Tensor],
        *,
        kept_by: Callable[[LanguageStrategy], float],
        tokens_at: Callable[[float], int],
    ) -> None:
        self.model, self.kept_by, self.tokens_at = model, kept_by, tokens_at
        self.multimodal = find_multimodal(model)
        try:
            TowerCandidates(model)
            of_tower = STRATEGIES
        except TypeError:
            of_tower = STRATEGIES[:1]  # whose refusal has the reason
        self.strategies: Sequence[str] = (*OF_LANGUAGE_MODEL, *of_tower)
        self.tokens = image_tokens(model, prompt)
        self.text = prompt["input_ids"].numel() - self.tokens
        self.depth = len(self.multimodal.language_model.layers)
        language = self._language_flops((self.tokens,) * self.depth)
        takes = signature(model.forward).parameters
        last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        with torch.no_grad():
            counted = count_step(lambda: model(**prompt, **last).logits, backward=False).forward
        self.rest, self.dense = max(0, counted - language), max(counted, language)

    def falling(self, text: str) -> list[Candidate]:
        if name_in(text) not in LANGUAGE_STRATEGIES:
            settings = TowerCandidates(self.model).falling(text)
            return [self._of_tower(setting) for setting in settings]
        strategy = self._checked(language_strategy(text, {}))
        try:
            self.kept_by(strategy)
        except ValueError as error:
            raise TypeError(
                f"strategy: expected one for these prompts, got {text!r}: {error}"
            ) from error
        option, values = ("keep", KEEPS) if strategy.keep else ("tolerance", TOLERANCES)
        found: list[Candidate] = []
        for value in values:
            setting = self._candidate(replace(strategy, **{option: value}))
            if setting.flops < min((other.flops for other in found), default=1.0):
                found.append(setting)
        return found

    def control(self, share: float) -> Candidate | None:
        settings = [self._of_pixels(size) for size in SIZES]
        nearest = min(settings, key=lambda setting: abs(setting.flops - share))
        is_smaller = self.tokens_at(nearest.strategy.share) < self.tokens
        return nearest if is_smaller else None

    def compared(self, text: str) -> Candidate:
        name, keep = strategy_and_keep(text)
        if name_in(name) not in LANGUAGE_STRATEGIES:
            return self._of_tower(TowerCandidates(self.model).compared(text))
        keep = int(keep) if keep is not None and keep > 1 else keep
        return self._candidate(self._checked(language_strategy(name, {"keep": keep})))

    def _checked(self, strategy: LanguageStrategy) -> LanguageStrategy:
        """Return the strategy; raise TypeError if it cannot reduce the model."""
        reason = strategy.why_unsupported(self.multimodal)
        if reason is not None:
            raise TypeError(
                f"strategy: expected one for {self.multimodal.config.model_type}, got "
                f"{strategy.name!r}: {reason}"
            )
        return strategy

    def _candidate(self, strategy: LanguageStrategy) -> Candidate:
        rest, name = self.rest, line_of(strategy, "keep")
        if isinstance(strategy, Dedup):
            share = self.kept_by(strategy)
            read, rest = (round(share * self.tokens),) * self.depth, round(share * rest)
        else:
            name += f" {strategy.keep:g}"
            read = (
                strategy.kept(self.tokens, self.depth)
                if isinstance(strategy, LayerStrategy)
                else (strategy.count(self.tokens),) * self.depth
            )
            rest += strategy.flops(self.tokens, self.width) if read[0] < self.tokens else 0
        flops = (rest + self._language_flops(read)) / self.dense
        kept = sum(read) / (self.tokens * self.depth)
        return Candidate(name, strategy, settings_of(strategy, LANGUAGE_STRATEGIES), flops, kept)

    @property
    def width(self) -> int:
        """Return the width of the language model."""
        return self.multimodal.text_config.hidden_size

    def _of_tower(self, setting: Candidate) -> Candidate:
        """Return a setting of the image tower, with its share of the FLOPs of the whole model."""
        saved = (1 - setting.flops) * self.rest
        return setting._replace(flops=1 - saved / self.dense)

    def _of_pixels(self, share: float) -> Candidate:
        language = self._language_flops((round(share * self.tokens),) * self.depth)
        flops = (share * self.rest + language) / self.dense
        settings: dict[str, Any] = {"strategy": FewerPixels.name, "settings": {"share": share}}
        return Candidate(f"pixels {share:.2f}", FewerPixels(share), settings, flops, share)

    def _language_flops(self, read: Sequence[int]) -> int:
        """Return the FLOPs of the language model whose layers read so many tokens of images."""
        return prefill_flops(self.multimodal, [tokens + self.text for tokens in read])


def image_tokens(model: nn.Module, prompt: dict[str, Tensor]) -> int:
    """Return the number of tokens of images in a prompt."""
    ids = torch.tensor(find_multimodal(model).placeholder_ids)
    return int(torch.isin(prompt["input_ids"].cpu(), ids).sum())
