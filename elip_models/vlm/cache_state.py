"""What a key-value cache holds of sequences from which tokens were removed.

The cache of a generation outlives the forward pass that removed the tokens. Its state is an
attribute of the cache and never of the model, so that threads share a model. Outside of the
language model such a cache tells the length of the whole sequence, since callers compute positions
and the tokens that are new by it; inside, the masks need the number of tokens that it holds.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

STATE = "removed_tokens"
REPLACED = ("get_seq_length", "crop")


@dataclass(frozen=True)
class CacheState:
    """The tokens in a cache.

    columns: (B, K) the position of each cached token in its whole sequence.
    real: (B, K) bool, False for padding.
    length: the length of the whole sequences.
    """

    columns: Tensor
    real: Tensor
    length: int

    @classmethod
    def whole(cls, batch: int, length: int, device: torch.device) -> "CacheState":
        """Return the state of a cache from which nothing was removed."""
        columns = torch.arange(length, device=device).expand(batch, -1)
        return cls(columns, torch.ones_like(columns, dtype=torch.bool), length)

    def extended(self, order: Tensor, real: Tensor, length: int) -> "CacheState":
        """Return the state after `length` more tokens, of which those at `order` (B, M) remain."""
        columns = torch.cat((self.columns, order + self.length), 1)
        return CacheState(columns, torch.cat((self.real, real), 1), self.length + length)


def state_of(cache: Any) -> CacheState | None:
    """Return the state of a cache from which tokens were removed, or None."""
    return getattr(cache, STATE, None)


def enter(cache: Any) -> None:
    """Let the cache tell how many tokens it holds."""
    for name in REPLACED:
        vars(cache).pop(name, None)


def leave(cache: Any, state: CacheState) -> None:
    """Store the state, and let the cache tell the length of the whole sequence."""
    setattr(cache, STATE, state)
    cache.get_seq_length = partial(_whole_length, cache)
    cache.crop = _refuse_crop


def _whole_length(cache: Any, layer_idx: int = 0) -> int:
    return getattr(cache, STATE).length


def _refuse_crop(*_: Any) -> NoReturn:
    raise NotImplementedError(
        "cache: expected decoding that only adds tokens, got a call of crop, as assisted decoding "
        "does; the last tokens of a cache with removed tokens are not those of the sequence. Call "
        "generate without assistant_model and prompt_lookup_num_tokens"
    )
