"""What `reduce_` puts on a model: hooks and stand-ins whose state is plain attributes.

So it follows the model through deepcopy and pickle, and is an ordinary guard for the compiler.
"""

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from elip_models.reduction.replay import Replay, is_recomputed, next_number
from elip_models.reduction.schedule import Stage
from elip_models.reduction.strategy import (
    Context,
    StageInfo,
    Strategy,
    stages_of,
    take_step,
    warn_if_slower,
)
from elip_models.towers import ImageTextModel, Tower

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


@dataclass
class Shared:
    """What the hooks of one model share.

    image_text: the whole model that was reduced, if it was. before: what the latest step did in
    this forward. scoring: a dry run passes through the blocks.

    """

    tower: Tower
    strategy: Strategy
    image_text: ImageTextModel | None = None
    text_cls: Tensor | None = None
    before: StageInfo | None = None
    scoring: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy made inside `guidance` is not guided."""
        return {**vars(self), "text_cls": None, "before": None, "scoring": False}


class StageHook:
    """The forward pre-hook on a block that a step stands before, or the forward of one whose place
    it takes: reduces the tokens that enter."""

    def __init__(self, shared: Shared, stage: Stage, num_tokens: int) -> None:
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
        if self.shared.strategy.replaces_block or is_rotary:
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

    def __init__(self, shared: Shared, *, passes_on: bool) -> None:
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

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.is_ours = False

    def __call__(self, model: nn.Module, args: Args, kwargs: Kwargs, *output: Any) -> None:
        if output:
            self.shared.text_cls = None if self.is_ours else self.shared.text_cls
            self.is_ours = False
        elif self.shared.text_cls is None:
            with torch.no_grad():
                self.shared.text_cls = self.shared.image_text.text_cls(*args, **kwargs)
            self.is_ours = True


class Refusal:
    """Stands in for a method that would return nonsense on a reduced model."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(
            f"{self.name}: expected a model whose blocks all see every patch, got one that reduce_ "
            "has changed; unreduce_ it first"
        )
