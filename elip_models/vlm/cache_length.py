"""The length that a key-value cache returns, if tokens were removed from its sequences.

Outside of the language model it is the length of the whole sequence, from which callers compute
positions, masks and the number of new tokens. Inside, masks need the number of tokens in the cache.
So the cache has layers of `reduced_layer` outside, and the layers of transformers inside.
"""

from typing import Any

from elip_models.vlm.cache_state import RemovedTokens


def removed_from(cache: Any) -> RemovedTokens | None:
    """Return what was removed from the sequences in a cache, or None.

    It is None as well while the cache shows the length that it holds.
    """
    layers = () if cache is None else cache.layers
    return getattr(layers[0], "removed", None) if layers else None


def show_held_length(cache: Any) -> None:
    """Let a cache return the number of tokens that it holds, as the language model needs."""
    cache.layers[:] = [getattr(layer, "held", layer) for layer in cache.layers]


def show_full_length(cache: Any, removed: RemovedTokens) -> None:
    """Let a cache return the length of the whole sequences, and store what was removed."""
    from elip_models.vlm.reduced_layer import ReducedLayer

    cache.layers[:] = [
        ReducedLayer(layer, removed.length, removed if i == 0 else None)
        for i, layer in enumerate(cache.layers)
    ]
    for layer in cache.layers:
        own = getattr(layer.held, "is_croppable", True)  # of transformers before 5.24
        layer.is_croppable = removed.is_croppable and own
