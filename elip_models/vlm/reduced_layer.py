"""The layers of a key-value cache from which tokens were removed, outside of the language model."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from elip_models.validation import require_extra
from elip_models.vlm.cache_state import RemovedTokens, return_slots

with require_extra("elip_models.vlm"):
    from transformers.cache_utils import CacheLayerMixin

COUNTED = (
    "cache: expected a model that reduce_ has changed, for a cache with removed tokens, got one "
    "that counts every token; call reduce_ again, or begin with an empty cache"
)


class ReducedLayer(CacheLayerMixin):
    """A layer that returns the length of the whole sequences.

    Inside the language model `held` takes its place in `cache.layers`. A cache can be copied,
    pickled, reordered and used for a further turn like any other.

    Attributes:
        held: the layer of transformers, with the keys and values of the tokens that are left.
        length: the length of the whole sequences; 0 after `reset`, when nothing is removed.
        removed: what was removed from the sequences, in the first layer of the cache; None in the
            others.
    """

    def __init__(self, held: Any, length: int, removed: RemovedTokens | None = None) -> None:
        self.held = held
        self.length = length
        self.removed = removed

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the layer inside, such as `keys`, `values` or `is_sliding`."""
        if name == "held":  # a copy that has no attributes yet
            raise AttributeError(name)
        return getattr(self.held, name)

    def get_seq_length(self) -> int:
        """Return the length of the whole sequences."""
        return self.length or self.held.get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length of a mask for the whole sequences, and its first position."""
        if self.length:
            return self.length + query_length, 0
        return self.held.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        """Return how many tokens the layer can hold, or -1 without a limit."""
        return self.held.get_max_length()

    def get_max_cache_shape(self) -> int:
        """Return the same; the name of transformers before 5.24."""
        return self.held.get_max_cache_shape()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, as beam search does."""
        self.held.reorder_cache(beam_idx)
        if self.removed is not None:
            self.removed = self.removed.rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Select rows."""
        self.held.batch_select_indices(indices)
        if self.removed is not None:
            self.removed = self.removed.rows(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self.held.batch_repeat_interleave(repeats)
        if self.removed is not None:
            self.removed = self.removed.repeated(repeats)

    def reset(self) -> None:
        """Remove every token, after which the layer is like one from which nothing was removed."""
        self.held.reset()
        self.length, self.removed = 0, None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -`tokens_to_remove` tokens; before transformers 5.24, the length to keep.

        Raises:
            NotImplementedError: these tokens may have changed which image tokens were removed.
        """
        if not self.is_croppable:
            raise NotImplementedError(
                "cache: expected decoding that only adds tokens, got a call of crop, as assisted "
                "decoding does, under a strategy that reads the question, which may have the "
                "candidates. Mark the question by guidance(model, question=mask), or call generate "
                "without assistant_model and prompt_lookup_num_tokens"
            )
        if not self.length:
            self.held.crop(tokens_to_remove)
            return
        is_length = tokens_to_remove > 0
        number = self.length - tokens_to_remove if is_length else -tokens_to_remove
        self.held.crop(-number)
        self.length -= number
        if self.removed is not None:
            self.removed = self.removed.cropped(number)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Initialize the layer inside."""
        self.held.lazy_initialization(key_states, value_states)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise an error: a model that is not reduced cannot continue the sequences."""
        if not self.length:
            return self.held.update(*args, **kwargs)
        raise ValueError(COUNTED)

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        self.held.offload()

    def prefetch(self) -> None:
        """Move keys and values back."""
        self.held.prefetch()


class StaticReducedLayer(ReducedLayer):
    """A layer of a static cache, which stays in `cache.layers` inside the language model too.

    Attributes:
        held: the layer of transformers, with the keys and values of the tokens that are left.
        missing: how many tokens of each sequence were removed; None after `reset`.
        padding: (B, L) bool, the slots that no token attends to.
        is_open: whether the model that removed the tokens runs, whose masks fit the slots.
    """

    is_compileable = True

    def __init__(self, held: Any, attended: Tensor, length: int) -> None:
        """Make the layer from `attended` (B, M) bool, behind a prompt of `length` tokens."""
        super().__init__(held, length)
        self.missing: int | None = length - attended.shape[1]
        self.padding = F.pad(~attended, (0, held.max_cache_len - attended.shape[1]))
        self.is_open = False

    def attended(self) -> Tensor:
        """Return (B, 1, 1, L) bool, the slots that the next token attends to, its own included."""
        slots = torch.arange(self.padding.shape[1], device=self.padding.device)
        return ((slots <= self.held.cumulative_length) & ~self.padding)[:, None, None]

    def get_seq_length(self) -> Any:
        """Return the length of the whole sequences, a tensor."""
        return self.held.get_seq_length() + (self.missing or 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length of a mask for the whole sequences, and its first position."""
        return self.get_max_length(), 0

    def get_max_length(self) -> int:
        """Return how long the whole sequences can become."""
        return self.held.max_cache_len + (self.missing or 0)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; raise an error for a model that is not reduced."""
        if self.missing is not None and not self.is_open:
            raise ValueError(COUNTED)
        self.is_open = False
        return self.held.update(*args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, as beam search does."""
        self.held.reorder_cache(beam_idx)
        self.padding = self.padding[beam_idx]

    def reset(self) -> None:
        """Remove every token, after which the layer is like one from which nothing was removed."""
        super().reset()
        if self.missing is not None:
            return_slots(self.held, self.missing)
        self.missing = None
