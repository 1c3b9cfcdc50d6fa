"""reduce_, unreduce_, guidance: token reduction for a model somebody else owns.

`reduce_` adds one forward pre-hook to each block that a strategy's step stands before, or gives the
block whose place it takes another forward: parameters and state_dict keys stay. All state is plain
attributes of these objects, so that it follows the model through deepcopy and pickle and is an
ordinary guard for the compiler.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from elip_models.reduction.hooks import (
    BlockForward,
    Entrance,
    Refusal,
    Shared,
    StageHook,
    TextFirst,
)
from elip_models.reduction.places import PlacesHook, follow_places
from elip_models.reduction.schedule import Schedule
from elip_models.reduction.strategies import get_strategy
from elip_models.reduction.strategy import Strategy, stages_of
from elip_models.towers import ImageTextModel, Tower, as_image_text, as_tower


def reduce_(
    model: nn.Module,
    *,
    schedule: Schedule | str | None = None,
    strategy: str | Strategy = "elip",
    scorer: str | int | None = None,
    fusion: float | None = None,
    guidance_norm: Literal["none", "match"] | None = None,
    without_text: Literal["dense", "vision"] | None = None,
    merge: bool | None = None,
) -> nn.Module:
    """Make an image model drop and merge tokens, in place; returns the model.

    Parameters, state_dict keys and the call stay the same. A second call replaces the settings.
    The last block runs for all tokens, since the model's own forward may read them; CLIP's image
    tower in inference runs it for CLS alone.
    Call it before torch.compile, which does not see hooks that come later. Guidance, where there is
    any, comes by `with guidance(model, text_cls):` around the forward. A whole language-image model
    guides itself: its forward encodes the text first, without gradient, and again as it always did;
    image i is guided by text i, and another number of texts is an error.

    Args:
        model: an image model of timm, open_clip or transformers with a CLS token, or SigLIP's; or
            a whole open_clip CLIP, transformers CLIPModel, SiglipModel or
            BlipForImageTextRetrieval.
        schedule: as '2(100%) 2(90%) 6(65%) 2(40%)'; its layers add up to the model's depth.
        strategy: a name in `elip_models.STRATEGIES`, or an instance, which then holds all options.
        scorer, fusion, guidance_norm, without_text, merge: see `encode_image`. The scorer defaults
            to 'last', which runs no layer twice; without_text to 'vision' for an image model, to
            'dense' for a whole one and for SigLIP's, where images without text stay as they were.

    Raises:
        TypeError: a model that cannot be reduced, or a compiled one, with the reason.
        ValueError: bad arguments.
    """
    _refuse_compiled(model, "reduce_")
    image_text = as_image_text(model)
    tower = as_tower(model if image_text is None else image_text.image_model)
    if strategy == "elip" and scorer is None:
        scorer = "last"
    if strategy in ("elip", "trips", "adaptive") and without_text is None:
        without_text = "vision" if image_text is None and tower.has_cls else "dense"
    plan = get_strategy(
        strategy,
        schedule=schedule,
        scorer=scorer,
        fusion=fusion,
        guidance_norm=guidance_norm,
        without_text=without_text,
        merge=merge,
    )
    plan.check(tower)
    if _reduces_by(model, plan, image_text):
        return model  # nothing changes, not even for a compiler that has seen it
    _refuse_replaced(tower, plan)
    unreduce_(model)
    _install(Shared(tower, plan, image_text))
    return model


def _refuse_replaced(tower: Tower, strategy: Strategy) -> None:
    """A block's forward that somebody has replaced would be bypassed."""
    owners = [(tower.blocks[stage.first], "forward") for stage in stages_of(strategy, tower.size)]
    taken = owners if strategy.replaces_block else []
    taken = taken + (tower.entrance if strategy.changes_embedding else [])
    for owner, name in taken:
        stands_in = vars(owner).get(name)
        if stands_in is not None and not isinstance(stands_in, (BlockForward, Entrance)):
            raise TypeError(
                f"model: expected {type(owner).__name__}s that run their own {name}, got one whose "
                f"{name} was replaced, which {strategy.name!r} would bypass"
            )


