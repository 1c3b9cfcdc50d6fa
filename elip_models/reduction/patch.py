"""reduce_, unreduce_, guidance: token reduction for a model somebody else owns.

`reduce_` adds one forward pre-hook to the first block of each stage, and nothing else: parameters,
state_dict keys and the model's own forward stay. All state is plain attributes of the hook objects,
so that it follows the model through deepcopy and pickle and is an ordinary guard for the compiler.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from elip_models.reduction.schedule import Schedule, Stage
from elip_models.reduction.stage import ElipSettings, reduce_stage, stages_of, warn_if_slower
from elip_models.towers import Pair, Tower, as_pair, as_tower

STRATEGIES = ("elip",)
MAX_PASSES = 64  # forwards of a stage that may still wait for their backward


@dataclass
class _Shared:
    """What the hooks of one model share."""

    tower: Tower
    settings: ElipSettings
    text_cls: Tensor | None = None
    scoring: bool = False

    def __getstate__(self) -> dict[str, Any]:
        """A copy made inside `guidance` is not guided."""
        return {**vars(self), "text_cls": None, "scoring": False}


class _Pass(NamedTuple):
    """One forward through a stage: when, in autograd's count, and the row that selected."""

    number: int
    with_grad: bool
    attention: Tensor | None


class _Replay:
    """The rows of the latest passes, so that a recomputation selects what its forward selected.

    Activation checkpointing runs a block again during backward. Guidance may be gone by then, and
    scoring again would cost a second dry run. Autograd numbers its nodes in the order of the
    forward, so the node that asks for the recomputation tells which pass it belongs to:

        non-re-entrant  it stands in the pass, behind the stage: the latest pass before the node
        re-entrant      it is the checkpoint itself, made before the pass ran without gradient: the
                        first pass behind the node
    """

    def __init__(self) -> None:
        self.passes: deque[_Pass] = deque()
        self.forgotten = -1  # the latest number that had to go

    def __getstate__(self) -> dict[str, Any]:
        return {"passes": deque(), "forgotten": -1}

    def remember(self, attention: Tensor | None) -> None:
        number, with_grad = torch.autograd._get_sequence_nr(), torch.is_grad_enabled()
        self.passes.append(_Pass(number, with_grad, attention))
        if len(self.passes) > MAX_PASSES:
            self.forgotten = self.passes.popleft().number

    def recall(self) -> Tensor | None:
        node = torch._C._current_autograd_node()
        number = node._sequence_nr()
        if "CheckpointFunction" in node.name():
            found = [p for p in self.passes if not p.with_grad and p.number > number][:1]
            known = number >= self.forgotten
        else:
            found = [p for p in self.passes if p.with_grad and p.number <= number][-1:]
            known = True
        if not found or not known:
            raise RuntimeError(
                "a block of a reduced model was recomputed in backward, but its forward is not "
                f"among the last {MAX_PASSES}; run backward sooner"
            )
        return found[0].attention


class StageHook:
    """The forward pre-hook on a stage's first block: reduces the tokens that enter it."""

    def __init__(self, shared: _Shared, stage: Stage, num_tokens: int) -> None:
        self.shared = shared
        self.stage = stage
        self.num_tokens = num_tokens  # that enter
        self.replay = _Replay()

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        shared = self.shared
        if shared.scoring:  # the dry run passes through this very block
            return None
        if torch.compiler.is_compiling() and block._compiled_call_impl is not None:
            return _outside_the_graph(self, block, args, kwargs)
        _refuse_masks(args, kwargs)
        tokens = args[0]
        if torch.compiler.is_compiling():
            attention = None
        elif torch._C._current_graph_task_id() != -1:  # inside backward: a recomputation
            attention = self.replay.recall()
            if attention is None:
                return None
        else:
            attention = None
            if self.stage == stages_of(shared.settings.schedule, shared.tower.num_patches)[0]:
                warn_if_slower(shared.tower, shared.settings)
        if attention is None and not shared.settings.reduces(shared.text_cls):
            self._remember(None)
            return None
        if tokens.shape[1] != self.num_tokens:
            raise ValueError(
                f"images: expected {self.num_tokens} tokens before block {self.stage.first}, those "
                f"of images {shared.tower.image_size}, got {tokens.shape[1]}; resize the images"
            )
        shared.scoring = True
        try:
            tokens, info = reduce_stage(
                shared.tower, self.stage, tokens, shared.text_cls, shared.settings, attention
            )
        finally:
            shared.scoring = False
        if attention is None:
            self._remember(info.attention)
        return (tokens, *args[1:]), kwargs

    def _remember(self, attention: Tensor | None) -> None:
        if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
            self.replay.remember(attention)


