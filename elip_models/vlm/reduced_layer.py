"""The layer of a key-value cache from which tokens were removed, outside of the language model."""

from typing import Any, NoReturn

from torch import Tensor

from elip_models.validation import require_extra
from elip_models.vlm.cache_state import RemovedTokens

with require_extra("elip_models.vlm"):
    from transformers.cache_utils import CacheLayerMixin


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

    is_croppable = False

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

    def crop(self, *_: Any) -> NoReturn:
        """Raise an error: the last tokens of the layer are not those of the sequence."""
        raise NotImplementedError(
            "cache: expected decoding that only adds tokens, got a call of crop, as assisted "
            "decoding does; the last tokens of a cache with removed tokens are not those of the "
            "sequence. Call generate without assistant_model and prompt_lookup_num_tokens"
        )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Initialize the layer inside."""
        self.held.lazy_initialization(key_states, value_states)

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Raise an error: a model that is not reduced cannot continue the sequences."""
        if not self.length:
            return self.held.update(*args, **kwargs)
        raise ValueError(
            "cache: expected a model that reduce_ has changed, for a cache with removed tokens, "
            "got one that counts every token; call reduce_ again, or begin with an empty cache"
        )

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        self.held.offload()

    def prefetch(self) -> None:
        """Move keys and values back."""
        self.held.prefetch()
