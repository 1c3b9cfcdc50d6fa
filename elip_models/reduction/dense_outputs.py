"""The tokens of several blocks, out of a reduced model: the image's whole grid behind each.

`forward_intermediates` of timm and open_clip, and `output_hidden_states=True` of transformers, put
each block's tokens where the patches are. In such a call every block takes and leaves all tokens of
block 0, each as the token that it went into (`elip_kernels.unmerge`): a merged one stands where its
patches stood, and zeros where tokens were dropped without merging. Inside, a block has the first
copy of each, and so the tokens that it has in any other call.

Such a call belongs to its thread or task: a context variable knows it. A compiled graph cannot
read one; there it is an attribute of the `Reduction`, which is set and unset within one trace.
"""

import threading
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from elip_models.reduction.strategy import Strategy

if TYPE_CHECKING:
    from elip_models.reduction.state import Reduction

CALLS: ContextVar[tuple["Reduction", ...]] = ContextVar("CALLS", default=())
"""The reductions whose models are called so, in this thread or task."""


def is_on_grid(reduction: "Reduction") -> bool:
    """Whether the reduction's model runs in such a call."""
    if torch.compiler.is_compiling():
        return reduction.on_grid
    return any(each is reduction for each in CALLS.get())


def begin(reduction: "Reduction") -> None:
    """Such a call begins."""
    if torch.compiler.is_compiling():
        reduction.on_grid = True
    else:
        CALLS.set((*CALLS.get(), reduction))


def end(reduction: "Reduction") -> None:
    """It ends, and with it a forward that has not come to the last block."""
    if torch.compiler.is_compiling():
        reduction.on_grid, reduction.forward = False, None
        return
    *others, _ = CALLS.get()
    CALLS.set(tuple(others))
    reduction.running.pop(threading.get_ident(), None)


class DenseMethod:
    """Stands in for a method that returns the tokens of several blocks; `replaced`: what stood
    there before, of others.
    """

    def __init__(self, reduction: "Reduction", name: str, replaced: Any) -> None:
        self.reduction = reduction
        self.name = name
        self.replaced = replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        begin(self.reduction)
        try:
            if self.replaced is not None:
                return self.replaced(*args, **kwargs)
            model = self.reduction.tower.model
            return getattr(type(model), self.name)(model, *args, **kwargs)
        finally:
            end(self.reduction)


class HiddenStates:
    """Both hooks on a module whose call may be asked for the tokens of all blocks, or for what
    their attention says, which only modules that run as they are can tell.
    """

    def __init__(self, reduction: "Reduction") -> None:
        self.reduction = reduction

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any
    ) -> None:
        tower, strategy = self.reduction.tower, self.reduction.strategy
        if tower.collects("hidden_states", kwargs):
            end(self.reduction) if output else begin(self.reduction)
            if strategy.changes_embedding and not output:
                raise ValueError(
                    f"output_hidden_states: expected False under {strategy.name!r}, whose grid is "
                    "smaller than the image's, got True; unreduce_ the model first"
                )
        if not output and _replaces_attention(strategy) and tower.collects("attentions", kwargs):
            raise ValueError(
                f"output_attentions: expected False under {strategy.name!r}, which attends in "
                "place of the blocks or runs some twice, got True; unreduce_ the model first, or "
                "take strategy='elip' with scorer='last'"
            )


def _replaces_attention(strategy: Strategy) -> bool:
    """What the modules of attention see is not what the model's tokens go through."""
    return strategy.replaces_block or strategy.replaces_later or strategy.runs_blocks
