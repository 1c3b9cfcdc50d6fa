"""reduce_, unreduce_, guidance: token reduction for a model somebody else owns.

`reduce_` adds one forward pre-hook to each block that a strategy's step stands before, or gives the
block whose place it takes another forward: parameters and state_dict keys stay. All state is plain
attributes of these objects, so that it follows the model through deepcopy and pickle and is an
ordinary guard for the compiler.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from elip_models.reduction.places import PlacesHook, follow_places
from elip_models.reduction.replay import Replay, is_recomputed, next_number
from elip_models.reduction.schedule import Schedule, Stage
from elip_models.reduction.strategies import get_strategy
from elip_models.reduction.strategy import (
    Context,
    StageInfo,
    Strategy,
    stages_of,
    take_step,
    warn_if_slower,
)
from elip_models.towers import Pair, Tower, as_pair, as_tower

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass
class _Shared:
    """What the hooks of one model share; before: what the latest step of this forward did."""

    tower: Tower
    strategy: Strategy
    text_cls: Tensor | None = None
    before: StageInfo | None = None
    scoring: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy made inside `guidance` is not guided."""
        return {**vars(self), "text_cls": None, "before": None, "scoring": False}


class StageHook:
    """The forward pre-hook on a block that a step stands before, or the forward of one whose place
    it takes: reduces the tokens that enter."""

    def __init__(self, shared: _Shared, stage: Stage, num_tokens: int) -> None:
        self.shared = shared
        self.stage = stage
        self.num_tokens = num_tokens  # that enter
        stages = stages_of(shared.strategy, shared.tower.size)
        self.is_first, self.is_last = stage == stages[0], stage == stages[-1]
        self.replay = Replay()

    def __call__(self, block: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        """As a pre-hook: the arguments of the block, with fewer tokens."""
        if self.shared.scoring:  # the dry run passes through this very block
            return None
        tokens = self.reduce(block, args, kwargs)
        return None if tokens is None else ((tokens, *args[1:]), kwargs)

    def reduce(self, block: nn.Module, args: Args, kwargs: Kwargs) -> Tensor | None:
        """What the step makes of the tokens, or None where it does nothing."""
        if torch.compiler.is_compiling() and block._compiled_call_impl is not None:
            return _outside_the_graph(self, block, args, kwargs)
        _refuse_masks(args, kwargs)
        shared, strategy = self.shared, self.shared.strategy
        began = None if torch.compiler.is_compiling() else next_number()
        recomputed = began is not None and is_recomputed()
        if recomputed:
            _, _, before, replay = self.replay.recall()
            reduces = replay is not None
        else:
            before, replay = None if self.is_first else shared.before, None
            reduces = strategy.reduces(shared.text_cls, shared.tower.model.training)
            if self.is_first and reduces:
                warn_if_slower(shared.tower, strategy)
        if not reduces:
            if not recomputed:
                self._remember(began, before, None)
            return None
        self._check(args[0])
        shared.scoring = True
        try:
            context = Context(shared.text_cls, before, replay)
            tokens, info = take_step(strategy, shared.tower, self.stage, args[0], context)
        finally:
            shared.scoring = False
        if not recomputed:
            self._remember(began, before, info)
        return tokens

    def _check(self, tokens: Tensor) -> None:
        if tokens.shape[1] != self.num_tokens:
            raise ValueError(
                f"images: expected {self.num_tokens} tokens before block {self.stage.first}, those "
                f"of images {self.shared.tower.image_size}, got {tokens.shape[1]}; resize the "
                "images"
            )

    def _remember(
        self, began: int | None, before: StageInfo | None, info: StageInfo | None
    ) -> None:
        is_rotary = self.shared.tower.is_rotary
        if self.shared.strategy.takes_block or is_rotary:
            self.shared.before = None if self.is_last and not is_rotary else info
        if began is not None and not torch.is_inference_mode_enabled():
            self.replay.remember(began, before, info)


class BlockForward:
    """Stands in for the forward of a block whose place a step takes."""

    def __init__(self, hook: StageHook) -> None:
        self.hook = hook
        self.shared = hook.shared

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        block = self.shared.tower.blocks[self.hook.stage.first]
        if not self.shared.scoring:
            tokens = self.hook.reduce(block, args, kwargs)
            if tokens is not None:
                return tokens
        return type(block).forward(block, *args, **kwargs)


class Entrance:
    """Stands in for what makes tokens of images; `passes_on` where a later part does it all."""

    def __init__(self, shared: _Shared, *, passes_on: bool) -> None:
        self.shared = shared
        self.passes_on = passes_on

    def __call__(self, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.passes_on:
            return images
        return self.shared.strategy.patchify(self.shared.tower, images)


def _refuse_masks(args: Args, kwargs: Kwargs) -> None:
    masks = (*args[1:], *(kwargs.get(name) for name in ("attn_mask", "attention_mask")))
    if any(mask is not None for mask in masks) or kwargs.get("is_causal"):
        raise ValueError("attn_mask: expected none on a reduced model, whose tokens change")


@torch.compiler.disable
def _outside_the_graph(
    hook: StageHook, block: nn.Module, args: Args, kwargs: Kwargs
) -> Tensor | None:
    """In a block that is compiled by itself the step runs eagerly, so that it can replay.

    In the graph it would score again when the block is recomputed, without the guidance.
    """
    return hook.reduce(block, args, kwargs)


class TextFirst:
    """Both hooks on a whole model's forward: its text becomes the guidance of its image tower.

    The text is encoded without gradient, once more than the forward itself does.
    """

    def __init__(self, shared: _Shared, pair: Pair) -> None:
        self.shared = shared
        self.pair = pair
        self.is_ours = False

    def __call__(self, model: nn.Module, args: Args, kwargs: Kwargs, *output: Any) -> None:
        if output:
            self.shared.text_cls = None if self.is_ours else self.shared.text_cls
            self.is_ours = False
        elif self.shared.text_cls is None:
            with torch.no_grad():
                self.shared.text_cls = self.pair.text_cls(*args, **kwargs)
            self.is_ours = True


class _Refusal:
    """Stands in for a method that would return nonsense on a reduced model."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"{self.name}: expected a model whose blocks all see every patch, got one that reduce_ "
            "has changed; unreduce_ it first"
        )


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
    Guidance, where there is any, comes by `with guidance(model, text_cls):` around the forward. A
    whole language-image model guides itself: its forward encodes the text first, without gradient,
    and again as it always did.

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
    pair = as_pair(model)
    tower = as_tower(model if pair is None else pair.image_model)
    if strategy == "elip" and scorer is None:
        scorer = "last"
    if strategy in ("elip", "trips", "adaptive") and without_text is None:
        without_text = "vision" if pair is None and tower.has_cls else "dense"
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
    if _reduces_by(model, plan, guides_itself=pair is not None and plan.is_guided):
        return model  # nothing changes, not even for a compiler that has seen it
    unreduce_(model)
    _refuse_replaced(tower, plan)
    _install(_Shared(tower, plan), pair)
    return model


def _refuse_replaced(tower: Tower, strategy: Strategy) -> None:
    """A block's forward that somebody has replaced would be bypassed."""
    owners = [(tower.blocks[stage.first], "forward") for stage in stages_of(strategy, tower.size)]
    taken = owners if strategy.takes_block else []
    taken = taken + (tower.entrance if strategy.changes_embedding else [])
    for owner, name in taken:
        if name in vars(owner):
            raise TypeError(
                f"model: expected {type(owner).__name__}s that run their own {name}, got one whose "
                f"{name} was replaced, which {strategy.name!r} would bypass"
            )


def _install(shared: _Shared, pair: Pair | None) -> None:
    tower, strategy = shared.tower, shared.strategy
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
        if strategy.takes_block:
            block.forward = BlockForward(hook)
        else:
            block.register_forward_pre_hook(hook, with_kwargs=True)
    if stages:
        follow_places(shared, stages[0].first + strategy.takes_block)
    _refuse_side_doors(tower)
    if pair is not None and strategy.is_guided:
        text_first = TextFirst(shared, pair)
        pair.model.register_forward_pre_hook(text_first, with_kwargs=True)
        pair.model.register_forward_hook(text_first, with_kwargs=True, always_call=True)
    if pair is not None:
        _refuse_side_doors(pair)


def _reduces_by(model: nn.Module, strategy: Strategy, *, guides_itself: bool) -> bool:
    """Whether `reduce_` has changed the model so already."""
    found = any(isinstance(hook, TextFirst) for hook in model._forward_pre_hooks.values())
    same = any(hook.shared.strategy == strategy for hook in _hooks(model))
    return same and found == guides_itself


def _refuse_side_doors(adapter: Tower | Pair) -> None:
    for name in adapter.side_doors:
        setattr(adapter.model, name, _Refusal(name))


def unreduce_(model: nn.Module) -> nn.Module:
    """Undo `reduce_`, also on a deepcopied or unpickled model; returns the model."""
    _refuse_compiled(model, "unreduce_")
    for module in model.modules():
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
            if isinstance(value, (_Refusal, BlockForward, Entrance)):
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
