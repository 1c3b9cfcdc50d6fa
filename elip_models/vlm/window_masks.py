"""The attention masks of whole sequences, and of sequences that are longer than a window.

A window, or a chunk, counts the tokens of the whole sequence, the removed ones too. transformers
makes the masks of the whole sequence, and those of the remaining tokens are parts of them. A layer
with a window holds the last tokens alone: its mask has the columns of these.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from elip_models.vlm.attention_probe import implementation_of

MASKED = ("sdpa", "eager")
"""The implementations of attention that take a mask of pairs of tokens."""


def whole_masks(config: Any, embeds: Tensor, mask: Any, cache: Any, length: int) -> Any:
    """Return the masks (B, 1, T, N) of whole sequences.

    Args:
        config: of the language model.
        embeds: (B, T, D), the new tokens.
        mask: (B, N), None, or those that the model has made.
        cache: one that shows the length of the whole sequences, or None.
        length: N.

    Returns:
        A dict by the types of the layers, or a tensor if the config has no types.

    Raises:
        ValueError: an implementation of attention that takes no such masks.
    """
    from transformers.masking_utils import create_masks_for_generate

    own = implementation_of(config)
    if own not in MASKED:
        raise ValueError(
            "attn_implementation: expected 'sdpa' or 'eager' for a sequence that is longer than "
            "the window of the language model's attention, since other implementations do not "
            f"count removed tokens in the window, got {own!r} and {length} tokens; call "
            "model.set_attn_implementation('sdpa')"
        )
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        mask = create_masks_for_generate(config, embeds, mask, cache)
    types = getattr(config, "layer_types", None)
    if isinstance(mask, Tensor) and types is not None:
        mask = dict.fromkeys(types, mask)
    return filled(mask, embeds, length) if isinstance(mask, dict) else widened(mask, length)


def filled(masks: dict[str, Any], embeds: Tensor, length: int) -> dict[str, Tensor]:
    """Return masks by the types of layers, in which None, plain causal attention, is a mask too."""
    causal = torch.ones(embeds.shape[1], length, dtype=torch.bool, device=embeds.device)
    causal = causal.tril(length - embeds.shape[1]).expand(len(embeds), 1, -1, -1)
    return {kind: causal if mask is None else widened(mask, length) for kind, mask in masks.items()}


def widened(mask: Tensor, length: int) -> Tensor:
    """Return a mask (B, 1, T, length) of one that may lack the first columns, which nothing sees.

    The masks of a static cache have further columns, which stay.
    """
    hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    return F.pad(mask, (max(length - mask.shape[-1], 0), 0), value=hidden)


def narrowed(mask: Tensor, cache: Any, layer: int) -> Tensor:
    """Return the last columns of a mask (B, 1, T, N), of the tokens that a layer attends to."""
    if cache is None:
        return mask
    return mask[..., -cache.get_mask_sizes(mask.shape[2], layer)[0] :]


def narrowed_by_type(masks: Any, cache: Any, types: list[str] | None) -> Any:
    """Return the masks of `whole_masks`, each narrowed to what the layers of its type hold.

    `types` are those of the layers that read the whole sequence; later layers narrow their masks.
    """
    if not isinstance(masks, dict):
        return narrowed(masks, cache, 0)
    return {
        kind: narrowed(mask, cache, types.index(kind)) if kind in types else mask
        for kind, mask in masks.items()
    }
