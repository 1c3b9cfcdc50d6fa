"""What a key-value cache holds of sequences from which tokens were removed.

The cache of a generation outlives the forward pass that removed the tokens. Its state is a part of
the cache and never of the model, so that threads share a model.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from elip_models.vlm.packing import gather_columns

CACHE_NAMES = ("cache", "past_key_values")  # transformers 5.24 renamed the argument


@dataclass(frozen=True)
class CacheState:
    """The tokens in a cache.

    columns: (B, K) the position of each cached token in its whole sequence, up to `start`.
    real: (B, K) bool, False for padding.
    start: the length of the whole sequences when tokens were last removed; the cache holds every
        token behind it.
    length: the length of the whole sequences.
    mask: (B, K) the attention mask of these tokens, which steps of decoding use again, or None.
    """

    columns: Tensor
    real: Tensor
    start: int
    length: int
    mask: Tensor | None = None

    @classmethod
    def whole(cls, batch: int, length: int, device: torch.device) -> "CacheState":
        """Return the state of a cache from which nothing was removed."""
        columns = torch.arange(length, device=device).expand(batch, -1)
        return cls(columns, torch.ones_like(columns, dtype=torch.bool), length, length)

    @property
    def held(self) -> int:
        """Return how many tokens of each sequence the cache holds, padding included."""
        return self.columns.shape[1] + self.length - self.start

    def grown(self, length: int) -> "CacheState":
        """Return the state after `length` more tokens, all of which remain."""
        return replace(self, length=self.length + length)

    def cropped(self, number: int) -> "CacheState":
        """Return the state without the last `number` tokens.

        Raises:
            ValueError: some of them were removed before.
        """
        length, cut = self.length - number, self.start - (self.length - number)
        if cut <= 0:
            return replace(self, length=length)
        last = torch.arange(length, self.start, device=self.columns.device)
        if not (self.columns[:, -cut:] == last).all():
            raise ValueError(
                f"cache: expected to crop tokens of text behind the images, got {number} tokens, "
                "some of which were removed; begin with an empty cache"
            )
        mask = None if self.mask is None else self.mask[:, :-cut]
        return CacheState(self.columns[:, :-cut], self.real[:, :-cut], length, length, mask)

    def extended(self, order: Tensor, real: Tensor, length: int) -> "CacheState":
        """Return the state after `length` more tokens, of which those at `order` (B, M) remain."""
        between = torch.arange(self.start, self.length, device=order.device)
        columns = (self.columns, between.expand(len(order), -1), order + self.length)
        reals = (self.real, real.new_ones(len(real), len(between)), real)
        total = self.length + length
        return CacheState(torch.cat(columns, 1), torch.cat(reals, 1), total, total)

    def gather(self, mask: Tensor) -> Tensor:
        """Return (B, .., held) of a mask (B, .., length) for the cached tokens."""
        mask = mask.expand(len(self.columns), *mask.shape[1:])
        before = gather_columns(mask, self.columns)
        return torch.cat((before, mask[..., self.start : self.length]), -1)

    def rows(self, indices: Tensor) -> "CacheState":
        """Return the state of the rows at `indices`."""
        mask = None if self.mask is None else self.mask[indices]
        return replace(self, columns=self.columns[indices], real=self.real[indices], mask=mask)


@dataclass(frozen=True)
class RemovedTokens:
    """What was removed from the sequences in a cache.

    before: the tokens that are left of the whole sequences, or None if none was removed before the
        language model.
    inside: for each level of the language model, the tokens that are left of those it reads; empty
        if none was removed inside it.
    is_croppable: whether the last tokens can be taken back, as assisted decoding does: they did not
        change which tokens were removed.
    """

    before: CacheState | None
    inside: tuple[CacheState, ...] = ()
    is_croppable: bool = False

    @property
    def length(self) -> int:
        """Return the length of the whole sequences."""
        return (self.before or self.inside[0]).length

    def rows(self, indices: Tensor) -> "RemovedTokens":
        """Return what was removed from the rows at `indices`."""
        first = self.before or self.inside[0]
        indices = indices.to(first.columns.device)
        before = None if self.before is None else self.before.rows(indices)
        inside = tuple(level.rows(indices) for level in self.inside)
        return replace(self, before=before, inside=inside)

    def cropped(self, number: int) -> "RemovedTokens":
        """Return what was removed from the sequences without their last `number` tokens."""
        before = None if self.before is None else self.before.cropped(number)
        inside = tuple(level.cropped(number) for level in self.inside)
        return replace(self, before=before, inside=inside)

    def repeated(self, repeats: int) -> "RemovedTokens":
        """Return what was removed if each row is repeated."""
        columns = (self.before or self.inside[0]).columns
        indices = torch.arange(len(columns), device=columns.device)
        return self.rows(indices.repeat_interleave(repeats))


def cache_in(values: Any) -> Any:
    """Return the cache in the arguments or in the output of a language model, or None."""
    return next((values[name] for name in CACHE_NAMES if values.get(name) is not None), None)


def return_slots(layer: Any, number: int) -> None:
    """Empty a layer of a static cache, and let it allocate the slots that were removed."""
    layer.reset()
    layer.max_cache_len += number
    layer.is_initialized = False