def _install(shared: Shared) -> None:
    tower, strategy, image_text = shared.tower, shared.strategy, shared.image_text
    stages, counts = stages_of(strategy, tower.size), strategy.token_counts(tower.size)
    if not stages and not strategy.changes_embedding:
        return
    if strategy.changes_embedding:
        *first, (owner, name) = tower.entrance
        setattr(owner, name, Entrance(shared, passes_on=False))
        for owner, name in first:
            setattr(owner, name, Entrance(shared, passes_on=True))
    for stage in stages:
        block = tower.blocks[stage.first]
        entering = counts[stage.first - 1].mlp if stage.first else tower.num_tokens
        hook = StageHook(shared, stage, entering)
        if strategy.replaces_block:
            block.forward = BlockForward(hook)
        else:
            block.register_forward_pre_hook(hook, with_kwargs=True)
    if stages:
        follow_places(shared, stages[0].first + strategy.replaces_block)
    _refuse_methods(tower)
    if image_text is not None and strategy.is_guided:
        text_first = TextFirst(shared)
        image_text.model.register_forward_pre_hook(text_first, with_kwargs=True)
        image_text.model.register_forward_hook(text_first, with_kwargs=True, always_call=True)
    if image_text is not None:
        _refuse_methods(image_text)


def _reduces_by(model: nn.Module, strategy: Strategy, image_text: ImageTextModel | None) -> bool:
    """Whether `reduce_` has changed the model so already."""
    states = (hook.shared for hook in _hooks(model))
    return any(
        s.strategy == strategy and (s.image_text is None) == (image_text is None) for s in states
    )


def _refuse_methods(adapter: Tower | ImageTextModel) -> None:
    for name in adapter.unsupported_methods:
        setattr(adapter.model, name, Refusal(name))


def unreduce_(model: nn.Module) -> nn.Module:
    """Undo `reduce_`, also on a deepcopied or unpickled model; returns the model.

    Of the image model inside a whole one that was reduced, the whole one is undone.
    """
    _refuse_compiled(model, "unreduce_")
    pairs = {h.shared.image_text.model for h in _hooks(model) if h.shared.image_text is not None}
    for module in (module for whole in (model, *pairs) for module in whole.modules()):
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, (StageHook, TextFirst, PlacesHook)):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, (TextFirst, PlacesHook)):
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
        for name, value in list(vars(module).items()):
            if isinstance(value, (Refusal, BlockForward, Entrance)):
                delattr(module, name)
    return model


def is_reduced(model: nn.Module) -> bool:
    """Whether `reduce_` has changed the model, or one inside it."""
    return isinstance(model, nn.Module) and next(_hooks(model), None) is not None


def is_reduced_tower(tower: Tower) -> bool:
    """`is_reduced` of the tower's own parts alone, which every forward can afford."""
    entrance = [] if tower.refuses_resizing() else tower.entrance
    stand_ins = [vars(owner).get(name) for owner, name in entrance]
    for block in tower.blocks:
        stand_ins += [vars(block).get("forward"), *block._forward_pre_hooks.values()]
    return any(isinstance(each, (StageHook, BlockForward, Entrance)) for each in stand_ins)


@contextmanager
def guidance(model: nn.Module, text_cls: Tensor) -> Iterator[None]:
    """Guide the reduced `model` by `text_cls` (B, D) in the forwards inside; detached.

    `model` may be wrapped by DistributedDataParallel or torch.compile. Backward may run after the
    context has ended.

    Raises:
        TypeError, ValueError: a model that `reduce_` has not changed, or text_cls not (B, D).
    """
    if not is_reduced(model):
        raise ValueError("model: expected one that reduce_ has changed, got one without reduction")
    if not isinstance(text_cls, Tensor) or not text_cls.is_floating_point():
        raise TypeError(f"text_cls: expected a floating-point tensor (B, D), got {text_cls!r:.80}")
    shared = {id(hook.shared): hook.shared for hook in _hooks(model)}.values()
    for state in shared:
        if text_cls.dim() != 2 or text_cls.shape[1] != state.tower.width:
            raise ValueError(
                f"text_cls: expected (B, {state.tower.width}), the tower's width, got "
                f"{tuple(text_cls.shape)}; project it to the tower's width first"
            )
    before = [state.text_cls for state in shared]
    for state in shared:
        state.text_cls = text_cls.detach()
    try:
        yield
    finally:
        for state, text in zip(shared, before, strict=True):
            state.text_cls = text


def _hooks(model: nn.Module) -> Iterator[StageHook | BlockForward | Entrance]:
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, StageHook):
                yield hook
        for value in vars(module).values():
            if isinstance(value, (BlockForward, Entrance)):
                yield value


def _refuse_compiled(model: nn.Module, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl is not None:
        raise TypeError(
            f"model: expected a model before torch.compile, got a compiled one; call {name} first, "
            "then compile"
        )
