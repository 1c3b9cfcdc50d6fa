"""What a key-value cache holds of sequences from which tokens were removed.

The cache of a generation outlives the forward pass that removed the tokens. Its state is an
attribute of the cache and never of the model, so that threads share a model. Outside of the
language model such a cache returns the length of the whole sequence, from which callers compute
positions, masks and the number of new tokens. Inside, masks need the number of tokens in the cache.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

STATE, LEVEL_STATES = "removed_tokens", "removed_tokens_of_levels"
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
        columns = self.columns.view(len(mask), *[1] * (mask.dim() - 2), -1)
        before = mask.gather(-1, columns.expand(*mask.shape[:-1], -1))
        return torch.cat((before, mask[..., self.start : self.length]), -1)

    def rows(self, indices: Tensor) -> "CacheState":
        """Return the state of the rows at `indices`."""
        mask = None if self.mask is None else self.mask[indices]
        return replace(self, columns=self.columns[indices], real=self.real[indices], mask=mask)


def cache_in(values: Any) -> Any:
    """Return the cache in the arguments or in the output of a language model, or None."""
    return next((values[name] for name in CACHE_NAMES if values.get(name) is not None), None)


def level_states_of(cache: Any) -> tuple[CacheState, ...] | None:
    """Return what the cache holds at each level of `inside`, or None."""
    return getattr(cache, LEVEL_STATES, None)


def store_level_states(cache: Any, states: tuple[CacheState, ...]) -> None:
    """Store what the cache holds at each level of `inside`."""
    setattr(cache, LEVEL_STATES, states)
    for name, function in REPLACED_BY_LEVELS.items():
        if name not in vars(cache):
            setattr(cache, name, partial(function, cache))


def state_of(cache: Any) -> CacheState | None:
    """Return the state of a cache from which tokens were removed, or None."""
    return getattr(cache, STATE, None)


def enter(cache: Any) -> None:
    """Let the cache return the number of tokens that it holds."""
    for name in REPLACED:
        vars(cache).pop(name, None)


def leave(cache: Any, state: CacheState) -> None:
    """Store the state, and let the cache return the length of the whole sequence."""
    setattr(cache, STATE, state)
    for name, function in REPLACED.items():
        setattr(cache, name, partial(function, cache))


def _whole_length(cache: Any, layer_idx: int = 0) -> int:
    return getattr(cache, STATE).length


def _whole_mask_sizes(cache: Any, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
    return getattr(cache, STATE).length + query_length, 0


def _reorder(cache: Any, beam_idx: Tensor) -> None:
    type(cache).reorder_cache(cache, beam_idx)
    _select_rows(cache, beam_idx)


def _select(cache: Any, indices: Tensor) -> None:
    type(cache).batch_select_indices(cache, indices)
    _select_rows(cache, indices)


def _repeat(cache: Any, repeats: int) -> None:
    type(cache).batch_repeat_interleave(cache, repeats)
    states = (state_of(cache), *(level_states_of(cache) or ()))
    rows = torch.arange(next(len(each.columns) for each in states if each is not None))
    _select_rows(cache, rows.repeat_interleave(repeats))


def _select_rows(cache: Any, indices: Tensor) -> None:
    """Select rows of all states of the cache."""
    if (state := state_of(cache)) is not None:
        setattr(cache, STATE, state.rows(indices.to(state.columns.device)))
    if (levels := level_states_of(cache)) is not None:
        indices = indices.to(levels[0].columns.device)
        setattr(cache, LEVEL_STATES, tuple(each.rows(indices) for each in levels))


def _reset(cache: Any) -> None:
    enter(cache)
    for name in (STATE, LEVEL_STATES):
        vars(cache).pop(name, None)
    cache.reset()


def _refuse_crop(*_: Any) -> NoReturn:
    raise NotImplementedError(
        "cache: expected decoding that only adds tokens, got a call of crop, as assisted decoding "
        "does; the last tokens of a cache with removed tokens are not those of the sequence. Call "
        "generate without assistant_model and prompt_lookup_num_tokens"
    )


REPLACED = {
    "get_seq_length": _whole_length,
    "get_mask_sizes": _whole_mask_sizes,
    "reorder_cache": _reorder,
    "batch_select_indices": _select,
    "batch_repeat_interleave": _repeat,
    "reset": _reset,
    "crop": _refuse_crop,
}
"""The methods of a cache that are replaced outside of the language model."""
REPLACED_BY_LEVELS = {
    name: function for name, function in REPLACED.items() if not name.startswith("get_")
}
"""Those that are replaced if tokens are removed inside the language model alone."""
