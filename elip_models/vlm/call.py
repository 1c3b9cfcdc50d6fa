"""The state of one forward pass of a multimodal language model.

It belongs to the thread that runs the forward pass, and ends with it, also after an error. The
sequence that the language model reads is level 0, and each drop inside the language model begins a
level. The layers of a level share one `Packing` of level 0.
"""

from collections.abc import Callable
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from elip_models.vlm.cache_state import CacheState, RemovedTokens
from elip_models.vlm.packing import Packing

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
    text: (B, K) bool, False for padding of the text among all cached and new tokens, or None.
    past: what the cache of each level held before.
    packings: the packing of each level that the forward pass has reached.
    row: (B, K) the attention of the last token in the watched layer that ran last.
    """

    images: Tensor
    text: Tensor | None
    past: tuple[CacheState, ...]
    packings: list[Packing]
    row: Tensor | None = None
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

    images: (B, N) bool, the image tokens, or None if the call has neither ids nor embeddings.
    videos: (B, N) bool, those of videos, if the strategy compares the frames of a clip.
    clip_lengths: the tokens of each clip, if the model writes text between frames.
    mask: (B, K), the attention mask of all cached and new tokens, or None.
    kept: (B, N) bool, the tokens that remain, or None if all do.
    kept_behind: (B, S) bool for each drop, of the sequence that the language model reads.
    packing: the packing of `kept`.
    cache: the key-value cache that the language model gets.
    removed: what was removed from the cache before.
    state: what the cache holds afterwards, if tokens were removed before the language model.
    inner: the forward pass of the language model, if tokens are removed inside it.
    tower: for each call of the image tower, the attention that its patches receive and their keys.
    token: what ends the call.
    """

    images: Tensor | None = None
    videos: Tensor | None = None
    clip_lengths: list[int] = field(default_factory=list)
    mask: Tensor | None = None
    kept: Tensor | None = None
    kept_behind: tuple[Tensor, ...] = ()
    packing: Packing | None = None
    cache: Any = None
    removed: RemovedTokens | None = None
    state: CacheState | None = None
    inner: InnerCall | None = None
    tower: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    token: Token | None = field(default=None, repr=False)

    def info(self, cache: Any) -> PromptInfo:
        """Return what is recorded, with the cache of the language model afterwards."""
        kept = torch.ones_like(self.images) if self.kept is None else self.kept
        layers = [] if cache is None else cache.layers
        lengths = tuple(layer.get_seq_length() for layer in layers)
        return PromptInfo(self.images, kept, self.whole_kept_behind(), lengths)

    def removed_afterwards(self) -> RemovedTokens | None:
        """Return what is removed from the cache behind the forward pass, or None."""
        inside = () if self.inner is None else self.inner.states()
        return RemovedTokens(self.state, inside) if self.state is not None or inside else None

    def whole_kept_behind(self) -> tuple[Tensor, ...]:
        """Return `kept_behind` (B, N) of the whole prompt."""
        if self.packing is None:
            return self.kept_behind
        return tuple(map(self.packing.scatter_flags, self.kept_behind))


CALLS: ContextVar[tuple[PromptCall, ...]] = ContextVar("CALLS", default=())


def begin_call() -> PromptCall:
    """Begin a forward pass of the multimodal model."""
    call = PromptCall()
    call.token = CALLS.set((*CALLS.get(), call))
    return call


def end_call() -> None:
    """End the forward pass that began last."""
    if call := current_call():
        CALLS.reset(call.token)


def current_call() -> PromptCall | None:
    """Return the forward pass of the multimodal model that runs in this thread, or None."""
    calls = CALLS.get()
    return calls[-1] if calls else None
