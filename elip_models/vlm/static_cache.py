"""A static key-value cache from whose sequences tokens were removed.

Its tensors have slots for the tokens that remain and for those to come. A step of decoding attends
to every slot that is filled and no padding, so that its mask follows from the cache alone. The step
reads no context variable, which torch.compile cannot trace.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from elip_models.vlm.cache_state import cache_in
from elip_models.vlm.packing import hide


def is_static(cache: Any) -> bool:
    """Return whether a cache has a fixed length."""
    return getattr(cache, "is_compileable", False)


def is_static_step(length: int, cache: Any) -> bool:
    """Return whether a call of `length` new tokens is a step of decoding behind removed tokens."""
    return length == 1 and has_reduced_slots(cache)


def has_reduced_slots(cache: Any) -> bool:
    """Return whether a cache is static, and tokens were removed from its sequences."""
    layers = [] if cache is None else cache.layers
    return bool(layers) and getattr(layers[0], "missing", None) is not None


def step_arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of the language model for a step of decoding."""
    layers = cache_in(kwargs).layers
    mask = step_mask(kwargs.get("attention_mask"), layers[0])
    for layer in layers:
        layer.is_open = True
    return kwargs | {"attention_mask": mask}


def step_mask(mask: Any, layer: Any) -> Any:
    """Return the masks of a step for a reduced layer, of the dtype of those of `generate`.

    Raises:
        TypeError: masks of two dimensions, or of flash or flex attention.
    """
    if isinstance(mask, dict):
        return {kind: step_mask(part, layer) for kind, part in mask.items()}
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            "attention_mask: expected (B, 1, 1, N) behind a static cache with removed tokens, as "
            f"generate makes it, got {got}; call generate, with attn_implementation='sdpa'"
        )
    attended = layer.attended()
    if mask.dtype == torch.bool:
        return attended
    return hide(torch.zeros_like(attended, dtype=mask.dtype), ~attended[:, 0, 0])


def show_static_length(cache: Any, length: int, attended: tuple[Tensor, ...]) -> None:
    """Let a static cache return the length of the whole sequences.

    Args:
        cache: the cache behind a prompt.
        length: that of the prompt.
        attended: (B, M) bool for each layer, the cached tokens that are no padding.
    """
    from elip_models.vlm.reduced_layer import StaticReducedLayer

    cache.layers[:] = [
        StaticReducedLayer(layer, seen, length) if has_slots(layer) else layer
        for layer, seen in zip(cache.layers, attended, strict=True)
    ]


def has_slots(layer: Any) -> bool:
    """Return whether a layer of a static cache holds keys, and does not read those of another."""
    return hasattr(layer, "max_cache_len")


def remove_slots(layers: list[Any], number: int) -> list[tuple[Any, int]]:
    """Let layers of a static cache, which are empty, allocate fewer slots; return how many."""
    changed = [(layer, number) for layer in layers if not layer.is_initialized]
    for layer, number in changed:
        layer.max_cache_len -= number
    return changed


def pad_to_slots(mask: Any, layer: Any) -> Any:
    """Return masks of all slots of a layer of a static cache, of those of the remaining tokens."""
    if isinstance(mask, dict):
        return {kind: pad_to_slots(part, layer) for kind, part in mask.items()}
    if mask is None or mask.dim() == 2:
        return mask
    slots = layer.max_cache_len - mask.shape[-1]
    value = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return F.pad(mask, (0, slots), value=value)


def padding_of(mask: Any, length: int) -> Tensor | None:
    """Return (B, N), the tokens that the last of a prompt attends to, of masks of `generate`."""
    mask = next(iter(mask.values())) if isinstance(mask, dict) else mask
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        return None
    last = mask[:, 0, -1, :length]
    return last if last.dtype == torch.bool else last == 0
