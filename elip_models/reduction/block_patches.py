"""What `reduce_` puts in place of a model's own methods; all that they know is a `Reduction`."""

import inspect
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from elip_models.reduction.checkpoint_replay import is_recomputing
from elip_models.reduction.guidance import drop_guide, guide_of, set_guidance, set_guide
from elip_models.reduction.state import Reduction
from elip_models.reduction.token_assignment import Slots
from elip_models.towers.base import scoring_context

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Stepped = tuple[Tensor, Tensor | None, bool, Slots | None]


class ReducedBlock:
    """Stands in for the forward of block i; `replaced`: what stood there before, of others."""

    def __init__(self, reduction: Reduction, i: int, replaced: Callable[..., Any] | None) -> None:
        self.reduction = reduction
        self.i = i
        self.replaced = replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Block i on the tokens args[0] (B, N, D), as its library calls it, or by name."""
        if not args:
            args, kwargs = self._tokens_of(kwargs)
        if torch.compiler.is_compiling() and self.block._compiled_call_impl is not None:
            from elip_models.reduction.eager_step import outside_graph

            tokens, positions, replaced_block, slots = outside_graph(self.step, args, kwargs)
        else:
            tokens, positions, replaced_block, slots = self.step(args, kwargs)
        if not replaced_block:
            if positions is not None:
                kwargs = self.reduction.tower.moved(kwargs, positions)
            tokens = self.own_forward(tokens, *args[1:], **kwargs)
        return tokens if slots is None else slots.unmerged(tokens)

    def _tokens_of(self, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The tokens that came by the name of the block's first parameter, and what else did."""
        name = list(inspect.signature(type(self.block).forward).parameters)[1]
        if name not in kwargs:
            raise TypeError(f"{name}: expected the tokens (B, N, D) of block {self.i}, got none")
        return (kwargs[name],), {key: value for key, value in kwargs.items() if key != name}

    @property
    def block(self) -> nn.Module:
        return self.reduction.tower.blocks[self.i]

    def own_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block runs without us."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        block = self.block
        return type(block).forward(block, *args, **kwargs)

    def step(self, args: Args, kwargs: Kwargs) -> Stepped:
        """All of a `Step` that a graph may hold."""
        _refuse_fx(args[0])
        masks = (*args[1:], *(kwargs.get(name) for name in ("attn_mask", "attention_mask")))
        if any(mask is not None for mask in masks) or kwargs.get("is_causal"):
            raise ValueError("attn_mask: expected none on a reduced model, whose tokens change")
        step = self.reduction.step(self.i, args[0])
        return step.tokens, step.positions, step.replaced_block, step.slots


class Entrance:
    """Stands in for what makes tokens of images; `passes_on` where a later part does it all."""

    def __init__(self, reduction: Reduction, *, passes_on: bool) -> None:
        self.reduction = reduction
        self.passes_on = passes_on

    def __call__(self, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.passes_on:
            return images
        _refuse_fx(images)
        strategy = self.reduction.strategy
        others = dict(enumerate(args, 2)) | kwargs
        others.pop("interpolate_pos_encoding", None)  # positions are interpolated anyhow
        for name, value in others.items():
            if value is not None and value is not False:
                said = name if isinstance(name, str) else f"argument {name} of the embedding"
                raise ValueError(
                    f"{said}: expected none under {strategy.name!r}, whose patches are others than "
                    f"the image's, got {value!r:.80}; unreduce_ the model first"
                )
        return strategy.patchify(self.reduction.tower, images)


def _refuse_fx(tensor: Any) -> None:
    if isinstance(tensor, torch.fx.Proxy):
        raise TypeError(
            "model: expected a model before reduce_ for torch.fx (symbolic_trace, torchvision's "
            "create_feature_extractor), whose symbols no reduction can follow, got a reduced one; "
            "unreduce_ it first, or use torch.export"
        )


class TextFirst:
    """Both hooks on a whole model's forward: its text becomes the guidance of its image tower.

    The text is encoded without gradient, once more than the forward itself does.
    """

    def __init__(self, reduction: Reduction) -> None:
        self.reduction = reduction

    def __call__(self, model: nn.Module, args: Args, kwargs: Kwargs, *output: Any) -> None:
        reduction = self.reduction
        if torch.compiler.is_compiling():
            is_guided = reduction.text_cls is not None
            reduction.own_text = None
            if not output and not is_guided:
                text = self._text_cls(args, kwargs)
                is_plain = text is None or torch.compiler.is_exporting()
                reduction.own_text = text if is_plain else set_guidance(text)
        elif output:
            drop_guide(self)
        elif guide_of(reduction) is None and not is_recomputing():
            set_guide(reduction, self._text_cls(args, kwargs), self)

    def _text_cls(self, args: Args, kwargs: Kwargs) -> Tensor | None:
        image_text = self.reduction.image_text
        with scoring_context(image_text.model, next(image_text.model.parameters())):
            return image_text.text_cls(*args, **kwargs)


class Representation:
    """Stands in for a model's `extra_repr`, so that printing it shows how it is reduced."""

    def __init__(self, reduction: Reduction, replaced: Callable[[], str] | None) -> None:
        self.reduction = reduction
        self.replaced = replaced

    def __call__(self) -> str:
        """What the model says of itself, and the one line of the summary."""
        model = self.reduction.model
        said = self.replaced() if self.replaced is not None else type(model).extra_repr(model)
        return "\n".join(filter(None, (said, f"(reduced) {self.reduction.summary.line}")))


class Refusal:
    """Stands in for a method that would return nonsense on a reduced model; `replaced`: what the
    user had put there.
    """

    def __init__(self, name: str, replaced: Any) -> None:
        self.name = name
        self.replaced = replaced

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(f"{self.name}: {REFUSALS.get(self.name, UNSUPPORTED)}")


UNSUPPORTED = (
    "expected a model whose blocks all see every patch, got one that reduce_ has changed; "
    "unreduce_ it first"
)
REFUSALS = {
    "_replicate_for_data_parallel": "nn.DataParallel copies modules and not what reduce_ has put "
    "on them; use DistributedDataParallel",
    "__prepare_scriptable__": "torch.jit.script compiles a model's source, which knows nothing of "
    "what reduce_ has put on it; use torch.export or torch.jit.trace",
}
