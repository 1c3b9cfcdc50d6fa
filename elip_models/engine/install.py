"""Token reduction for a model of another library: the image tower's part of `reduce_`.

`install_strategy` replaces the forward method of each block, from the first that a strategy acts at
(`ReducedBlock`). Parameters and state_dict keys stay. The replaced methods share one `Reduction`.
`elip_models.api` has the public functions, for every kind of model.
"""

from typing import Any, TypeVar

import torch
from torch import nn

from elip_models.engine.hf_config import remove_from_config, store_in_config, strategy_in_config
from elip_models.engine.model_methods import (
    REFUSALS,
    CollectHiddenStates,
    DenseMethod,
    EncodeTextFirst,
    PatchEmbedding,
    Refusal,
    hide_reductions,
    keep_handles,
    remove_hooks,
    show_reduction,
    shown_reduction,
)
from elip_models.engine.reduced_block import Passes, ReducedBlock, TrackCall
from elip_models.engine.reduction import Reduction
from elip_models.strategies import default_strategy
from elip_models.strategies.elip import ELIP
from elip_models.strategies.spec import resolve_strategy
from elip_models.strategies.strategy import Strategy
from elip_models.strategies.summary import Summary
from elip_models.towers import (
    ImageTextModel,
    Tower,
    as_image_text,
    as_tower,
    check_module,
    without_adapter,
)
from elip_models.towers.nested_modules import modules_outside

M = TypeVar("M", bound=nn.Module)
Replacement = (ReducedBlock, PatchEmbedding, Refusal, DenseMethod)
Hook = EncodeTextFirst | CollectHiddenStates | TrackCall


def install_strategy(
    model: M, strategy: str | Strategy | None, options: dict[str, Any], keep: float | None
) -> M:
    """Resolve the strategy, and install it unless the model is already reduced by it."""
    (image_text, tower), present = _read(model), reduction_of(model)
    has_text = image_text is not None and image_text.refuses() is None
    use_config = keep is None and present is None

    def default() -> Strategy:
        return strategy_by_default(tower, image_text, has_text=has_text, use_config=use_config)

    strategy = resolve_strategy(tower, strategy, options, keep=keep, default=default)
    if image_text is not None and image_text.reads_patches and strategy.drops_patches:
        reason = f"the text encoder of a {type(model).__name__} reads patches"
        raise TypeError(f"class_token_only: expected False, since {reason}, got True")
    reduction = Reduction(tower, strategy, _guiding(image_text, strategy, tower))
    if present is None or _key(present) != _key(reduction):
        _install(model, reduction)  # an equal one stays, so that torch.compile keeps its graph
    return model


def _key(reduction: Reduction) -> tuple[Strategy, bool]:
    """Return what equal reductions of a model have in common."""
    return reduction.strategy, reduction.image_text is None


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
    present = reduction_of(model)
    refuse_in_use(present is not None and present.is_in_use)
    uninstall_strategy(model)
    tower, strategy, image_text = reduction.tower, reduction.strategy, reduction.image_text
    show_reduction(reduction.model, reduction)
    store_in_config(reduction)
    if not reduction.acts_at and not strategy.changes_embedding:
        return
    if strategy.changes_embedding:
        *first, (owner, name) = tower.embed_methods
        setattr(owner, name, PatchEmbedding(reduction, passes_on=False))
        for owner, name in first:
            setattr(owner, name, PatchEmbedding(reduction, passes_on=True))
    passes = Passes(reduction)
    for i, block in enumerate(tower.blocks):
        if i >= reduction.first:
            block.forward = ReducedBlock(passes, i, vars(block).get("forward"))
    _install_methods(passes)
    if tower.collector is not None:
        _hook(tower.collector, CollectHiddenStates(passes))
    if image_text is not None and strategy.is_guided:
        _hook(image_text.model, EncodeTextFirst(passes))
    for module in dict.fromkeys((tower.model, reduction.model)):
        _hook(module, TrackCall(passes))


def refuse_in_use(is_in_use: bool) -> None:
    """Raise RuntimeError if forward passes inside a context use the present settings."""
    if is_in_use:
        raise RuntimeError(
            "reduce_: expected a call outside of guidance, budget and record_stages of the model, "
            "which use the earlier settings, got one inside; leave them first"
        )


