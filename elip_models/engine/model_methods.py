"""The replacements of methods, and the hooks, that `reduce_` installs beside its blocks."""

from collections.abc import Callable, Iterator
from types import UnionType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from elip_models.call_context import Guide, drop_guide, guide_of, is_paired, set_guide
from elip_models.engine.graph_pass import set_guidance
from elip_models.engine.reduced_block import Args, Kwargs, Passes, refuse_fx
from elip_models.engine.reduction import Reduction
from elip_models.towers.base import original_method, scoring_context
from elip_models.towers.tower_parts import ModuleReference, strongly, weakly

MODEL_MASKS = ("attention_mask", "pixel_attention_mask", "patch_attention_mask")
HANDLES = "elip_handles"
"""The attribute of a module with the handles of the hooks of this library, and their owners."""


class PatchEmbedding:
    """A replacement of the methods that make tokens of images.

    passes_on: return the input unchanged, because a later method does all the work.
    """

    def __init__(self, reduction: Reduction, *, passes_on: bool) -> None:
        self.reduction = reduction
        self.passes_on = passes_on

    def __call__(self, images: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the strategy's patches of the images, without any other argument."""
        if self.passes_on:
            return images
        refuse_fx(images)
        strategy = self.reduction.strategy
        others = dict(enumerate(args, 2)) | kwargs
        others.pop("interpolate_pos_encoding", None)  # the strategy interpolates in any case
        for name, value in others.items():
            if value is not None and value is not False:
                label = name if isinstance(name, str) else f"argument {name} of the embedding"
                raise ValueError(
                    f"{label}: expected none under {strategy.name!r}, whose patches are others "
                    f"than the image's, got {value!r:.80}; unreduce_ the model first"
                )
        tower = self.reduction.tower
        return tower.patchify(strategy.resize(tower, images))


class EncodeTextFirst:
    """The pre-forward and forward hook of a whole model: its text guides its image tower.

    That is so if `guidance(model, paired=True)` asks for it, or if the call itself is about text i
    and image i together. The text is encoded without gradient, in addition to the forward's own
    encoding. It is encoded again in a recomputation that may hold calls with several texts.
    """

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.reduction = passes.reduction

    def __call__(self, model: nn.Module, args: Args, kwargs: Kwargs, *output: Any) -> None:
        """Set the guidance before the forward, and remove it after (with `output`)."""
        reduction = self.reduction
        if torch.compiler.is_compiling():
            graph = reduction.graph
            is_guided, graph.own_text = graph.text_cls is not None, None
            if not output and not is_guided:
                text = self._text_cls(args, kwargs, is_asked=graph.is_paired)
                is_plain = text is None or torch.compiler.is_exporting()
                graph.own_text = text if is_plain else set_guidance(text)
        elif output:
            drop_guide(self)
        elif self._guides(guide := guide_of(reduction)):
            forward = None if guide is None else guide.recomputation.forward
            was_guided = forward is not None and forward.text_cls is not None
            is_asked = was_guided or is_paired(reduction)
            text = self._text_cls(args, kwargs, is_asked=is_asked)
            set_guide(reduction, text, self)

    def _guides(self, guide: Guide | None) -> bool:
        """Return whether the text guides a call that has this guide already."""
        if guide is None or guide.recomputation is None:
            return guide is None
        is_own = guide.recomputation.forward.guided_by is self
        return is_own and len(self.passes.eager.pending) > 1

    def _text_cls(self, args: Args, kwargs: Kwargs, *, is_asked: bool) -> Tensor | None:
        image_text = self.reduction.image_text
        if not is_asked and not image_text.pairs(*args, **kwargs):
            return None
        with scoring_context(image_text.model, next(image_text.model.parameters())):
            return image_text.text_cls(*args, **kwargs)


class DenseMethod:
    """A replacement of a method that returns the tokens of several blocks, as whole grids.

    timm and open_clip have `forward_intermediates`. In its call, every block takes and returns all
    tokens of block 0 (`elip_kernels.unmerge`). A merged patch keeps its own values and changes as
    its token does, and a dropped patch does not change (`strategies/token_assignment.py`). A block
    computes on one copy of each token, as in any other call.

    replaced: the method that another library or the user had put on the model, or None.
    """

    def __init__(self, passes: Passes, name: str, replaced: Any) -> None:
        self.passes = passes
        self.reduction = passes.reduction
        self.name = name
        self.replaced = replaced

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the method as a dense call."""
        self.passes.present.begin_dense_call()
        try:
            method = original_method(self.reduction.tower.model, self.name, self.replaced)
            return method(*args, **kwargs)
        finally:
            self.passes.present.end_dense_call()


class CollectHiddenStates:
    """The pre-forward and forward hook of a module whose call may return all hidden states.

    With `output_hidden_states=True` (transformers) the call is a dense call, see `DenseMethod`.
    In an exported graph, a call without a mask has the model's own, which hides no token.
    Attentions are refused if the strategy attends in place of the modules that return them.
    """

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.reduction = passes.reduction

    def __call__(self, module: nn.Module, args: Args, kwargs: Kwargs, *output: Any) -> None:
        """Begin a dense call before the forward, and end it after (with `output`)."""
        tower, strategy = self.reduction.tower, self.reduction.strategy
        if torch.compiler.is_exporting():
            inputs = (*args[1:], *(kwargs.get(name) for name in MODEL_MASKS))
            is_own = False if output else all(mask is None for mask in inputs)
            self.reduction.graph.has_own_mask = is_own
        if tower.collects("hidden_states", kwargs):
            if output:
                self.passes.present.end_dense_call()
            else:
                self.passes.present.begin_dense_call()
            if strategy.changes_embedding and not output:
                raise ValueError(
                    f"output_hidden_states: expected False under {strategy.name!r}, whose grid is "
                    "smaller than the image's, got True; unreduce_ the model first"
                )
        # attention modules see other tokens than those that leave the blocks
        replaces = strategy.replaces_block or strategy.replaces_later or strategy.runs_blocks
        replaces = replaces or tower.reads_own_positions
        if not output and replaces and tower.collects("attentions", kwargs):
            other = (
                "" if tower.reads_own_positions else ", or take strategy='elip' with scorer='last'"
            )
            raise ValueError(
                f"output_attentions: expected False under {strategy.name!r}, which attends in "
                "place of the blocks or runs some twice, got True; unreduce_ the model first"
                f"{other}"
            )


class Representation:
    """A replacement of a model's `extra_repr`, which prints its reductions too.

    reductions: of the image tower, and the text of those of the language model.
    replaced: what the user had put there, or None.
    """

    model = ModuleReference()

    def __init__(self, model: nn.Module, replaced: Callable[[], str] | None) -> None:
        self.model = model
        self.reductions: list[Reduction | str] = []
        self.replaced = replaced
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle is made of, with the model."""
        return vars(strongly(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or unpickled object, which its model owns."""
        vars(self).update(state)
        vars(self).update(vars(weakly(self)))

    def __call__(self) -> str:
        """Return the model's own text, and a line for each reduction."""
        own = original_method(self.model, "extra_repr", self.replaced)()
        lines = (f"(reduced) {reduction}" for reduction in self.reductions)
        return "\n".join(filter(None, (own, *lines)))


def show_reduction(model: nn.Module, reduction: Reduction | str) -> None:
    """Print the reduction with the model."""
    shown = vars(model).get("extra_repr")
    if not isinstance(shown, Representation):
        shown = model.extra_repr = Representation(model, shown)
    shown.reductions.append(reduction)


def shown_reduction(model: nn.Module) -> Reduction | None:
    """Return the reduction that `show_reduction` prints with the model, or None."""
    shown = vars(model).get("extra_repr")
    reductions = shown.reductions if isinstance(shown, Representation) else []
    return next((each for each in reductions if isinstance(each, Reduction)), None)


def hide_reductions(model: nn.Module, kind: type) -> None:
    """Undo `show_reduction` for reductions of a class."""
    shown = vars(model).get("extra_repr")
    if not isinstance(shown, Representation):
        return
    shown.reductions = [other for other in shown.reductions if not isinstance(other, kind)]
    if not shown.reductions:
        del model.extra_repr
        if shown.replaced is not None:
            model.extra_repr = shown.replaced


def keep_handles(module: nn.Module, owner: Any, *handles: RemovableHandle) -> None:
    """Keep the handles of hooks with their module; `owner` implements them.

    A copy or a pickle of the module has handles of its own hooks.
    """
    vars(module).setdefault(HANDLES, []).extend((owner, handle) for handle in handles)


def owners_of_hooks(module: nn.Module) -> Iterator[Any]:
    """Yield the objects that implement the hooks of the module whose handles it keeps."""
    return (owner for owner, _ in vars(module).get(HANDLES, ()))


def remove_hooks(module: nn.Module, kinds: type | UnionType) -> None:
    """Remove the module's own hooks whose owners are instances of `kinds`."""
    others = []
    for owner, handle in vars(module).pop(HANDLES, ()):
        if isinstance(owner, kinds):
            handle.remove()
        else:
            others.append((owner, handle))
    if others:
        vars(module)[HANDLES] = others


class Refusal:
    """A replacement of a method that would return wrong results on a reduced model.

    replaced: what the user had put there, or None.
    """

    def __init__(self, name: str, replaced: Any) -> None:
        self.name = name
        self.replaced = replaced

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise ValueError with the reason."""
        raise ValueError(f"{self.name}: {REFUSALS.get(self.name, UNSUPPORTED)}")


UNSUPPORTED = (
    "expected a model whose blocks all see every patch, got one that reduce_ has changed; "
    "unreduce_ it first"
)
REFUSALS = {
    "_replicate_for_data_parallel": "nn.DataParallel copies modules without the changes of "
    "reduce_; use DistributedDataParallel",
    "__prepare_scriptable__": "torch.jit.script compiles a model's source, without the changes of "
    "reduce_; use torch.export or torch.jit.trace",
}