def _refuse_masks(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    masks = (*args[1:], *(kwargs.get(name) for name in ("attn_mask", "attention_mask")))
    if any(mask is not None for mask in masks) or kwargs.get("is_causal"):
        raise ValueError("attn_mask: expected none on a reduced model, whose tokens change")


@torch.compiler.disable
def _outside_the_graph(
    hook: StageHook, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """In a block that is compiled by itself the hook runs eagerly, so that it can replay.

    In the graph it would score again when the block is recomputed, without the guidance.
    """
    return hook(block, args, kwargs)


class TextFirst:
    """Both hooks on a whole model's forward: its text becomes the guidance of its image tower.

    The text is encoded without gradient, once more than the forward itself does.
    """

    def __init__(self, shared: _Shared, pair: Pair) -> None:
        self.shared = shared
        self.pair = pair
        self.is_ours = False

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any
    ) -> None:
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
    schedule: Schedule | str,
    strategy: str = "elip",
    scorer: str | int = "last",
    fusion: float = 0.8,
    guidance_norm: Literal["none", "match"] = "none",
    without_text: Literal["dense", "vision"] | None = None,
    merge: bool = True,
) -> nn.Module:
    """Make an image model drop and merge tokens by `schedule`, in place; returns the model.

    Parameters, state_dict keys and the call stay the same. A second call replaces the settings.
    The last block runs for all tokens, since the model's own forward may read them; CLIP's image
    tower in inference runs it for CLS alone.
    Guidance, where there is any, comes by `with guidance(model, text_cls):` around the forward. A
    whole language-image model guides itself: its forward encodes the text first, without gradient,
    and again as it always did.

    Args:
        model: an image model of timm, open_clip or transformers with a CLS token; or a whole
            open_clip CLIP, transformers CLIPModel or BlipForImageTextRetrieval.
        schedule: as '2(100%) 2(90%) 6(65%) 2(40%)'; its layers add up to the model's depth.
        strategy: 'elip'.
        scorer, fusion, guidance_norm, without_text, merge: see `encode_image`. The scorer defaults
            to 'last', which runs no layer twice; without_text to 'vision' for an image model, to
            'dense' for a whole one, where images without text stay as they were.

    Raises:
        TypeError: a model that cannot be reduced, or a compiled one, with the reason.
        ValueError: bad arguments.
    """
    _refuse_compiled(model, "reduce_")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {STRATEGIES}, got {strategy!r}")
    pair = as_pair(model)
    if without_text is None:
        without_text = "vision" if pair is None else "dense"
    settings = ElipSettings(schedule, scorer, fusion, guidance_norm, without_text, merge)
    tower = as_tower(model if pair is None else pair.image_model)
    settings.schedule.check_depth(tower.depth)
    stages = settings.schedule.stages(tower.num_patches)
    unreduce_(model)
    if not stages:
        return model
    shared = _Shared(tower, settings)
    tokens = settings.schedule.tokens_per_layer(
        tower.num_patches, merge=merge, num_prefix_tokens=tower.num_prefix_tokens
    )
    for stage in stages:
        entering = tokens[stage.first - 1] if stage.first else tower.num_tokens
        hook = StageHook(shared, stage, entering)
        tower.blocks[stage.first].register_forward_pre_hook(hook, with_kwargs=True)
    _refuse_side_doors(tower)
    if pair is not None:
        text_first = TextFirst(shared, pair)
        model.register_forward_pre_hook(text_first, with_kwargs=True)
        model.register_forward_hook(text_first, with_kwargs=True, always_call=True)
        _refuse_side_doors(pair)
    return model


def _refuse_side_doors(adapter: Tower | Pair) -> None:
    for name in adapter.side_doors:
        setattr(adapter.model, name, _Refusal(name))


def unreduce_(model: nn.Module) -> nn.Module:
    """Undo `reduce_`, also on a deepcopied or unpickled model; returns the model."""
    _refuse_compiled(model, "unreduce_")
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, (StageHook, TextFirst)):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, TextFirst):
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)
        for name, value in list(vars(module).items()):
            if isinstance(value, _Refusal):
                delattr(module, name)
    return model


def is_reduced(model: nn.Module) -> bool:
    """Whether `reduce_` has changed the model, or one inside it."""
    return isinstance(model, nn.Module) and next(_hooks(model), None) is not None


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


def _hooks(model: nn.Module) -> Iterator[StageHook]:
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, StageHook):
                yield hook


def _refuse_compiled(model: nn.Module, name: str) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    if isinstance(model, torch._dynamo.OptimizedModule) or model._compiled_call_impl is not None:
        raise TypeError(
            f"model: expected a model before torch.compile, got a compiled one; call {name} first, "
            "then compile"
        )
