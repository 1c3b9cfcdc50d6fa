"""The part of `reduce_` in a multimodal language model.

Strategies of this package remove image tokens before the language model or inside it; the others
reduce its image tower. `elip_models.api` has the public functions.
"""

from typing import Any, TypeVar

from torch import nn

from elip_models.call_context import records_of
from elip_models.engine.hf_config import stored_in
from elip_models.engine.install import refuse_in_use
from elip_models.engine.model_methods import (
    hide_reductions,
    owners_of_hooks,
    remove_hooks,
    show_reduction,
)
from elip_models.strategies import DEFAULT, STRATEGIES
from elip_models.strategies.spec import from_line, name_in, remedy_for
from elip_models.strategies.strategy import tower_of
from elip_models.validation import shortened
from elip_models.vlm.attention_probe import unwatch
from elip_models.vlm.budget import budget_of
from elip_models.vlm.cross_attention import CrossAttentionReduction
from elip_models.vlm.families import Multimodal, find_multimodal, unsupported_config
from elip_models.vlm.inner_layers import InnerLayers, LayerHook
from elip_models.vlm.prompt_reduction import PromptReduction
from elip_models.vlm.question import is_marked
from elip_models.vlm.redundant_patches import PatchReduction
from elip_models.vlm.retrieval import RetrievalHead
from elip_models.vlm.strategies import LANGUAGE_STRATEGIES
from elip_models.vlm.strategies.base import ImageTokenStrategy, LanguageStrategy
from elip_models.vlm.strategies.dedup import Dedup
from elip_models.vlm.strategies.layer_strategy import LayerStrategy
from elip_models.vlm.tower_attention import TowerAttention
from elip_models.vlm.unsupported import language_support

T = TypeVar("T")
HOOKS = PromptReduction | PatchReduction | RetrievalHead | TowerAttention | InnerLayers | LayerHook


def language_strategies_in(model: nn.Module) -> tuple[LanguageStrategy, ...]:
    """Return the strategies that remove image tokens of a multimodal language model."""
    multimodal = find_multimodal(model)
    strategies = () if multimodal is None else installed_strategies(multimodal)
    return tuple(strategy for strategy in strategies if strategy is not None)


def reduce_language_model(multimodal: Multimodal, chosen: LanguageStrategy) -> None:
    """Replace the strategy before the language model, or the one inside it."""
    _check_supported(multimodal, chosen)
    front, inside = installed_strategies(multimodal)
    if chosen in (front, inside):
        return
    if isinstance(chosen, LayerStrategy):
        _install(multimodal, front, chosen)
    else:
        _install(multimodal, chosen, inside)


def _check_supported(multimodal: Multimodal, strategy: LanguageStrategy) -> None:
    """Raise TypeError if the strategy cannot reduce the model, or ValueError for its settings."""
    reason, name = strategy.why_unsupported(multimodal), multimodal.config.model_type
    if reason is None:
        return
    if isinstance(strategy, LayerStrategy) and reason == strategy.why_misplaced(multimodal):
        raise ValueError(f"strategy: expected settings that fit {name}, got {strategy}: {reason}")
    classes = LANGUAGE_STRATEGIES.values()
    others = (cls.name for cls in classes if cls().why_unsupported(multimodal) is None)
    raise TypeError(
        f"model: expected one that is fit for {strategy.name!r}, got {name}: {reason}; take "
        f"another strategy, such as {next(others, DEFAULT.name)!r}"
    )


def refuse_language_strategy(model: nn.Module, strategy: Any) -> None:
    """Raise TypeError for a strategy of language models, or None, that cannot reduce the model.

    Without a strategy, a language model of an unsupported family is not reduced by half, unless its
    config stores a strategy of its image tower.
    """
    name, kind, config = name_in(strategy), type(model).__name__, unsupported_config(model)
    if config is not None and (strategy is not None or stored_in(config) is None):
        raise TypeError(
            "model: expected a language model of a supported family, which `elip models "
            f"--language` lists, got a {kind}, of {config.model_type!r}{_remedy(model, config)}"
        )
    if isinstance(strategy, LanguageStrategy) or name in LANGUAGE_STRATEGIES:
        end = _remedy(model, getattr(model, "config", None)) or "; pass the whole model"
        raise TypeError(
            f"model: expected a multimodal language model, in which {name or strategy.name!r} "
            f"acts, got a {kind}{end}"
        )


