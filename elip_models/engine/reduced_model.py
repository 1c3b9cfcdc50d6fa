"""A reduced model: its `Reduction`, and the `ReducedBlock` that replaces the forward of each block.

A `Reduction` has the settings, which deepcopy and pickle copy with the model, and the state of
forward passes (`forward_passes.py`).
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elip_models.call_variable import Block
from elip_models.engine import call_context
from elip_models.engine.call_context import PAIRINGS, Pairing, records_of
from elip_models.engine.forward_passes import EagerPasses, EnteredBlock, GraphPass
from elip_models.engine.forward_state import BlockStep, ForwardState, blocks_of
from elip_models.engine.padding import mask_like, real_tokens
from elip_models.strategies.strategy import Strategy
from elip_models.strategies.summary import Summary
from elip_models.towers import ImageTextModel, Tower
from elip_models.towers.base import original_method
from elip_models.towers.module_references import is_gone, strongly, weakly
from elip_models.user_warnings import UnguidedWarning, warn_once

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
BLOCK_MASKS = ("attn_mask", "attention_mask")


@dataclass(eq=False)
class Reduction:
    """The settings of a reduced model, and its forward passes.

    image_text: the whole model, if it was reduced.
    shared_config: the library's config, which a copy with the strategy's settings replaces.
    eager, graph: the forward passes of eager calls, and of a graph.
    acts_at: the blocks that a step changes. first, last: the first and the last reduced block.
    """

    tower: Tower
    strategy: Strategy
    image_text: ImageTextModel | None = None
    shared_config: Any = None

    def __post_init__(self) -> None:
        vars(self).update(self._holders(weakly))
        tower, strategy = self.tower, self.strategy
        stages = blocks_of(strategy, tower.size)
        self.acts_at = stages
        if stages and (strategy.replaces_later or tower.has_positions):
            self.acts_at = tuple(range(stages[0], tower.depth))
        self.first, self.last = min(stages, default=tower.depth), tower.depth - 1
        self.eager, self.graph = EagerPasses(self), GraphPass(self)
        if self.acts_at:
            _refuse_repeated(list(tower.blocks))

    def _holders(self, refer: Callable[[Any], Any]) -> dict[str, Any]:
        """Return the attributes that refer to modules of the model, which owns the reduction."""
        return {
            "tower": refer(self.tower),
            "image_text": None if self.image_text is None else refer(self.image_text),
        }

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle is made of, modules included."""
        return vars(self) | self._holders(strongly)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled reduction, which its model owns."""
        vars(self).update(state)
        vars(self).update(self._holders(weakly))

    @property
    def passes(self) -> EagerPasses | GraphPass:
        """Return the forward passes of the code that runs now."""
        return self.graph if torch.compiler.is_compiling() else self.eager

    @property
    def model(self) -> nn.Module:
        """Return the model that was reduced: the whole model, or an image model alone."""
        return (self.image_text or self.tower).model

    @property
    def wholes(self) -> list[nn.Module]:
        """Return the whole model and the image model, without those that were deleted."""
        holders = (self.image_text, self.tower)
        return [holder.model for holder in holders if holder and not is_gone(holder, "model")]

    @property
    def shares_forward(self) -> bool:
        """Return whether blocks in a graph read the results of earlier blocks."""
        tower, strategy = self.tower, self.strategy
        needs_positions = tower.has_positions or tower.has_dynamic_size or tower.pools
        needs_sizes = strategy.replaces_block or strategy.merge == "nearest"
        return needs_positions or needs_sizes

    @property
    def summary(self) -> Summary:
        """Return the summary of the reduction."""
        return Summary.of(self.tower, self.strategy, is_whole=self.image_text is not None)

    def __str__(self) -> str:
        """Return the summary in one line."""
        return self.summary.line

    @property
    def is_installed(self) -> bool:
        """Return whether the model's blocks are still reduced by it."""
        method = vars(self.tower.blocks[self.last]).get("forward")
        return isinstance(method, ReducedBlock) and method.reduction is self

    @property
    def is_in_use(self) -> bool:
        """Return whether it is guided, or recorded in this thread or task."""
        return bool(self.graph.guides or self.graph.pairings or records_of(self))

    @contextmanager
    def guided(self, text_cls: Tensor) -> Iterator[None]:
        """Guide the forward passes of this thread or task by text_cls (B, D)."""
        owner, graph = Block(), self.graph
        call_context.set_guide(self, text_cls, owner)
        with graph.lock:
            graph.guides[id(owner)] = graph.text_cls = text_cls
        try:
            yield
        finally:
            call_context.drop_guide(owner)
            with graph.lock:
                del graph.guides[id(owner)]
                graph.text_cls = next(reversed(graph.guides.values()), None)

    @contextmanager
    def paired(self) -> Iterator[None]:
        """Let text i guide image i in the calls of the whole model in this thread or task."""
        pairing, graph = Pairing(self), self.graph
        with graph.lock:
            graph.pairings.add(id(pairing))
            graph.is_paired = True
        try:
            with PAIRINGS.within(pairing):
                yield
        finally:
            with graph.lock:
                graph.pairings.discard(id(pairing))
                graph.is_paired = bool(graph.pairings)

    def begin_forward(
        self,
        i: int,
        tokens: Tensor,
        mask: Tensor | None,
        text_cls: Tensor | None,
        *,
        on_grid: bool,
    ) -> ForwardState:
        """Create the forward pass whose tokens (B, N, D) enter block i, guided by text_cls."""
        forward = ForwardState(
            self.tower,
            self.strategy,
            text_cls,
            num_tokens=tokens.shape[1] if i == self.first else None,
            on_grid=on_grid,
            real=None if mask is None else real_tokens(mask, tokens),
        )
        if on_grid and forward.stages:
            self._check_pooling()
        if text_cls is None and self.image_text is not None and forward.stages:
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

    def _warn_unguided(self) -> None:
        if self.strategy.is_guided and not torch.compiler.is_compiling():
            warn_once(
                "the images came alone, or with texts that nothing pairs with them, so they are "
                "reduced by the image alone (without_text='vision'); guidance(model, paired=True) "
                "lets each text of the call guide its image, guidance(model, text_cls) takes any "
                "text, without_text='dense' leaves the images as they were",
                UnguidedWarning,
            )


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
        reduction = self.reduction
        if len(args) > 1 and reduction.tower.is_rotary:  # which reads its rotations by name
            args, kwargs = args[:1], dict(zip(self._names[1:], args[1:], strict=False)) | kwargs
        if reduction.graph.has_own_mask:
            args, kwargs = with_masks(args, kwargs, None)
        if not torch.compiler.is_compiling():
            return self._run_eagerly(args, kwargs)
        if self.block._compiled_call_impl is not None:
            from elip_models.engine.eager_step import call_eagerly

            entered = call_eagerly(self._enter_for_graph, args, kwargs)
            tokens, others = self._run(entered.step, args, kwargs)
            leave = self.reduction.eager.leave_block
            return self._output(call_eagerly(leave, self.i, entered, tokens), others)
        entered = self.enter(args, kwargs)
        return self._output(*self._run(entered.step, args, kwargs))

    def _run_eagerly(self, args: Args, kwargs: Kwargs) -> Any:
        """Run the block outside of a graph. An error in it ends the forward pass."""
        passes = self.reduction.eager
        try:
            entered = self.enter(args, kwargs)
            tokens, others = self._run(entered.step, args, kwargs)
            if entered.label is not None:
                tokens = passes.leave_block(self.i, entered, tokens)
            return self._output(tokens, others)
        except BaseException:
            passes.abandon()
            raise

    def _enter_for_graph(self, args: Args, kwargs: Kwargs) -> EnteredBlock:
        """Enter the block; return the result without `info`, which a graph cannot read."""
        try:
            entered = self.enter(args, kwargs)
        except BaseException:
            self.reduction.eager.abandon()
            raise
        return entered._replace(step=entered.step._replace(info=None))

    def _run(self, step: BlockStep, args: Args, kwargs: Kwargs) -> tuple[Tensor, Args]:
        """Run the block, unless the step has; return its tokens, and what it returns beside."""
        tokens, others = step.tokens, ()
        if not step.replaced_block:
            if step.changes_mask and (kwargs or len(args) > 1):
                args, kwargs = with_masks(args, kwargs, step.mask)
            tokens = self._run_at(step.positions, tokens, args[1:], kwargs)
        if isinstance(tokens, tuple) and self.reduction.tower.returns_tuple:
            tokens, *others = tokens
        return tokens if step.slots is None else step.slots.unmerged(tokens), tuple(others)

    def _output(self, tokens: Tensor, others: Args) -> Any:
        """Return the block's output in the form of its library."""
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

    def _mask(self, args: Args, kwargs: Kwargs) -> Tensor | None:
        """Return the mask of the keys in the call's arguments, or None."""
        masks = (*args[1:], *(kwargs.get(name) for name in BLOCK_MASKS))
        masks = [mask for mask in masks if mask is not None]
        if (masks and not self.reduction.tower.takes_padding) or kwargs.get("is_causal"):
            raise ValueError("attn_mask: expected none on a reduced model, whose tokens change")
        return masks[0] if masks else None

    def enter(self, args: Args, kwargs: Kwargs) -> EnteredBlock:
        """Check the call's arguments, and enter the block."""
        refuse_fx(args[0])
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            raise ValueError(
                "dynamo: expected True in torch.onnx.export of a reduced model, whose ops the "
                "TorchScript exporter does not know, got False; pass dynamo=True"
            )
        mask = self._mask(args, kwargs) if kwargs or len(args) > 1 else None
        return self.reduction.passes.enter_block(self.i, args[0], kwargs, mask)


def with_masks(args: Args, kwargs: Kwargs, real: Tensor | None) -> tuple[Args, Kwargs]:
    """Return a block's arguments with masks of the tokens `real` (B, N), or without any.

    torch.export cannot read the values of a mask, so transformers models pass one that hides no
    token, where they pass None in a call.
    """

    def changed(mask: Tensor | None) -> Tensor | None:
        return None if mask is None or real is None else mask_like(mask, real)

    named = {name: changed(kwargs[name]) for name in BLOCK_MASKS if name in kwargs}
    return (args[0], *(changed(mask) for mask in args[1:])), kwargs | named


def refuse_fx(tensor: Any) -> None:
    """Raise if torch.fx traces the model with symbols in place of tensors."""
    if isinstance(tensor, torch.fx.Proxy):
        raise TypeError(
            "model: expected a model before reduce_ for torch.fx (symbolic_trace, torchvision's "
            "create_feature_extractor), whose symbols no reduction can follow, got a reduced one; "
            "unreduce_ it first, or use torch.export"
        )
