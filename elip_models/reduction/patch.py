"""Token reduction for a model of another library: the image tower's part of `reduce_`.

`install_strategy` replaces the forward method of each block, from the first that a strategy acts at
(`ReducedBlock`). Parameters and state_dict keys stay. The replaced methods share one `Reduction`.
`elip_models.api` has the public functions, for every kind of model.
"""

from typing import Any, TypeVar

import torch
from torch import nn

from elip_models.reduction.forward_passes import TrackCall
from elip_models.reduction.hf_config import remove_from_config, store_in_config, strategy_in_config
from elip_models.reduction.model_patches import (
    REFUSALS,
    CollectHiddenStates,
    DenseMethod,
    EncodeTextFirst,
    PatchEmbedding,
    Refusal,
    Representation,
    hide_reductions,
    remove_hooks,
    show_reduction,
)
from elip_models.reduction.reduced_model import ReducedBlock, Reduction
from elip_models.reduction.strategies import default_strategy
from elip_models.reduction.strategies.elip import ELIP
from elip_models.reduction.strategy import Strategy
from elip_models.reduction.strategy_spec import resolve_strategy
from elip_models.reduction.summary import Summary
from elip_models.towers import ImageTextModel, Tower, as_image_text, as_tower, check_module

M = TypeVar("M", bound=nn.Module)
Replacement = (ReducedBlock, PatchEmbedding, Refusal, DenseMethod)
Hook = EncodeTextFirst | CollectHiddenStates | TrackCall


def install_strategy(
    model: M, strategy: str | Strategy | None, options: dict[str, Any], keep: float | None
) -> M:
    """Resolve the strategy, and install it unless the model is already reduced by it."""
    (image_text, tower), others = _read(model), reductions_of(model)
    has_text = image_text is not None and image_text.refuses() is None
    use_config = keep is None and not others

    def default() -> Strategy:
        return strategy_by_default(tower, image_text, has_text=has_text, use_config=use_config)

    strategy = resolve_strategy(tower, strategy, options, keep=keep, default=default)
    if image_text is not None and image_text.reads_patches and strategy.drops_patches:
        reason = f"the text encoder of a {type(model).__name__} reads patches"
        raise TypeError(f"class_token_only: expected False, since {reason}, got True")
    reduction = Reduction(tower, strategy, _guiding(image_text, strategy, tower))
    key = reduction.strategy, reduction.image_text is None
    if not any(key == (other.strategy, other.image_text is None) for other in others):
        _install(model, reduction)  # an equal one stays, so that torch.compile keeps its graph
    return model


def _guiding(
    image_text: ImageTextModel | None, strategy: Strategy, tower: Tower
) -> ImageTextModel | None:
    """Return the whole model if its text can guide its images; raise if nothing could."""
    reason = None if image_text is None else image_text.refuses()
    if reason is None:
        return image_text
    if strategy.is_guided and not tower.has_cls:
        raise TypeError(
            "model: expected one whose text can guide its images, got "
            f"{type(image_text.model).__name__}: {reason}"
        )
    return None


def _read(model: nn.Module) -> tuple[ImageTextModel | None, Tower]:
    """Return the image-text model, or None, and the tower of its image model."""
    whole = as_image_text(model)
    return whole, as_tower(model if whole is None else whole.image_model)


def strategy_by_default(
    tower: Tower, image_text: ImageTextModel | None = None, *, has_text: bool, use_config: bool
) -> Strategy:
    """Return the strategy of a call that names none, for `reduce_`, `encode_image` and commands.

    `image_text` is the whole model around the tower, if it is one. With `use_config`, the strategy
    in the config of a saved model comes first.
    """
    saved = strategy_in_config(image_text or tower) if use_config else None
    is_original = all(_replaced(block, "forward") is None for block in tower.blocks)
    return saved or default_strategy(tower, has_text=has_text, may_replace=is_original)


def _refuse_replaced(reduction: Reduction) -> None:
    """Raise TypeError if a forward method was replaced, since the strategy would bypass it."""
    tower, strategy = reduction.tower, reduction.strategy
    replaces = strategy.replaces_block or tower.reads_own_positions
    owners = [(tower.blocks[i], "forward") for i in reduction.acts_at if replaces]
    owners += tower.embed_methods if strategy.changes_embedding else []
    for owner, name in owners:
        if _replaced(owner, name) is not None:
            raise TypeError(
                f"model: expected each {type(owner).__name__} with its own {name}, got one whose "
                f"{name} was replaced, which {strategy.name!r} would bypass; take {ELIP.name!r}, "
                "which calls it, or load the model without a device_map that offloads parts"
            )


def _replaced(owner: nn.Module, name: str) -> Any:
    """Return what other code has put in place of a method, or None."""
    method = vars(owner).get(name)
    method = method.replaced if isinstance(method, ReducedBlock) else method
    return None if isinstance(method, PatchEmbedding) else method