def _remedy(model: nn.Module, config: Any) -> str:
    """Return the end of an error: why the family is not supported, or a strategy that may be."""
    reason = language_support().get(getattr(config, "model_type", None))
    if reason is not None:
        return f": {reason}"
    try:
        tower_of(model)
    except TypeError:
        return ""
    return f"; take a strategy of image towers, such as {DEFAULT.name!r}"


def language_strategy(
    strategy: str | LanguageStrategy | None, options: dict[str, Any]
) -> LanguageStrategy:
    """Return the strategy that the arguments of `reduce_` describe."""
    options = {name: value for name, value in options.items() if value is not None}
    if isinstance(strategy, LanguageStrategy):
        for name, value in options.items():
            raise ValueError(f"{name}: expected it inside the instance, got {value!r} beside it")
        return strategy
    line = next(iter(LANGUAGE_STRATEGIES)) if strategy is None else strategy
    if name_in(line) not in LANGUAGE_STRATEGIES:
        raise ValueError(
            f"strategy: expected one of a language model ({', '.join(LANGUAGE_STRATEGIES)}) or of "
            f"its image tower ({', '.join(STRATEGIES)}), got {shortened(strategy)}"
            f"{remedy_for(strategy, [*LANGUAGE_STRATEGIES, *STRATEGIES])}"
        )
    return from_line(line, options, LANGUAGE_STRATEGIES)


def prompt_hooks(multimodal: Multimodal) -> PromptReduction | None:
    """Return the hooks that remove tokens before the language model, or None."""
    return _owner(multimodal.model, PromptReduction)


def _owner(module: nn.Module, kind: type[T]) -> T | None:
    """Return the instance of `kind` that has hooks of the module, or None."""
    return next((owner for owner in owners_of_hooks(module) if isinstance(owner, kind)), None)


def installed_strategies(
    multimodal: Multimodal,
) -> tuple[ImageTokenStrategy | Dedup | None, LayerStrategy | None]:
    """Return the strategies before the language model and inside it, or None."""
    before = prompt_hooks(multimodal)
    inner = _owner(multimodal.language_model, InnerLayers)
    return before and before.strategy, inner and inner.strategy


def _install(
    multimodal: Multimodal,
    front: ImageTokenStrategy | Dedup | None,
    inside: LayerStrategy | None,
) -> None:
    """Replace what is installed."""
    is_cross = bool(multimodal.cross_attention_layers)
    if (old := prompt_hooks(multimodal)) is not None:
        refuse_in_use(bool(records_of(old)) or budget_of(old) is not None or is_marked(old))
    before = (
        CrossAttentionReduction(multimodal, front)
        if is_cross
        else PromptReduction(multimodal, front, inside)
    )
    inner = None if inside is None else InnerLayers(multimodal, inside)
    tower = None if front is None or not front.reads_tower else TowerAttention(multimodal)
    uninstall_strategies(multimodal)
    if tower is not None:
        tower.install(multimodal)
    if isinstance(front, Dedup):
        PatchReduction(front).install(multimodal)
    before.install(multimodal)
    if inner is not None:
        inner.install(multimodal)
    strategies = ", then ".join(map(str, filter(None, (front, inside))))
    show_reduction(multimodal.model, f"image tokens: {strategies}")


def uninstall_strategies(multimodal: Multimodal) -> None:
    """Restore the modules, and the head if `multimodal` is found without it."""
    before = prompt_hooks(multimodal)
    for handle in [] if before is None else before.of_head:
        handle.remove()
    inner = (*multimodal.language_model.modules(), *multimodal.tower.modules())
    for module in {multimodal.head or multimodal.model, multimodal.model, *inner}:
        remove_hooks(module, HOOKS)
        unwatch(module)
    hide_reductions(multimodal.model, str)
