"""A reduced model: its `Reduction`, and the `ReducedBlock` that replaces the forward of each block.

A `Reduction` has plain attributes, so that deepcopy and pickle copy it with the model, and the
compiler can guard it. The state of one forward pass is a `ForwardState`, of the thread
that runs it and to the graph that may recompute it.
"""

import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from elip_models.reduction import call_context
from elip_models.reduction.call_context import DENSE_CALLS, Replay, records_of
from elip_models.reduction.padding import mask_like, real_tokens
from elip_models.reduction.step import BlockStep, ForwardState, blocks_of
from elip_models.reduction.strategy import Strategy
from elip_models.reduction.summary import Summary
from elip_models.reduction.user_warnings import UnguidedWarning, warn_once
from elip_models.towers import ImageTextModel, Tower
from elip_models.towers.base import original_method

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
MASKS = ("attn_mask", "attention_mask")


@dataclass(eq=False)
class Reduction:
    """The settings of a reduced model, and its running forward passes.

    image_text: the whole model, if it was reduced.
    running: the running forward passes by thread. replay: those that a checkpoint may recompute.
    guides, text_cls: for graphs, the texts by the id of their owner, and the most recent text.
    own_text: for graphs, the text that the whole model's forward has encoded.
    forward, on_grid: for graphs, the running forward pass, and whether blocks return whole grids.
    has_own_mask: for exported graphs, the model makes a mask that hides no token, see `drop_masks`.
    shared_config: the library's config, which a copy with the strategy's settings replaces.
    """

    tower: Tower
    strategy: Strategy
    image_text: ImageTextModel | None = None
    running: dict[int, ForwardState] = field(default_factory=dict)
    replay: Replay = field(default_factory=Replay)
    guides: dict[int, Tensor] = field(default_factory=dict)
    text_cls: Tensor | None = None
    own_text: Tensor | None = None
    forward: ForwardState | None = None
    on_grid: bool = False
    has_own_mask: bool = False
    shared_config: Any = None

    def __post_init__(self) -> None:
        tower, strategy = self.tower, self.strategy
        stages = blocks_of(strategy, tower.size)
        self.acts_at = stages
        if stages and (strategy.replaces_later or tower.has_positions):
            self.acts_at = tuple(range(stages[0], tower.depth))
        self.first, self.last = min(stages, default=tower.depth), tower.depth - 1
        if self.acts_at:
            _refuse_repeated(list(tower.blocks))

    @property
    def model(self) -> nn.Module:
        """Return the model that was reduced: the whole model, or an image model alone."""
        return (self.image_text or self.tower).model

    @property
    def shares_forward(self) -> bool:
        """Return whether blocks in a graph read the results of earlier blocks."""
        tower, strategy = self.tower, self.strategy
        needs_positions = tower.has_positions or tower.has_dynamic_size or tower.pools
        needs_sizes = strategy.replaces_block or strategy.merge == "nearest"
        return needs_positions or needs_sizes or self.on_grid

    @property
    def summary(self) -> Summary:
        """Return the summary of the reduction."""
        return Summary.of(self.tower, self.strategy, is_whole=self.image_text is not None)

    @property
    def is_in_use(self) -> bool:
        """Return whether it is guided, or recorded in this thread or task."""
        return bool(self.guides or records_of(self))

    def __getstate__(self) -> dict[str, Any]:
        """Copy without guidance and without running forward passes."""
        idle = {"running": {}, "guides": {}, "text_cls": None, "own_text": None}
        return vars(self) | idle | {"forward": None, "on_grid": False, "has_own_mask": False}

    def guide(self, owner: object, text_cls: Tensor) -> None:
        """Guide the forward passes of this thread or task by text_cls (B, D)."""
        call_context.set_guide(self, text_cls, owner)
        self.guides[id(owner)] = self.text_cls = text_cls

    def unguide(self, owner: object) -> None:
        """Remove the text that `owner` has set."""
        call_context.drop_guide(owner)
        del self.guides[id(owner)]
        self.text_cls = next(reversed(self.guides.values()), None)

    def begin_dense_call(self) -> None:
        """Begin a call in which every block takes and returns all tokens of block 0."""
        if torch.compiler.is_compiling():
            self.on_grid = True
        else:
            DENSE_CALLS.set((*DENSE_CALLS.get(), self))

    def end_dense_call(self) -> None:
        """End that call, and a forward pass that has not reached the last block."""
        if torch.compiler.is_compiling():
            self.on_grid, self.forward = False, None
            return
        DENSE_CALLS.set(DENSE_CALLS.get()[:-1])
        self.running.pop(threading.get_ident(), None)

    def begin_forward(self, i: int, tokens: Tensor, mask: Tensor | None) -> ForwardState:
        """Create the forward pass whose `tokens` enter block i, guided by this thread's text."""
        text, on_grid = self._guidance(), self.on_grid
        if not torch.compiler.is_compiling():
            on_grid = any(each is self for each in DENSE_CALLS.get())
        num_tokens = tokens.shape[1] if i == self.first else None
        real = None if mask is None else real_tokens(mask, tokens)
        forward = ForwardState(
            *(self.tower, self.strategy, text),
            num_tokens=num_tokens,
            on_grid=on_grid,
            real=real,
        )
        if on_grid and forward.stages:
            self._check_pooling()
        if text is None and self.image_text is not None and forward.stages:
            self._warn_unguided()
        return forward

    def _check_pooling(self) -> None:
        """Raise if the model would pool a grid whose dropped tokens are zeros."""
        if self.tower.pools and self.strategy.merge == "none":
            raise ValueError(
                f"model: expected one that pools all of its patches, or none, to return the tokens "
                f"of several blocks under {self.strategy.name!r}, got a "
                f"{type(self.tower.model).__name__} that pools the kept ones alone; unreduce_ it "
                "first"
            )

    def _guidance(self) -> Tensor | None:
        if not torch.compiler.is_compiling():
            guide = call_context.guide_of(self)
            return None if guide is None else guide.text_cls
        text = self.text_cls if self.own_text is None else self.own_text
        if text is not None and not torch.compiler.is_exporting():
            text = call_context.own_guidance(text)
        return text

    def _warn_unguided(self) -> None:
        if self.strategy.is_guided and not torch.compiler.is_compiling():
            warn_once(
                "the images came alone, or with another number of texts, so they are reduced by "
                "the image alone (without_text='vision'); guidance(model, text_cls) guides them, "
                "without_text='dense' leaves them as they were",
                UnguidedWarning,
            )

    def enter_block(self, i: int, tokens: Tensor, kwargs: Kwargs, mask: Tensor | None) -> BlockStep:
        """Apply the strategy to the tokens that enter block i, in the running forward pass.

        `kwargs` and the mask of the keys are what the model passes to the block.
        """
        if torch.compiler.is_compiling():
            return self._enter_block_in_graph(i, tokens, kwargs, mask)
        thread = threading.get_ident()
        forward = self.replay.recall(i)
        if forward is None:
            forward = self.running.get(thread)
            if forward is None or i == self.first:
                forward = self.running[thread] = self.begin_forward(i, tokens, mask)
            if i == self.last:
                del self.running[thread]
        self.replay.remember(i, forward)
        try:
            step = forward.enter_block(i, tokens, kwargs)
        except BaseException:
            self.running.pop(thread, None)
            raise
        if step.info is not None and i not in forward.infos:
            for infos in records_of(self):
                infos.append(step.info)
        return _store_step(i, forward, step)

    def _enter_block_in_graph(
        self, i: int, tokens: Tensor, kwargs: Kwargs, mask: Tensor | None
    ) -> BlockStep:
        """Enter block i in a graph.

        Blocks that need no earlier result share no state, so that each may be checkpointed.
        """
        if not self.shares_forward:
            if i not in self.acts_at:
                return BlockStep(tokens)
            return self.begin_forward(i, tokens, mask).enter_block(i, tokens, kwargs)
        if self.forward is None or i == self.first:
            self.forward = self.begin_forward(i, tokens, mask)
        forward = self.forward
        if i == self.last:
            self.forward = None
        return _store_step(i, forward, forward.enter_block(i, tokens, kwargs))


