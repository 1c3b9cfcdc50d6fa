"""reduce_, unreduce_, guidance: token reduction for a model somebody else owns.

`reduce_` adds one forward pre-hook to the first block of each stage, and nothing else: parameters,
state_dict keys and the model's own forward stay. All state is plain attributes of the hook objects,
so that it follows the model through deepcopy and pickle and is an ordinary guard for the compiler.
"""

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from elip_models.reduction.schedule import Schedule, Stage
from elip_models.reduction.stage import ElipSettings, reduce_stage, warn_if_slower
from elip_models.towers import Tower, as_tower

STRATEGIES = ("elip",)
UNCLAIMED = 16  # forwards whose input nobody holds any more, and which may still be recomputed


@dataclass
class _Shared:
    """What the hooks of one model share."""

    tower: Tower
    settings: ElipSettings
    text_cls: Tensor | None = None
    scoring: bool = False


@dataclass
class _Forward:
    """One pass through a stage, kept for its recomputation under activation checkpointing."""

    tokens: weakref.ref
    cls: Tensor
    attention: Tensor | None
    replays: int = 0


class _Replay:
    """The selections of passes whose backward has not run yet.

    Activation checkpointing runs a block again during backward. The stage must then select what it
    selected: guidance may be gone, and scoring again would cost a second dry run. A recomputation
    is matched to its pass by the input's storage, which checkpointing of single blocks keeps;
    otherwise by the nearest CLS tokens, then the fewest replays, then the latest pass.
    """

    def __init__(self) -> None:
        self.forwards: deque[_Forward] = deque()

    def __getstate__(self) -> dict[str, Any]:
        return {"forwards": deque()}

    def remember(self, tokens: Tensor, attention: Tensor | None) -> None:
        unclaimed = [forward for forward in self.forwards if forward.tokens() is None]
        for forward in unclaimed[:-UNCLAIMED]:
            self.forwards.remove(forward)
        cls = tokens[:, 0].detach().clone()
        self.forwards.append(_Forward(weakref.ref(tokens), cls, attention))

    def recall(self, tokens: Tensor) -> Tensor | None:
        for forward in reversed(self.forwards):
            held = forward.tokens()
            if held is not None and held.data_ptr() == tokens.data_ptr():
                return forward.attention
        cls = tokens[:, 0].detach()
        similar = [f for f in reversed(self.forwards) if f.cls.shape == cls.shape]
        if not similar:
            raise RuntimeError(
                "a block of a reduced model was recomputed in backward, but its forward is not "
                f"among the last {UNCLAIMED}; run backward sooner, or checkpoint single blocks"
            )
        forward = similar[0]
        if len(similar) > 1:
            distances = torch.stack([(f.cls - cls).abs().max() for f in similar]).tolist()
            order = zip(distances, (f.replays for f in similar), range(len(similar)), strict=True)
            forward = similar[min(order)[2]]
        forward.replays += 1
        return forward.attention


class StageHook:
    """The forward pre-hook on a stage's first block: reduces the tokens that enter it."""

    def __init__(self, shared: _Shared, stage: Stage) -> None:
        self.shared = shared
        self.stage = stage
        self.replay = _Replay()

    def __call__(
        self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        shared = self.shared
        if shared.scoring:  # the dry run passes through this very block
            return None
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise ValueError("attn_mask: expected none on a reduced model, whose tokens change")
        tokens = args[0]
        if torch.compiler.is_compiling():
            attention = None
        elif torch._C._current_graph_task_id() != -1:  # inside backward: a recomputation
            attention = self.replay.recall(tokens)
            if attention is None:
                return None
        else:
            attention = None
            if self.stage == shared.settings.schedule.stages(shared.tower.num_patches)[0]:
                warn_if_slower(shared.tower, shared.settings)
        if attention is None and not shared.settings.reduces(shared.text_cls):
            self._remember(tokens, None)
            return None
        entered = tokens
        shared.scoring = True
        try:
            tokens, info = reduce_stage(
                shared.tower, self.stage, tokens, shared.text_cls, shared.settings, attention
            )
        finally:
            shared.scoring = False
        if attention is None:
            self._remember(entered, info.attention)
        return (tokens, *args[1:]), kwargs

    def _remember(self, tokens: Tensor, attention: Tensor | None) -> None:
        """Only where a backward may follow; inference keeps nothing."""
        if torch.compiler.is_compiling():
            return
        if torch.is_grad_enabled() or tokens.requires_grad or self.shared.tower.model.training:
            self.replay.remember(tokens, attention)


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
    without_text: Literal["dense", "vision"] = "vision",
    merge: bool = True,
) -> nn.Module:
    """Make an image model drop and merge tokens by `schedule`, in place; returns the model.

    Parameters, state_dict keys and the call stay the same. A second call replaces the settings.
    Guidance, where there is any, comes by `with guidance(model, text_cls):` around the forward.

    Args:
        model: a timm VisionTransformer with CLS pooling.
        schedule: as '2(100%) 2(90%) 6(65%) 2(40%)'; its layers add up to the model's depth.
        strategy: 'elip'.
        scorer, fusion, guidance_norm, without_text, merge: see `encode_image`. The scorer defaults
            to 'last', the one that always costs less than it saves.

    Raises:
        TypeError: a model that cannot be reduced, or a compiled one, with the reason.
        ValueError: bad arguments.
    """
    _refuse_compiled(model, "reduce_")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {STRATEGIES}, got {strategy!r}")
    settings = ElipSettings(schedule, scorer, fusion, guidance_norm, without_text, merge)
    tower = as_tower(model)
    settings.schedule.check_depth(tower.depth)
    stages = settings.schedule.stages(tower.num_patches)
    unreduce_(model)
    shared = _Shared(tower, settings)
    for stage in stages:
        hook = StageHook(shared, stage)
        tower.blocks[stage.first].register_forward_pre_hook(hook, with_kwargs=True)
    for name in tower.side_doors if stages else ():
        setattr(model, name, _Refusal(name))
    return model


def unreduce_(model: nn.Module) -> nn.Module:
    """Undo `reduce_`, also on a deepcopied or unpickled model; returns the model."""
    _refuse_compiled(model, "unreduce_")
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, StageHook):
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
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
    if not isinstance(text_cls, Tensor):
        raise TypeError(f"text_cls: expected a tensor (B, D), got {type(text_cls).__name__}")
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