def _install(model: nn.Module, reduction: Reduction) -> None:
    """Replace the forward methods of the model's blocks, after undoing an earlier reduction."""
    _refuse_replaced(reduction)
    refuse_in_use(any(reduction.is_in_use for reduction in reductions_of(model)))
    uninstall_strategy(model)
    tower, strategy, image_text = reduction.tower, reduction.strategy, reduction.image_text
    show_reduction(reduction.model, reduction)
    store_in_config(model, reduction)
    if not reduction.acts_at and not strategy.changes_embedding:
        return
    if strategy.changes_embedding:
        *first, (owner, name) = tower.embed_methods
        setattr(owner, name, PatchEmbedding(reduction, passes_on=False))
        for owner, name in first:
            setattr(owner, name, PatchEmbedding(reduction, passes_on=True))
    for i, block in enumerate(tower.blocks):
        if i >= reduction.first:
            block.forward = ReducedBlock(reduction, i, vars(block).get("forward"))
    _install_methods(reduction)
    if tower.collector is not None:
        _hook(tower.collector, CollectHiddenStates(reduction))
    if image_text is not None and strategy.is_guided:
        _hook(image_text.model, EncodeTextFirst(reduction))
    for module in dict.fromkeys((tower.model, reduction.model)):
        _hook(module, TrackCall(reduction))


def refuse_in_use(is_in_use: bool) -> None:
    """Raise RuntimeError if forward passes inside a context use the present settings."""
    if is_in_use:
        raise RuntimeError(
            "reduce_: expected a call outside of guidance, budget and record_stages of the model, "
            "which use the earlier settings, got one inside; leave them first"
        )


def _install_methods(reduction: Reduction) -> None:
    """Replace the methods that read more of the model than its forward pass does."""
    model, tower = reduction.tower.model, reduction.tower
    refused, dense = [*tower.unsupported_methods, *REFUSALS], tower.dense_methods
    if reduction.strategy.changes_embedding:
        refused, dense = [*refused, *dense], ()
    for name in refused:
        setattr(model, name, Refusal(name, vars(model).get(name)))
    for name in dense:
        setattr(model, name, DenseMethod(reduction, name, vars(model).get(name)))


def _hook(module: nn.Module, hook: Hook) -> None:
    """Register the hook before and after the module's forward."""
    module.register_forward_pre_hook(hook, with_kwargs=True)
    module.register_forward_hook(hook, with_kwargs=True, always_call=True)


def uninstall_strategy(model: nn.Module) -> None:
    """Undo `install_strategy`."""
    refuse_compiled(model, "unreduce_")
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, ReducedBlock) and name != "forward":
                raise TypeError(
                    f"model: expected {type(module).__name__}s as reduce_ left them, got one whose "
                    "forward was wrapped afterwards; remove that wrapper first"
                )
    reductions = reductions_of(model)
    wholes = (model, *(reduction.model for reduction in reductions))
    modules = list(dict.fromkeys(module for whole in wholes for module in whole.modules()))
    remove_from_config(modules, reductions)
    for module in modules:
        remove_hooks(module, Hook)
        hide_reductions(module, Reduction)
        for name, value in list(vars(module).items()):
            if isinstance(value, Replacement):
                delattr(module, name)
                if not isinstance(value, PatchEmbedding) and value.replaced is not None:
                    setattr(module, name, value.replaced)


def tower_summary(model: nn.Module) -> Summary:
    """Return how an image model, or the image tower of another, is reduced."""
    reductions = reductions_of(model) if isinstance(model, nn.Module) else []
    if reductions:
        return reductions[0].summary
    image_text, tower = _read(model)
    return Summary.of(tower, None, is_whole=image_text is not None)


def is_reduced_tower(tower: Tower) -> bool:
    """Return whether the tower is reduced; cheap, because it looks at the tower's parts alone."""
    methods = [] if tower.refuses_resizing() else tower.embed_methods
    owners = [*methods, *((block, "forward") for block in tower.blocks)]
    return any(isinstance(vars(owner).get(name), Replacement) for owner, name in owners)


def reductions_of(model: nn.Module) -> list[Reduction]:
    """Return the reductions of the model and of the models inside it."""
    reductions: list[Any] = []
    for value in (value for module in model.modules() for value in vars(module).values()):
        if isinstance(value, ReducedBlock | PatchEmbedding):
            reductions.append(value.reduction)
        elif isinstance(value, Representation):
            reductions += value.reductions
    unique = {id(reduction): reduction for reduction in reductions}
    return [reduction for reduction in unique.values() if isinstance(reduction, Reduction)]


def reductions_in(model: nn.Module) -> list[Reduction]:
    """Return `reductions_of`; raise ValueError if there is none."""
    reductions = reductions_of(model) if isinstance(model, nn.Module) else []
    if not reductions:
        raise ValueError("model: expected one that reduce_ has changed, got one without reduction")
    return reductions


def refuse_compiled(model: nn.Module, name: str) -> None:
    """Raise TypeError if the model is compiled, or no module."""
    check_module(model)
    if isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl is not None:
        raise TypeError(
            "model: expected a model before torch.compile, got a compiled one; call "
            f"{name} on the original module, then compile it"
        )