def _install_methods(passes: Passes) -> None:
    """Replace the methods that read more of the model than its forward pass does."""
    tower, strategy = passes.reduction.tower, passes.reduction.strategy
    model = tower.model
    refused, dense = [*tower.unsupported_methods, *REFUSALS], tower.dense_methods
    if strategy.changes_embedding:
        refused, dense = [*refused, *dense], ()
    for name in refused:
        setattr(model, name, Refusal(name, vars(model).get(name)))
    for name in dense:
        setattr(model, name, DenseMethod(passes, name, vars(model).get(name)))


def _hook(module: nn.Module, hook: Hook) -> None:
    """Register the hook before and after the module's forward."""
    before = module.register_forward_pre_hook(hook, with_kwargs=True)
    after = module.register_forward_hook(hook, with_kwargs=True, always_call=True)
    keep_handles(module, hook, before, after)


def uninstall_strategy(model: nn.Module) -> None:
    """Undo `install_strategy`."""
    reduction = reduction_of(model)
    for module in () if reduction is None else reduction.tower.blocks:
        for name, value in vars(module).items():
            if isinstance(value, ReducedBlock) and name != "forward":
                raise TypeError(
                    f"model: expected {type(module).__name__}s as reduce_ left them, got one whose "
                    "forward was wrapped afterwards; remove that wrapper first"
                )
    if reduction is None:
        remove_from_config(_own_modules(model), None)
        return
    tower = reduction.tower
    whole_modules = (module for whole in reduction.wholes for module in tower.own_modules(whole))
    remove_from_config([*_own_modules(model), *whole_modules], reduction.shared_config)
    embedding = [owner for owner, _ in tower.embed_methods]
    for module in {tower.trunk, *tower.blocks, *embedding, *reduction.wholes}:
        remove_hooks(module, Hook)
        hide_reductions(module, Reduction)
        for name, value in list(vars(module).items()):
            if isinstance(value, Replacement):
                delattr(module, name)
                if not isinstance(value, PatchEmbedding) and value.replaced is not None:
                    setattr(module, name, value.replaced)


def _own_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules of the model, without those of models inside it."""
    try:
        tower = _read(model)[1]
    except TypeError:
        return modules_outside(model, lambda module: shown_reduction(module) is not None)
    return tower.own_modules(model)


def tower_summary(model: nn.Module) -> Summary:
    """Return how an image model, or the image tower of another, is reduced."""
    reduction = reduction_of(model) if isinstance(model, nn.Module) else None
    if reduction is not None:
        return reduction.summary
    image_text, tower = _read(model)
    return Summary.of(tower, None, is_whole=image_text is not None)


def is_reduced_tower(tower: Tower) -> bool:
    """Return whether the tower is reduced; cheap, because it looks at the tower's parts alone."""
    return _installed_in(tower) is not None


def reduction_of(model: nn.Module) -> Reduction | None:
    """Return the reduction of the model's own tower, or None.

    It is the one that is shown with the model, or the one of the blocks of its tower, which may
    have been reduced as a part of another model, or alone.
    """
    model = without_adapter(model)
    if (shown := shown_reduction(model)) is not None:
        return shown
    try:
        tower = _read(model)[1]
    except TypeError:
        return None
    return shown_reduction(tower.model) or _installed_in(tower)


def _installed_in(tower: Tower) -> Reduction | None:
    """Return the reduction of the tower's blocks and embedding, or None."""
    methods = [] if tower.refuses_resizing() else tower.embed_methods
    owners = [*methods, *((block, "forward") for block in tower.blocks)]
    values = (vars(owner).get(name) for owner, name in owners)
    installed = (value for value in values if isinstance(value, ReducedBlock | PatchEmbedding))
    return next((value.reduction for value in installed), None)


def refuse_compiled(model: nn.Module, name: str) -> None:
    """Raise TypeError if the model is compiled, or no module."""
    check_module(model)
    if isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl is not None:
        raise TypeError(
            "model: expected a model before torch.compile, got a compiled one; call "
            f"{name} on the original module, then compile it"
        )
