"""The state of one forward pass of a multimodal language model.

It belongs to the thread that runs the forward pass, and ends with it, also after an error. The
sequence that the language model reads is level 0, and each drop inside the language model begins a
level. The layers of a level share one `Packing` of level 0.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from elip_models.call_context import add, latest, remove, take
from elip_models.vlm.budget import Budget
from elip_models.vlm.cache_state import CacheState, RemovedTokens
from elip_models.vlm.packing import Packing
from elip_models.vlm.question import Question
from elip_models.vlm.selections import Selections

V = TypeVar("V")


class PromptInfo(NamedTuple):
    """The tokens of one forward pass of a reduced multimodal language model.

    Of a language model with cross-attention, N are the tokens of all tiles of a row, without text.

    Attributes:
        images: (B, N) bool, the image tokens of the prompt.
        kept: (B, N) bool, the tokens that the language model reads.
        kept_behind: (B, N) bool for each drop inside the language model, the tokens behind it.
        cached: the tokens of each sequence in the key-value cache of each layer afterwards; empty
            without a cache.
    """

    images: Tensor
    kept: Tensor
    kept_behind: tuple[Tensor, ...]
    cached: tuple[int, ...]


@dataclass
class InnerCall:
    """The forward pass of a language model inside which tokens are removed.

    images: (B, S) bool, the image tokens of the sequence that it reads.
    last: (B, S) int64, the last token of the question of an image that begins at each position;
        None if the call has no image.
    text: (B, K) bool, False for padding of the text among all cached and new tokens, or None.
    past: what the cache of each level held before.
    packings: the packing of each level that the forward pass has reached.
    watched: query, keys, scale and soft-capping of the watched layer that ran last.
    """

    images: Tensor
    last: Tensor | None
    text: Tensor | None
    past: tuple[CacheState, ...]
    packings: list[Packing]
    watched: tuple[Any, ...] = ()
    made: dict[tuple[int, int], tuple[Any, Any]] = field(default_factory=dict)

    def once(self, level: int, value: Any, make: Callable[[Any], V]) -> V:
        """Return `make(value)`, computed once for all layers of the level."""
        key = level, id(value)
        if key not in self.made:
            self.made[key] = value, make(value)  # a stored value keeps its id
        return self.made[key][1]

    def states(self) -> tuple[CacheState, ...]:
        """Return what the cache of each level holds after the forward pass."""
        length = self.images.shape[1]
        return tuple(
            past.extended(packing.order, packing.real, length)
            for past, packing in zip(self.past, self.packings, strict=True)
        )

    def attended(self, level: int) -> Tensor:
        """Return (B, K) bool, which cached and new tokens of a level are no padding."""
        packing, past = self.packings[level], self.past[level]
        real = torch.cat((past.real, packing.real), 1)
        if self.text is None:
            return real
        return real & self.text.gather(1, self.columns(level))

    def columns(self, level: int) -> Tensor:
        """Return (B, K), the positions of the cached and new tokens of a level at level 0."""
        packing, past = self.packings[level], self.past[level]
        return torch.cat((past.columns, packing.order + past.length), 1)


@dataclass
class PromptCall:
    """The forward pass of a multimodal model.

    hooks: those of the model.
    images: (B, N) bool, the image tokens, or None if the call has neither ids nor embeddings.
    sequences: (B, N), equal for the beams of a prompt: the ids, or `images` without them.
    videos: (B, N) bool, those of videos, if the strategy compares the frames of a clip.
    clip_lengths: the tokens of each clip, if the model writes text between frames.
    question: what guides the selection, or None if the call has no image.
    budget: of the strategy inside the language model, or None.
    selections: those of the generation, if the call is a step of one without a cache.
    numbers: counts the selections.
    mask: (B, K), the attention mask of all cached and new tokens, or None; without the removed ones
        when the language model runs.
    kept: (B, N) bool, the tokens that remain, or None if all do.
    kept_behind: (B, S) bool for each drop, of the sequence that the language model reads.
    packing: the packing of `kept`.
    cache: the key-value cache that the language model gets.
    removed: what was removed from the cache before.
    slots: the layers of a static cache that have fewer slots than before, and how many fewer; empty
        when the language model has ended.
    state: what the cache holds afterwards, if tokens were removed before the language model.
    inner: the forward pass of the language model, if tokens are removed inside it.
    levels: the level of each layer of the language model, if tokens are removed inside it.
    is_windowed: whether the sequences are longer than the window of the language model, which then
        gets masks of `window_masks`.
    is_croppable: as of `RemovedTokens`.
    tower: for each call of the image tower, the attention that its patches receive and their keys.
    """

    hooks: object
    images: Tensor | None = None
    sequences: Tensor | None = None
    videos: Tensor | None = None
    clip_lengths: list[int] = field(default_factory=list)
    question: Question | None = None
    budget: Budget | None = None
    selections: Selections | None = None
    numbers: Iterator[int] = field(default_factory=count)
    mask: Tensor | None = None
    kept: Tensor | None = None
    kept_behind: tuple[Tensor, ...] = ()
    packing: Packing | None = None
    cache: Any = None
    removed: RemovedTokens | None = None
    slots: list[tuple[Any, int]] = field(default_factory=list)
    state: CacheState | None = None
    inner: InnerCall | None = None
    levels: tuple[int, ...] = ()
    is_windowed: bool = False
    is_croppable: bool = False
    tower: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def info(self, cache: Any) -> PromptInfo:
        """Return what is recorded, with the cache of the language model afterwards."""
        kept = torch.ones_like(self.images) if self.kept is None else self.kept
        layers = [] if cache is None else cache.layers
        lengths = tuple(  # a recurrent layer holds no tokens
            int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else 0
            for layer in layers
        )
        return PromptInfo(self.images, kept, self.whole_kept_behind(), lengths)

    def select(self, make: Callable[[], V]) -> V:
        """Return `make()`, or what this selection made in the first step of the generation."""
        if self.selections is None:
            return make()
        made, number = self.selections.made, next(self.numbers)
        if number == len(made):
            made.append(make())
        return made[number]

    def removed_afterwards(self) -> RemovedTokens | None:
        """Return what is removed from the cache behind the forward pass, or None."""
        inside = () if self.inner is None else self.inner.states()
        if self.state is None and not inside:
            return None
        return RemovedTokens(self.state, inside, self.is_croppable)

    def attended_afterwards(self, cache: Any) -> tuple[Tensor, ...]:
        """Return (B, M) bool for each layer of the cache, the tokens that are no padding."""
        if self.inner is not None:
            return tuple(self.inner.attended(level) for level in self.levels)
        real = self.state.real if self.state.mask is None else self.state.mask.bool()
        return (real,) * len(cache.layers)

    def whole_kept_behind(self) -> tuple[Tensor, ...]:
        """Return `kept_behind` (B, N) of the whole prompt."""
        if self.packing is None:
            return self.kept_behind
        return tuple(map(self.packing.scatter_flags, self.kept_behind))


def begin_call(hooks: object) -> PromptCall:
    """Begin a forward pass of the model with these hooks; forget one that was interrupted."""
    call = PromptCall(hooks)
    remove(lambda item: type(item) is PromptCall and item.hooks is hooks)
    add(call)
    return call


def end_call() -> None:
    """End the forward pass that began last."""
    take(PromptCall)


def current_call() -> PromptCall | None:
    """Return the forward pass of the multimodal model that runs in this thread, or None."""
    return latest(PromptCall)