def _store_step(i: int, forward: ForwardState, step: BlockStep) -> BlockStep:
    """Store the step in its forward pass; return it with slots only if the block needs them."""
    if step.info is not None:
        forward.infos[i], forward.slots[i] = step.info, step.slots
    is_complete = step.slots is None or forward.returns_grid(i)
    return step if is_complete else step._replace(slots=None)


def _refuse_repeated(blocks: list[nn.Module]) -> None:
    """Raise if a module is used as two blocks: its replaced forward has one index."""
    for i, block in enumerate(blocks):
        first = next(j for j, other in enumerate(blocks) if other is block)
        if first < i:
            raise TypeError(
                f"model: expected blocks that are each a module of their own, got block {i} that "
                f"is block {first} again; give it a copy.deepcopy of it first"
            )


class ReducedBlock:
    """The replacement of block i's forward.

    replaced: the forward that another library or the user had put on the block, or None.
    """

    def __init__(self, reduction: Reduction, i: int, replaced: Callable[..., Any] | None) -> None:
        self.reduction = reduction
        self.i = i
        self.replaced = replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run block i on tokens (B, N, D), its first argument, with the library's arguments."""
        if not args:
            args, kwargs = self._tokens_first(kwargs)
        if len(args) > 1 and self.reduction.tower.is_rotary:  # which reads its rotations by name
            args, kwargs = args[:1], dict(zip(self._names[1:], args[1:], strict=False)) | kwargs
        if self.reduction.has_own_mask:
            args, kwargs = with_masks(args, kwargs, None)
        if torch.compiler.is_compiling() and self.block._compiled_call_impl is not None:
            from elip_models.reduction.eager_step import enter_eagerly

            step = enter_eagerly(self.enter, args, kwargs)
        else:
            step = self.enter(args, kwargs)
        tokens, others = step.tokens, ()
        if not step.replaced_block:
            if step.changes_mask:
                args, kwargs = with_masks(args, kwargs, step.mask)
            tokens = self._run_at(step.positions, tokens, args[1:], kwargs)
        if isinstance(tokens, tuple) and self.reduction.tower.returns_tuple:
            tokens, *others = tokens
        tokens = tokens if step.slots is None else step.slots.unmerged(tokens)
        return (tokens, *others) if self.reduction.tower.returns_tuple else tokens

    def _run_at(self, positions: Tensor | None, tokens: Tensor, args: Args, kwargs: Kwargs) -> Any:
        """Run the block's own forward; or its sublayers, if it would read others' positions."""
        tower = self.reduction.tower
        if positions is not None and tower.reads_own_positions:
            return (
                tower.from_block_kwargs(self.i, kwargs)
                .with_positions(positions)
                .run_sublayers(self.i, tokens)
            )
        if positions is not None:
            kwargs = tower.block_kwargs_at(kwargs, positions)
        return original_method(self.block, "forward", self.replaced)(tokens, *args, **kwargs)

    def _tokens_first(self, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Return tokens passed by keyword as a positional argument, and the other keywords."""
        name = self._names[0]
        if name not in kwargs:
            raise TypeError(f"{name}: expected the tokens (B, N, D) of block {self.i}, got none")
        return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}

    @property
    def _names(self) -> list[str]:
        """Return the names of the arguments of the block's forward, that of the tokens first."""
        return list(inspect.signature(type(self.block).forward).parameters)[1:]

    @property
    def block(self) -> nn.Module:
        """Return the block whose forward is replaced."""
        return self.reduction.tower.blocks[self.i]

    def enter(self, args: Args, kwargs: Kwargs) -> BlockStep:
        """Check the call's arguments, and enter the block."""
        refuse_fx(args[0])
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            raise ValueError(
                "dynamo: expected True in torch.onnx.export of a reduced model, whose ops the "
                "TorchScript exporter does not know, got False; pass dynamo=True"
            )
        masks = (*args[1:], *(kwargs.get(name) for name in MASKS))
        masks = [mask for mask in masks if mask is not None]
        if (masks and not self.reduction.tower.takes_padding) or kwargs.get("is_causal"):
            raise ValueError("attn_mask: expected none on a reduced model, whose tokens change")
        return self.reduction.enter_block(self.i, args[0], kwargs, masks[0] if masks else None)


def with_masks(args: Args, kwargs: Kwargs, real: Tensor | None) -> tuple[Args, Kwargs]:
    """Return a block's arguments with masks of the tokens `real` (B, N), or without any.

    torch.export cannot read the values of a mask, so models of transformers pass one that hides no
    token, where they pass None in a call.
    """

    def changed(mask: Tensor | None) -> Tensor | None:
        return None if mask is None or real is None else mask_like(mask, real)

    named = {name: changed(kwargs[name]) for name in MASKS if name in kwargs}
    return (args[0], *(changed(mask) for mask in args[1:])), kwargs | named


def refuse_fx(tensor: Any) -> None:
    """Raise if torch.fx traces the model with symbols in place of tensors."""
    if isinstance(tensor, torch.fx.Proxy):
        raise TypeError(
            "model: expected a model before reduce_ for torch.fx (symbolic_trace, torchvision's "
            "create_feature_extractor), whose symbols no reduction can follow, got a reduced one; "
            "unreduce_ it first, or use torch.export"
        )
